"""Zero-shot choices against sums taken one at a time, and against lm-eval on the same items."""

import json
import math
import sys

import pytest
import torch

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.choices import (
    Item,
    encode_pair,
    log_likelihoods,
    read_items,
    score_items,
)
from cast_serve.trainer.evaluation.harness import find_tasks, run_tasks

WORDS = ["whale", "ship", "sea", "a harpoon", "no", "ö", "the captain of it"]


@pytest.fixture(scope="module")
def items():
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(40):
        picked = torch.randperm(len(WORDS), generator=generator)[: 2 + number % 3].tolist()
        query = f"Q{'o' * (number % 7)}?" + "\n" * (number % 2)
        choices = tuple(WORDS[i] for i in picked)
        made.append(Item(query=query, choices=choices, gold=number % len(choices)))
    return made


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_models):
    return tiny_models[request.param]().eval()


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, choice):
    """Of one choice, by the whole text's logits in fp64."""
    ids = tokenizer.encode(prompt + choice)
    first = len(tokenizer.encode(prompt))
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return math.fsum(log_probs[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_score_items(model, tokenizer, items):
    right = right_norm = 0
    for item in items:
        prompt = item.query.rstrip("\n") + "\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, f" {c}") for c in item.choices]
        per_character = [s / len(c) for s, c in zip(scores, item.choices, strict=True)]
        right += scores.index(max(scores)) == item.gold
        right_norm += per_character.index(max(per_character)) == item.gold
    found = score_items(model, tokenizer, items, between="\nAnswer:", batch_size=4)
    assert 0 < right < 40
    assert found.acc == right / 40
    assert found.acc_norm == right_norm / 40
    hits = torch.tensor([1.0] * right + [0.0] * (40 - right))
    assert found.acc_stderr == pytest.approx(hits.std().item() / math.sqrt(40), rel=1e-5)
    assert found.cut == 0


def test_padding_changes_nothing(model, tokenizer, items):
    pairs = [encode_pair(tokenizer, i.query, f" {c}") for i in items for c in i.choices]
    alone = log_likelihoods(model, pairs, batch_size=1)
    assert len({len(pair.prompt) + len(pair.choice) for pair in pairs}) > 10
    for batch_size in (3, 16, len(pairs)):
        together = log_likelihoods(model, pairs, batch_size=batch_size)
        assert together == pytest.approx(alone, rel=1e-5)


def test_encode_pair(tokenizer):
    pair = encode_pair(tokenizer, "Q: ", "yes")
    assert tokenizer.decode(pair.prompt) == "Q:"
    assert tokenizer.decode(pair.choice) == " yes"
    empty = encode_pair(tokenizer, "", " yes")
    assert empty.prompt == [tokenizer.eos_token_id]
    assert tokenizer.decode(empty.choice) == " yes"


def test_long_prompts_lose_their_start(tiny_models, tokenizer):
    model = tiny_models["llama"]().eval()
    query = "x" * 80
    items = [Item(query=query, choices=("ab", "abc"), gold=0)]
    found = score_items(model, tokenizer, items, between="", batch_size=2)
    assert found.cut == 2
    # 64 positions: 64 tokens go in, and the last is only predicted.
    short = [Item(query="x" * 60, choices=("ab", "abc"), gold=0)]
    assert score_items(model, tokenizer, short, between="", batch_size=2).cut == 0
    with pytest.raises(RunError, match="a choice of 91 tokens is longer than the model's 64"):
        item = Item(query=query, choices=("a" * 90, "b"), gold=0)
        score_items(model, tokenizer, [item], between="", batch_size=2)


def write_items(path, items):
    rows = [{"query": i.query, "choices": i.choices, "gold": i.gold} for i in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read_items(tmp_path, items):
    path = write_items(tmp_path / "items.jsonl", items)
    path.write_text("\ufeff" + path.read_text() + "\n")
    assert read_items(path) == items


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no items"),
        ("{", "line 1 is not JSON"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "line 1 holds half a surrogate"),
        ("[1]", 'line 1 has no string under "query"'),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', 'non-empty strings under "choices"'),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "has 1 choices; an item needs two"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', '"gold" is 2; it must be from 0 to 1'),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', '"gold" is True'),
    ],
)
def test_read_items_errors(tmp_path, text, message):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        read_items(path)
    assert str(path) in str(caught.value)


TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
def test_lm_eval_gives_the_same_numbers(model, tokenizer, items, tmp_path):
    pytest.importorskip("lm_eval")
    # lm-eval's template does not drop line breaks of the query.
    items = [Item(query=i.query.rstrip("\n"), choices=i.choices, gold=i.gold) for i in items]
    data = write_items(tmp_path / "items.jsonl", items)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    local = find_tasks(["local_choice"], include_path=tasks)
    found = run_tasks(model, tokenizer, local, batch_size=4, limit=None)
    ours = score_items(model, tokenizer, items, between="\nAnswer:", batch_size=8)
    assert found["local_choice"] == {
        "acc,none": ours.acc,
        "acc_stderr,none": pytest.approx(ours.acc_stderr),
        "acc_norm,none": ours.acc_norm,
        "acc_norm_stderr,none": pytest.approx(ours.acc_norm_stderr),
    }
    assert 0 < ours.acc < 1


@pytest.mark.slow
def test_lm_eval_unknown_task():
    pytest.importorskip("lm_eval")
    with pytest.raises(RunError, match="lm-eval knows no local_choices"):
        find_tasks(["local_choices"], include_path=None)


def test_lm_eval_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RunError, match=r"needs lm-eval; install it: pip install 'cast-serve\[eval"):
        find_tasks(["piqa"], include_path=None)
