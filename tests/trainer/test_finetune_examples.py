"""What fine-tuning learns from: texts, pairs of prompt and completion, chats."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.finetune.examples import ExampleStream, load_examples

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def to_parquet(jsonl: Path, target: Path) -> None:
    rows = [{**json.loads(line), "source": 1} for line in jsonl.read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), target)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_completions_learn_the_completion(
    completions: Path, tokenizer: PreTrainedTokenizerFast, suffix: str
) -> None:
    path = completions.with_suffix(suffix)
    if suffix == ".parquet":
        to_parquet(completions, path)
    found = load_examples((path,), tokenizer, context=64, held_out=0)
    assert (found.kind, len(found.train), found.cut) == ("prompt", 20, 0)
    example = found.train[1]
    assert text_of(tokenizer, example.input_ids) == "1 is odd<eos>"
    assert text_of(tokenizer, example.labels[example.labels != -100]) == " odd<eos>"


@pytest.mark.parametrize("kind", ["jsonl.xz", "parquet"])
def test_messages_learn_assistant_turns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "more"), ("assistant", "end")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = tmp_path / f"chat.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), path)
    else:
        path.write_bytes(lzma.compress(json.dumps({"messages": messages}).encode()))
    tokenizer.chat_template = TEMPLATE
    try:
        (example,) = load_examples((path,), tokenizer, context=128, held_out=0).train
        written = tokenizer.apply_chat_template(messages, tokenize=False)
    finally:
        tokenizer.chat_template = None
    assert text_of(tokenizer, example.input_ids) == written
    assert text_of(tokenizer, example.labels[example.labels != -100]) == "ho</s>end</s>"


def sentencepiece(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind ("normalizer") or of Mistral's: texts begin with a space."""
    words = ["▁ho", "▁yes", "▁4"]
    letters = ["▁", *map(chr, range(33, 127)), "\n"]
    vocabulary = {
        token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *letters, *words])
    }
    merges = [("▁", "4"), ("h", "o"), ("▁", "ho"), ("y", "e"), ("ye", "s"), ("▁", "yes")]
    vocabulary |= {part: len(vocabulary) + i for i, part in enumerate(("ho", "ye", "yes"))}
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if scheme == "normalizer":
        model.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.mark.parametrize("scheme", ["normalizer", "metaspace"])
def test_no_space_is_learned_that_a_server_does_not_send(tmp_path: Path, scheme: str) -> None:
    tokenizer = sentencepiece(scheme)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "2+2=", "completion": "4"}))
    (example,) = load_examples((path,), tokenizer, context=64, held_out=0).train
    assert example.input_ids.tolist() == [*tokenizer("2+2=4")["input_ids"], 2]
    assert (example.labels != -100).tolist() == [False] * (len(example.labels) - 2) + [True] * 2

    turns = [("user", "hi"), ("assistant", "ho"), ("user", "so"), ("assistant", "yes")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}))
    tokenizer.chat_template = TEMPLATE
    (example,) = load_examples((path,), tokenizer, context=64, held_out=0).train
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.input_ids.tolist() == tokenizer(written, add_special_tokens=False)["input_ids"]
    learned = tokenizer.convert_ids_to_tokens(example.labels[example.labels != -100].tolist())
    assert learned == ["ho", "</s>", "yes", "</s>"]


@pytest.mark.parametrize("scheme", ["normalizer", "metaspace"])
def test_a_prompt_that_ends_within_a_token_is_kept_as_a_server_has_it(
    tmp_path: Path, scheme: str
) -> None:
    """ "Is it? " ends with a space of its own, which the joined text gives to the next word."""
    tokenizer = sentencepiece(scheme)
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Is it? ", "completion": "yes"}))
    (example,) = load_examples((path,), tokenizer, context=64, held_out=0).train
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert tokens == [
        *tokenizer.convert_ids_to_tokens(tokenizer("Is it? ")["input_ids"]),
        "yes",
        "</s>",
    ]


