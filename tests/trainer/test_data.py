"""Files to blocks: what a document is, what a block holds, the order of a run, bad input."""

import json
import lzma
from pathlib import Path

import pytest
import torch

from cast_serve.trainer.data import BlockStream, load_corpus, to_blocks, tokenize
from cast_serve.trainer.errors import RunError


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.jsonl.xz"])
def test_tokenize_documents_end_with_eos(tmp_path, tokenizer, name):
    text = "one\n\ntwo\n\n\nthree"
    if "jsonl" in name:
        text = "".join(json.dumps({"text": t}) + "\n" for t in ("one\n\ntwo", "three"))
    raw = text.encode()
    path = tmp_path / name
    path.write_bytes(lzma.compress(raw) if name.endswith(".xz") else raw)
    expected = [*ids(tokenizer, "one\n\ntwo"), 0, *ids(tokenizer, "three"), 0]
    assert tokenize((path,), tokenizer).tolist() == expected


def test_to_blocks_drops_the_rest():
    assert to_blocks(torch.arange(11), context=4, key="data").tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_load_corpus_holds_out_evenly(text_file, tokenizer):
    everything = load_corpus((text_file,), tokenizer, context=32, held_out=0)
    split = load_corpus((text_file,), tokenizer, context=32, held_out=0.1)
    whole = [tuple(block) for block in everything.train.tolist()]
    kept = {whole.index(tuple(block)) for block in split.evaluation.tolist()}
    assert len(split.train) + len(split.evaluation) == len(whole)
    assert sorted(kept)[:3] == [9, 19, 29]
    assert split.evaluated_on == "held-out"
    assert everything.evaluated_on == "training sample"


def test_load_corpus_eval_data_leaves_training_whole(text_file, tokenizer):
    whole = load_corpus((text_file,), tokenizer, context=32, held_out=0)
    split = load_corpus((text_file,), tokenizer, context=32, held_out=0.01, eval_files=(text_file,))
    assert torch.equal(split.train, whole.train)
    assert torch.equal(split.evaluation, whole.train)


def test_block_stream_is_a_permutation_each_epoch():
    blocks = torch.arange(10, dtype=torch.int32).view(10, 1)
    stream = BlockStream(blocks, length=20, seed=3)
    order = [stream[i]["input_ids"].item() for i in range(20)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_block_stream_depends_on_seed_and_index_alone():
    blocks = torch.arange(10, dtype=torch.int32).view(10, 1)
    first, again = (BlockStream(blocks, length=20, seed=3) for _ in range(2))
    read = [first[i]["input_ids"].item() for i in range(20)]
    assert [again[i]["input_ids"].item() for i in reversed(range(20))] == read[::-1]
    other = BlockStream(blocks, length=20, seed=4)
    assert [other[i]["input_ids"].item() for i in range(20)] != read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot be read: No such file"),
        ("empty.txt", b"\n\n\n \n", "holds no text"),
        ("short.txt", b"too short", "10 tokens are less than one block of context=32"),
        ("table.csv", b"a,b", "unknown kind of file; use .txt"),
        ("latin.txt", b"\xe9t\xe9 " * 50, "not UTF-8 at byte 0"),
        ("cut.txt.xz", lzma.compress(b"words " * 50)[:-8], "not a whole xz file"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("key.jsonl", b'{"content": "a"}\n', "line 1 is no object with a string"),
        ("list.jsonl", b'["text"]\n', "line 1 is no object with a string"),
        ("none.jsonl", b"", "holds no text"),
    ],
)
def test_load_corpus_errors(tmp_path: Path, tokenizer, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        load_corpus((path,), tokenizer, context=32, held_out=0)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or "data:" in str(caught.value)


def test_load_corpus_folder_is_an_error(tmp_path, tokenizer):
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        load_corpus((folder,), tokenizer, context=32, held_out=0)


def test_load_corpus_nothing_left_to_train_on(tmp_path, tokenizer):
    path = tmp_path / "one_block.txt"
    path.write_text("x" * 40)
    with pytest.raises(RunError, match="leaves none to train on"):
        load_corpus((path,), tokenizer, context=32, held_out=0.5)
