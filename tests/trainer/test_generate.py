"""Generated text: what is kept, which prompts are asked, which settings are refused."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.generation import main as generate
from cast_serve.trainer.generation import write
from cast_serve.trainer.generation.characters import first_start, whole_end, without_part
from cast_serve.trainer.generation.distinct import Distinct, Verdict
from cast_serve.trainer.generation.prompts import Prompts
from cast_serve.trainer.lock import lock
from cast_serve.trainer.main import main

PROSE = list(range(200))
# Three bytes each, and of the tests' tokenizer three tokens.
KANA = "".join(chr(place) for place in range(0x3041, 0x3091))


def settings_of(*flags):
    given = ["--model", "m", "--output", "o.jsonl", "--tokens", "9", *map(str, flags)]
    return generate._settings(generate.build_parser().parse_args(given))


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
    prompts = Prompts(corpus=list(blocks), unprompted=0.25, begin=7, end=-1, decode=str, seed=seed)
    first, *rest = prompts[index]
    assert (first, rest) == (7, prompts[index][1:])
    assert len(rest) <= 8
    assert not rest or any(rest == block[: len(rest)].tolist() for block in blocks)


def test_share_of_texts_from_nothing():
    blocks = list(torch.arange(320, dtype=torch.int32).view(40, 8))
    prompts = Prompts(corpus=blocks, unprompted=0.25, begin=7, end=-1, decode=str, seed=0)
    alone = sum(prompts[index] == [7] for index in range(4000))
    assert alone == pytest.approx(1000, abs=100)
    nothing = Prompts(corpus=None, unprompted=0.0, begin=7, end=-1, decode=str, seed=0)
    assert nothing[3] == [7]


@pytest.mark.parametrize(("length", "least"), [(1, 1), (4, 150), (8, 300)])
def test_prompts_are_whole_characters(tokenizer, tmp_path, length, least):
    """Blocks of bytes begin and end within characters of two, three and four of them."""
    text = "é🙂" + KANA + "aé" + KANA[::-1] + "🙂🙂b"
    path = tmp_path / "a.txt"
    path.write_text(text * 20)
    flags = ("--prompts", path, "--unprompted", "0", "--prompt-tokens", length)
    prompts = write._prompts(settings_of(*flags), tokenizer)
    found = [tokenizer.decode(prompts[index][1:]) for index in range(300)]
    assert not [prompt for prompt in found if "\ufffd" in prompt]
    assert all(len(prompt.encode()) <= length for prompt in found)
    # One byte holds "a" and "b" alone, four in a row hold a whole kana two times of three.
    assert sum(map(bool, found)) >= least
    again = write._prompts(settings_of(*flags), tokenizer)
    assert [prompts[index] for index in range(300)] == [again[index] for index in range(300)]


def test_characters_among_byte_tokens():
    """Bytes in a row decode to U+FFFD one and all where one of them is a part of a character."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokens = tokenizer.encode("捕鯨船a").ids
    assert tokenizer.decode(tokens[:8]) == "\ufffd" * 8
    assert [first_start(tokens[place:], tokenizer.decode) for place in range(4)] == [0, 2, 1, 0]
    for cut in (6, 7, 8):
        assert without_part(tokens[:cut], tokenizer.decode) == tokens[:6]
        assert whole_end(tokens[:cut], cut, tokenizer.decode) == tokens[:6]
    assert whole_end(tokens, 7, tokenizer.decode) == tokens[:9]
    assert without_part(tokens, tokenizer.decode) == tokens