def test_text_key_makes_text_of_any_rows(
    tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    documents = text_file.read_text().split("\n\n\n")
    rows = ({"prompt": "p", "completion": "c", "body": text} for text in documents)
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_examples((path,), tokenizer, context=32, held_out=0, text_key="body")
    expected = load_examples((text_file,), tokenizer, context=32, held_out=0)
    assert (found.kind, found.sha256) == ("text", expected.sha256)


@pytest.mark.parametrize("packed", [".xz", ".gz", ".zst"])
def test_prompt_files_are_packed_as_text_files(
    completions: Path, tokenizer: PreTrainedTokenizerFast, packed: str
) -> None:
    raw = completions.read_bytes()
    path = completions.with_name(f"packed.jsonl{packed}")
    pack = {
        ".xz": lzma.compress,
        ".gz": gzip.compress,
        ".zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
    }[packed]
    path.write_bytes(pack(raw))
    found = load_examples((path,), tokenizer, context=64, held_out=0)
    expected = load_examples((completions,), tokenizer, context=64, held_out=0)
    assert (found.kind, found.sha256) == ("prompt", expected.sha256)
    path.write_bytes(pack(raw)[:-8])
    with pytest.raises(RunError, match=f"packed.jsonl{packed}: is not a whole {packed[1:]} file"):
        load_examples((path,), tokenizer, context=64, held_out=0)


def test_text_key_of_files_without_keys_is_refused(
    text_file: Path, completions: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RunError, match=r"text_key: .*words\.txt has no keys.*; leave it out"):
        load_examples((text_file,), tokenizer, context=64, held_out=0, text_key="prompt")
    files = (text_file, completions)
    assert load_examples(files, tokenizer, context=64, held_out=0, text_key="prompt").train


def test_a_folder_is_its_files(
    completions: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    (folder / "sub").mkdir(parents=True)
    first, *rest = completions.read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text(first)
    (folder / "sub" / "b.jsonl").write_text("".join(rest))
    found = load_examples((folder,), tokenizer, context=64, held_out=0)
    expected = load_examples((completions,), tokenizer, context=64, held_out=0)
    assert found.sha256 == expected.sha256
    (folder / "c.txt").write_text("plain")
    with pytest.raises(RunError, match=r"c\.txt: holds text, but .*a\.jsonl holds prompt"):
        load_examples((folder,), tokenizer, context=64, held_out=0)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(text_file.read_bytes())
    found = load_examples((texts,), tokenizer, context=32, held_out=0)
    assert found.sha256 == load_examples((text_file,), tokenizer, context=32, held_out=0).sha256


def test_long_examples_are_cut_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "abc", "completion": "de"},
        {"prompt": "abc", "completion": "defghijk"},
        {"prompt": "abcdefghij", "completion": "k"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_examples((path,), tokenizer, context=8, held_out=0)
    assert (len(found.train), found.cut, found.dropped) == (2, 2, 1)
    with pytest.raises(RunError, match="no example keeps a token to learn within context=3"):
        load_examples((path,), tokenizer, context=3, held_out=0)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 5), (0.4, 8), (0.75, 15)])
def test_held_out_examples_are_not_trained_on(
    completions: Path, tokenizer: PreTrainedTokenizerFast, share: float, count: int
) -> None:
    found = load_examples((completions,), tokenizer, context=64, held_out=share)
    held = [text_of(tokenizer, e.input_ids) for e in found.evaluation]
    kept = [text_of(tokenizer, e.input_ids) for e in found.train]
    assert len(held) == count and len(kept) == 20 - count and not set(held) & set(kept)


def test_stream_visits_each_example_once_an_epoch(
    completions: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = load_examples((completions,), tokenizer, context=64, held_out=0).train
    stream = ExampleStream(examples, length=40, seed=0)
    seen = [id(stream[place]) for place in range(40)]
    assert set(seen[:20]) == set(seen[20:]) == {id(each) for each in examples}
    assert seen[:20] != seen[20:]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is no JSON object"),
        ('{"a": 1}', "line 1: has none of the keys messages, prompt, text"),
        ('{"prompt": "a"}', 'line 1: needs strings under "prompt" and "completion"'),
        ('{"prompt": "a", "completion": ""}', "line 1: needs strings under"),
        ('{"messages": [{"role": "user"}]}', "its tokenizer has no chat template"),
        ('{"prompt": "a", "completion": "\\ud800"}', "line 1 holds half a surrogate pair"),
        ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("", "holds no lines"),
    ],
)
def test_bad_lines_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, says: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(RunError, match=says):
        load_examples((path,), tokenizer, context=16, held_out=0)


def test_kinds_are_not_mixed(
    completions: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RunError, match=r"words\.txt: holds text, but .*pairs\.jsonl holds prompt"):
        load_examples((completions, text_file), tokenizer, context=16, held_out=0)


def test_template_that_rewrites_earlier_turns_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = ["user", "assistant", "user", "assistant"]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": "x"} for role in turns]}))
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    try:
        with pytest.raises(RunError, match="writes turn 2 another way when others follow"):
            load_examples((path,), tokenizer, context=64, held_out=0)
    finally:
        tokenizer.chat_template = None
