"""Perplexity against sums taken token by token, and the conventions against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.perplexity import (
    Score,
    score_strided,
    score_windows,
    strided_windows,
)
from cast_serve.trainer.evaluation.text import token_stream
from cast_serve.trainer.head import put_loss_head


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(257, (107,), generator=torch.Generator().manual_seed(1)).int()


@torch.no_grad()
def nats_of(model, tokens, place, start):
    """-log P(tokens[place] | tokens[start:place]), one forward pass for one token."""
    logits = model(tokens[None, start:place].long()).logits[0, -1]
    return -logits.double().log_softmax(-1)[tokens[place].item()].item()


def test_windows_token_by_token(tiny_models, tokens):
    model = tiny_models["llama"]().eval()
    each = [nats_of(model, tokens, i, i // 24 * 24) for i in range(96) if i % 24]
    found = score_windows(model, tokens, 24, batch_size=3)
    assert found.tokens == len(each) == 4 * 23
    assert found.nats == pytest.approx(math.fsum(each), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(math.fsum(each) / len(each)), rel=1e-5)


@pytest.mark.parametrize("in_head", [False, True])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("stride", [1, 10, 23])
def test_strided_token_by_token(tiny_models, tokens, model, stride, in_head):
    model = tiny_models[model]().eval()
    if in_head:
        put_loss_head(model)
    context = 24
    each = []
    for place in range(1, len(tokens)):
        # The first window that reaches `place` scores it.
        start = max(0, math.ceil((place - context + 1) / stride)) * stride
        each.append(nats_of(model, tokens, place, start))
    found = score_strided(model, tokens, context, stride=stride, batch_size=4)
    assert found.tokens == len(tokens) - 1
    assert found.nats == pytest.approx(math.fsum(each), rel=1e-5)


def test_stride_of_the_context_is_windows_and_the_rest(tiny_models, tokens):
    model = tiny_models["llama"]().eval()
    windows = score_windows(model, tokens, 24, batch_size=2)
    exact = score_strided(model, tokens[:96], 24, stride=24, batch_size=4)
    assert exact.tokens == windows.tokens
    assert exact.nats == pytest.approx(windows.nats, rel=1e-6)
    rest = [nats_of(model, tokens, place, 96) for place in range(97, 107)]
    found = score_strided(model, tokens, 24, stride=24, batch_size=4)
    assert found.tokens == windows.tokens + 10
    assert found.nats == pytest.approx(windows.nats + math.fsum(rest), rel=1e-5)


@given(count=st.integers(1, 300), context=st.integers(2, 60), data=st.data())
def test_strided_windows_cover_once(count, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(strided_windows(count, context=context, stride=stride))
    assert [w.scored for w in windows] == [0, *(w.end for w in windows[:-1])]
    assert windows[-1].end == count
    assert all(w.start <= w.scored < w.end <= w.start + context for w in windows)
    assert all(w.scored - w.start == context - stride for w in windows[1:])


def test_a_ruined_model_has_infinite_perplexity():
    assert Score(nats=1e6, tokens=10).perplexity == math.inf


def test_raw_text_is_one_text_to_the_byte(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    # But for a byte order mark, which is none of it.
    path.write_bytes(b"\xef\xbb\xbf = A = \r\n\n\n\nB\n")
    found = token_stream(path, tokenizer, join="raw")
    assert tokenizer.decode(found.tolist()) == " = A = \r\n\n\n\nB\n"
    assert len(found) == 14


def test_documents_are_joined_as_in_training(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("ab\n\n\nc")
    found = token_stream(path, tokenizer, join="documents")
    assert tokenizer.decode(found.tolist()) == "ab<eos>c<eos>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot be read: No such file"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 at byte 0"),
        ("a.txt", b"\xef\xbb\xbfa\xff", "is not UTF-8 at byte 4"),
        ("a.jsonl", b"{}", "is no plain text file; use --join documents"),
    ],
)
def test_text_errors(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        token_stream(tmp_path / name, tokenizer, join="raw")