@pytest.fixture
def write_text(tokenizer, tmp_path, monkeypatch):
    """Runs `write` until it has one text, of these tokens; (rows of the file, tokens it counts)."""

    def run(tokens, reason):
        answer = SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=tokens, finish_reason=reason)],
        )
        engine = SimpleNamespace(
            generate=lambda *_, **__: [answer],
            llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None)),
        )
        vllm = SimpleNamespace(SamplingParams=lambda **_: None)
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setattr(write, "_start", lambda *_: engine)
        model, output = tmp_path / "model", tmp_path / "a.jsonl"
        tokenizer.save_pretrained(model)
        (model / "config.json").write_text("{}")
        settings = settings_of("--model", model, "--least-tokens", 4)
        _, counted = write.write(output, settings, 9, [], batch=1)
        return [json.loads(line) for line in output.read_text().splitlines()], counted

    return run


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_length_cuts_is_dropped(tokenizer, write_text, cut):
    tokens = tokenizer(f"\ufffd{KANA}\ufffd{KANA[:20]}🙂")["input_ids"]
    rows, counted = write_text(tokens[:-cut], "length")
    assert [row["text"] for row in rows] == [f"\ufffd{KANA}\ufffd{KANA[:20]}"]
    assert rows[0]["tokens"] == counted == len(tokens) - 4


def test_what_the_model_ended_itself_stays(tokenizer, write_text):
    tokens = tokenizer(f"{KANA}🙂")["input_ids"]
    rows, counted = write_text([*tokens[:-1], tokenizer.eos_token_id], "stop")
    assert [row["text"] for row in rows] == [f"{KANA}\ufffd"]
    assert counted == len(tokens) - 1


def test_a_cut_text_is_known_when_the_file_is_continued(tokenizer, write_text, tmp_path):
    tokens = tokenizer(KANA)["input_ids"][:-2]
    write_text(tokens, "length")
    distinct = Distinct(least=4)
    assert write._recall(tmp_path / "a.jsonl", tokenizer, distinct) == (len(tokens) - 1, 1)
    assert distinct.judge(tokens) is Verdict.SEEN


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
        (["--tokens", "inf"], "--tokens: expected a whole number, got 'inf'"),
        (["--tokens", "1e400"], "--tokens: expected a whole number, got '1e400'"),
        (["--tokens", "nan"], "--tokens: expected a whole number, got 'nan'"),
        (["--tokens", "0.5"], "--tokens: expected a whole number, got '0.5'"),
        (["--tokens", "many"], "--tokens: expected a whole number, got 'many'"),
        (
            ["--prompts", "a.txt=0.9", "b.txt=0.1"],
            "prompts: a.txt has a weight; prompts are cut from all of it",
        ),
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


@pytest.mark.parametrize(
    ("files", "message"),
    [((), "model: .* holds no config.json"), (("config.json",), "model: .* holds no tokenizer")],
)
def test_a_folder_that_is_no_model(files, message, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match=message):
        generate.main(
            ["--model", str(tmp_path), "--output", str(tmp_path / "a.jsonl"), "--tokens=9"]
        )


def test_a_number_of_tokens_that_cannot_be_is_one_line(tmp_path, capsys):
    places = ["--model", str(tmp_path), "--output", str(tmp_path / "a.jsonl")]
    assert main(["generate", *places, "--tokens", "inf"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cast-train generate: error: argument --tokens: ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_generate_says_what_to_install(tmp_path, monkeypatch):
    """Before it reads prompts or leaves a file."""
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "vllm", None)
    given = ["--model", str(tmp_path), "--output", str(tmp_path / "a.jsonl"), "--tokens", "9"]
    with pytest.raises(RunError, match=r"needs vllm; install it: pip install 'cast-serve\[cuda\]'"):
        generate.main([*given, "--prompts", "absent.txt"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_one_writer(tmp_path):
    output = tmp_path / "texts" / "a.jsonl"
    given = ["--model", str(tmp_path), "--output", str(output), "--tokens", "9"]
    lock_file = output.with_name(".a.jsonl.lock")
    with lock(lock_file, of=output, command="cast-train generate"):
        with pytest.raises(RunError, match=r"another cast-train generate is writing .*a\.jsonl"):
            generate.main(given)
        assert not output.with_name("a.jsonl.json").exists()
    with lock(lock_file, of=output, command="cast-train generate"):
        pass


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
