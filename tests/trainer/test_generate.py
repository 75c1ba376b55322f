"""Generated text: what is kept, which prompts are asked, which settings are refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.generation import main as generate
from cast_serve.trainer.generation import write
from cast_serve.trainer.generation.distinct import Distinct, Verdict
from cast_serve.trainer.generation.prompts import Prompts

PROSE = list(range(200))


def test_a_text_is_kept_once():
    distinct = Distinct(least=4)
    assert distinct.judge(PROSE) is Verdict.KEPT
    assert distinct.judge(PROSE) is Verdict.SEEN


def test_a_text_that_copies_half_of_another_is_dropped():
    distinct = Distinct(least=4)
    distinct.judge(PROSE)
    new = list(range(1000, 1096))
    assert distinct.judge([*PROSE[:96], *new]) is Verdict.SEEN
    assert distinct.judge([*PROSE[:64], *new]) is Verdict.KEPT


def test_a_dropped_text_is_not_remembered():
    distinct = Distinct(least=4)
    distinct.judge(PROSE)
    new = list(range(1000, 1096))
    distinct.judge([*PROSE[:96], *new])
    assert distinct.judge(new) is Verdict.KEPT


def test_going_in_circles_and_too_short():
    distinct = Distinct(least=10)
    assert distinct.judge([1, 2, 3] * 50) is Verdict.CIRCLES
    assert distinct.judge(PROSE[:9]) is Verdict.SHORT


@given(index=st.integers(0, 10**9), seed=st.integers(0, 2**32 - 1))
def test_prompt_depends_on_seed_and_number(index, seed):
    blocks = torch.arange(100, 420, dtype=torch.int32).view(40, 8)
    prompts = Prompts(corpus=list(blocks), unprompted=0.25, begin=7, end=-1, seed=seed)
    first, *rest = prompts[index]
    assert (first, rest) == (7, prompts[index][1:])
    assert len(rest) <= 8
    assert not rest or any(rest == block[: len(rest)].tolist() for block in blocks)


def test_share_of_texts_from_nothing():
    blocks = list(torch.arange(320, dtype=torch.int32).view(40, 8))
    prompts = Prompts(corpus=blocks, unprompted=0.25, begin=7, end=-1, seed=0)
    alone = sum(prompts[index] == [7] for index in range(4000))
    assert alone == pytest.approx(1000, abs=100)
    nothing = Prompts(corpus=None, unprompted=0.0, begin=7, end=-1, seed=0)
    assert nothing[3] == [7]


def test_the_engine_draws_on_when_a_file_is_continued():
    given = ["--model", "m", "--output", "o.jsonl", "--tokens", "9", "--seed", "7"]
    settings = generate._settings(generate.build_parser().parse_args(given))
    seeds = [write._engine_flags(settings, [], request=r)[-2:] for r in (0, 0, 1, 2048)]
    assert seeds[0] == seeds[1]
    assert {flag for flag, _ in seeds} == {"--seed"}
    assert len({seed for _, seed in seeds}) == 3
    assert all(0 <= int(seed) < 2**32 for _, seed in seeds)


@pytest.mark.parametrize("lines", [1, 1000])
def test_full_disk_is_one_line(tmp_path, lines):
    """More lines than a buffer holds fail in another place than few."""
    output = tmp_path / "a.jsonl"
    output.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*a.jsonl \(No space left.*; make room"):
        write._append(output, ["text " * 20 + "\n"] * lines)


def test_text_key_of_prompts(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "b" * 40}))
    given = ["--model", "m", "--output", "o.jsonl", "--tokens", "9", "--prompts", str(path)]
    given += ["--unprompted", "0", "--text-key", "body"]
    settings = generate._settings(generate.build_parser().parse_args(given))
    prompt = write._prompts(settings, tokenizer)[0]
    assert len(prompt) > 1 and set(tokenizer.decode(prompt[1:])) == {"b"}


def test_a_file_that_was_begun_without_text_key_goes_on(tmp_path):
    output = tmp_path / "a.jsonl"
    given = ["--model", "m", "--output", str(output), "--tokens", "9"]
    settings = generate._settings(generate.build_parser().parse_args(given))
    generate._check_output(output, settings)
    output.write_text("")
    record = tmp_path / "a.jsonl.json"
    before = json.loads(record.read_text())
    del before["text_key"]
    record.write_text(json.dumps(before))
    generate._check_output(output, settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], "temperature: 0.0 is out of range"),
        (["--tokens", "0"], "tokens: 0 is out of range"),
        (["--least-tokens", "2000"], "least_tokens: 2000"),
        (["--text-key", "body"], "text_key: there are no prompts to read"),
        (["--", "--seed", "5"], "seed: give it before --, where cast-train generate takes it"),
        (["--output", "text.txt"], r"text.txt must end in .jsonl"),
    ],
)
def test_refused(flags, message, tmp_path):
    given = ["--model", str(tmp_path), "--output", str(tmp_path / "a.jsonl"), "--tokens", "9"]
    with pytest.raises(RunError, match=message):
        generate.main([*given, *flags])


def test_a_file_is_continued_with_its_own_settings_only(tmp_path):
    output = tmp_path / "a.jsonl"
    given = ["--model", "m", "--output", str(output), "--tokens", "9"]
    settings = generate._settings(generate.build_parser().parse_args(given))
    generate._check_output(output, settings)
    output.write_text("")
    generate._check_output(output, settings)
    other = generate._settings(generate.build_parser().parse_args([*given, "--top-p", "0.9"]))
    with pytest.raises(RunError, match=r"top_p was 1.0, is 0.9"):
        generate._check_output(output, other)
    assert json.loads((tmp_path / "a.jsonl.json").read_text())["top_p"] == 1.0
