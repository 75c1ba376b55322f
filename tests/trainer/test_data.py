"""Sources to a corpus: what a block holds, the split, mixtures, identity, bad input."""

import json
import lzma
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from cast_serve.trainer.data import corpus, load_corpus
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows(blocks):
    return [blocks[place].tolist() for place in range(len(blocks))]


@pytest.fixture
def load(tokenizer):
    """load_corpus of places, each with =WEIGHT or not."""

    def load(*places, context=32, held_out=0.0, eval_data=(), **options):
        return load_corpus(
            tuple(DataSource.parse(str(place)) for place in places),
            tokenizer,
            context=context,
            held_out=held_out,
            eval_sources=tuple(DataSource.parse(str(place)) for place in eval_data),
            **options,
        )

    return load


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.parquet"])
def test_documents_end_with_eos_and_the_rest_is_dropped(tmp_path, tokenizer, load, name, cache):
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": ["one\n\ntwo", "three"]}), path)
    else:
        text = "one\n\ntwo\n\n\nthree"
        if "jsonl" in name:
            text = "".join(json.dumps({"text": t}) + "\n" for t in ("one\n\ntwo", "three"))
        path.write_bytes(lzma.compress(text.encode()) if ".xz" in name else text.encode())
    expected = [*ids(tokenizer, "one\n\ntwo"), 0, *ids(tokenizer, "three"), 0]
    corpus = load(path, context=4, cache=cache)
    assert rows(corpus.parts[0]) == [expected[:4], expected[4:8], expected[8:12]]
    assert len(expected) == 15
    assert corpus.eos == 0


def test_sources_without_weights_are_one_stream(tmp_path, load):
    (tmp_path / "a.txt").write_text("abcde")
    (tmp_path / "b.txt").write_text("fgh")
    (tmp_path / "ab.txt").write_text("abcde\n\n\nfgh")
    together = load(tmp_path / "ab.txt", context=5)
    apart = load(tmp_path / "a.txt", tmp_path / "b.txt", context=5)
    assert rows(apart.parts[0]) == rows(together.parts[0])
    assert len(rows(apart.parts[0])) == 2
    assert apart.shares is None


def test_folder_is_its_files_in_order(tmp_path, load):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    named = load(tmp_path / "a.jsonl", tmp_path / "b.txt", context=2)
    assert rows(load(tmp_path, context=2).parts[0]) == rows(named.parts[0])


def test_held_out_is_evenly_spaced(text_file, load):
    everything = load(text_file)
    split = load(text_file, held_out=0.1)
    whole = [tuple(block) for block in rows(everything.parts[0])]
    kept = {whole.index(tuple(block)) for block in split.evaluation.tolist()}
    assert split.train_blocks + len(split.evaluation) == len(whole)
    assert sorted(kept)[:3] == [9, 19, 29]
    assert split.evaluated_on == "held-out"
    assert everything.evaluated_on == "training sample"
    left = [block for place, block in enumerate(rows(everything.parts[0])) if place % 10 != 9]
    assert rows(split.parts[0]) == left


def test_of_a_large_corpus_less_is_held_out(text_file, load, monkeypatch):
    everything = load(text_file)
    monkeypatch.setattr(corpus, "_HELD_OUT", 0.1)
    assert len(load(text_file, held_out=None).evaluation) == everything.train_blocks // 10
    # Of whole blocks: the text ends within one.
    monkeypatch.setattr(corpus, "_ENOUGH", 3 * 32 + 16)
    assert len(load(text_file, held_out=None).evaluation) == 3
    # Who names a share gets it.
    assert len(load(text_file, held_out=0.1).evaluation) == everything.train_blocks // 10


def test_eval_data_leaves_training_whole(text_file, load):
    whole = load(text_file)
    split = load(text_file, held_out=0.01, eval_data=(text_file,))
    assert rows(split.parts[0]) == rows(whole.parts[0])
    assert split.evaluation.tolist() == rows(whole.parts[0])
    assert split.evaluated_on == "eval_data"
    assert split.sha256 == whole.sha256


def test_mixture_has_a_part_for_each_source(tmp_path, text_file, load):
    (tmp_path / "small.txt").write_text("x" * 99)
    corpus = load(f"{text_file}=3", f"{tmp_path / 'small.txt'}=1", held_out=0.25)
    assert corpus.shares == (0.75, 0.25)
    assert corpus.names == ("words.txt", "small.txt")
    assert [len(part) for part in corpus.parts][1] == 3
    # Of each source its own share: 100 tokens are 3 blocks, of which a quarter is none.
    assert len(corpus.evaluation) == len(load(text_file, held_out=0.25).evaluation)


def test_identity_is_that_of_the_tokens(tmp_path, text_file, load):
    copy = tmp_path / "copy.jsonl"
    documents = text_file.read_text().split("\n\n\n")
    copy.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    assert load(copy).sha256 == load(text_file).sha256 == load(text_file, cache=False).sha256
    documents[3] += "."
    copy.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    assert load(copy).sha256 != load(text_file).sha256
    assert load(text_file, copy).sha256 != load(copy, text_file).sha256


def test_evaluation_is_held_in_32_bits(text_file, load):
    assert load(text_file, held_out=0.1).evaluation.dtype == torch.int32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot be read: No such file"),
        ("empty.txt", b"\n\n\n \n", "holds no text"),
        ("short.txt", b"too short", "data: 10 tokens are less than one block of context=32"),
        ("table.csv", b"a,b", "unknown kind of file; use .txt"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_errors(tmp_path: Path, load, name, content, message, cache):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        load(path, cache=cache)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or "data:" in str(caught.value)


def test_short_source_of_a_mixture_is_named(tmp_path, text_file, load):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(RunError, match=r"data: .*short\.txt: 6 tokens are less than one block"):
        load(f"{text_file}=1", f"{tmp_path / 'short.txt'}=1")


def test_nothing_left_to_train_on(tmp_path, load):
    path = tmp_path / "one_block.txt"
    path.write_text("x" * 40)
    with pytest.raises(RunError, match="leaves none to train on"):
        load(path, held_out=0.5)


def test_tokenizer_without_eos(text_file, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(RunError, match="its tokenizer has no EOS token"):
        load_corpus((DataSource(place=str(text_file)),), bare, context=32, held_out=0)
