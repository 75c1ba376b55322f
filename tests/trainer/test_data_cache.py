"""The token cache: what is found again, what is made again, races, and what it costs in memory."""

import copy
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cast_serve.kernels.user_cache import user_cache
from cast_serve.trainer.data import cache, load_corpus, tokens
from cast_serve.trainer.data.cache import cached, file_digest
from cast_serve.trainer.data.files import Piece
from cast_serve.trainer.data.tokens import TokenRun, prefix_digest, write_tokens
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def load(text_file, tokenizer):
    def load(place=text_file, **options):
        options = {"context": 32, "held_out": 0.0} | options
        return load_corpus((DataSource(place=str(place)),), tokenizer, **options)

    return load


@pytest.fixture
def calls(monkeypatch):
    """Names of the sources that were tokenised."""
    from cast_serve.trainer.data import corpus

    found = []

    def counted(*arguments, name, **options):
        found.append(name)
        return write_tokens(*arguments, name=name, **options)

    monkeypatch.setattr(corpus, "write_tokens", counted)
    return found


def entries():
    found = [path for path in (user_cache() / "tokens").iterdir() if path.is_dir()]
    return [path for path in found if path.name != "digests"]


def test_text_is_tokenised_once(load, calls, text_file, tmp_path):
    first, again = load(), load(context=16)
    # Where a file lies and what it is called does not matter.
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text_file.read_bytes())
    other = load(moved)
    assert calls == ["words.txt"]
    assert first.sha256 == again.sha256 == other.sha256
    assert first.parts[0][3].tolist() == other.parts[0][3].tolist()
    assert len(entries()) == 1


def test_entry_is_a_numpy_file_of_the_smallest_type(load, tokenizer, text_file):
    load()
    stored = np.load(entries()[0] / "tokens.npy")
    assert stored.dtype == np.uint16
    expected = []
    for document in text_file.read_text().split("\n\n\n"):
        expected += [*tokenizer(document, add_special_tokens=False)["input_ids"], 0]
    assert stored.tolist() == expected


def test_special_tokens_spelled_out_are_text(load, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("says <eos> twice <eos>")
    load(path, context=8)
    ids = np.load(entries()[0] / "tokens.npy").tolist()
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 == len("says <eos> twice <eos>")
    # Elsewhere it is what its caller asked for.
    assert tokenizer("<eos>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_large_vocabulary_takes_32_bits(tmp_path, tokenizer):
    class Large:
        """The tokenizer with one more entry, far out."""

        eos_token_id = 0

        def get_vocab(self):
            return tokenizer.get_vocab() | {"<far>": 1 << 16}

        def __call__(self, texts, **options):
            return {"input_ids": [[1 << 16, 5] for _ in texts]}

    with (tmp_path / "t.npy").open("w+b") as file:
        write_tokens(file, [Piece("a", True), Piece("b", True)], Large(), limit=None, name="a")
    stored = np.load(tmp_path / "t.npy")
    assert stored.dtype == np.int32
    assert stored.tolist() == [1 << 16, 5, 0] * 2


def test_other_content_tokenizer_or_key_is_another_entry(load, calls, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a" * 50, "body": "b" * 50}))
    load(path)
    path.write_text(json.dumps({"text": "c" * 50, "body": "b" * 50}))
    load(path)
    assert chr(load(path, text_key="body").parts[0][0][0] + 32) == "b"
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["cc"])
    shorter = load_corpus((DataSource(place=str(path)),), other, context=16, held_out=0.0)
    assert shorter.parts[0][0][0] == 257
    assert len(calls) == len(entries()) == 4


def test_no_cache_leaves_nothing(load, calls, tmp_path):
    assert load(cache=False).sha256 == load(cache=False).sha256
    assert len(calls) == 2
    assert not (tmp_path / "cache").exists()


def damage_header(entry: Path) -> None:
    raw = (entry / "tokens.npy").read_bytes()
    (entry / "tokens.npy").write_bytes(b"\0" * 128 + raw[128:])


def damage_tokens(entry: Path) -> None:
    raw = bytearray((entry / "tokens.npy").read_bytes())
    raw[len(raw) // 2] ^= 1
    (entry / "tokens.npy").write_bytes(raw)


def damage_length(entry: Path) -> None:
    raw = (entry / "tokens.npy").read_bytes()
    (entry / "tokens.npy").write_bytes(raw[:-100])


def damage_record(entry: Path) -> None:
    (entry / "written.json").write_text('{"tokens": 5')


def damage_count(entry: Path) -> None:
    record = json.loads((entry / "written.json").read_text())
    (entry / "written.json").write_text(json.dumps(record | {"tokens": 7}))


def remove_tokens(entry: Path) -> None:
    (entry / "tokens.npy").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_header, damage_tokens, damage_length, damage_record, damage_count, remove_tokens],
)
def test_damaged_entry_is_made_again(load, calls, caplog, damage):
    expected = load()
    damage(entries()[0])
    with caplog.at_level(logging.WARNING):
        found = load()
    assert "is damaged" in caplog.text and "tokenising again" in caplog.text
    assert len(calls) == 2
    assert found.sha256 == expected.sha256
    assert found.parts[0][5].tolist() == expected.parts[0][5].tolist()
    caplog.clear()
    load()
    assert len(calls) == 2 and not caplog.text
    assert len(entries()) == 1


def test_large_entry_is_checked_by_samples(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tokens, "CHUNK", 8)
    monkeypatch.setattr(cache, "CHUNK", 8)

    def write(file):
        return write_tokens(file, [Piece("abc" * 300, True)], tokenizer, limit=None, name="a")

    found, written = cached("key", write, limit=None)
    assert len(written.digests) == 113
    checked = []
    monkeypatch.setattr(
        cache.ChunkDigest, "update", lambda self, part: checked.append(part.tobytes())
    )
    with pytest.raises(cache.DamagedError):
        cache._check(found, written)
    monkeypatch.undo()
    assert len(checked) == 1


def test_source_that_fails_leaves_no_entry(load, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "%s"}\n{\n' % ("a" * 500))
    with pytest.raises(RunError, match="line 2 is not JSON"):
        load(path)
    assert entries() == []


def test_what_a_killed_process_left_is_removed(load):
    load()
    entry = entries()[0]
    left = entry.parent / f".{entry.name}.left"
    left.mkdir()
    (left / "tokens.npy").write_bytes(b"half")
    damage_tokens(entry)
    load()
    assert entries() == [entry]


def test_cache_that_cannot_be_written(load, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"cannot write the token cache .*--no-token-cache"):
        load()
    assert load(cache=False).train_blocks


def test_limit_is_exact_and_a_longer_entry_serves_it(tokenizer):
    documents = [f"document number {number}" for number in range(100)]
    asked = []

    def write(limit):
        def pieces():
            for text in documents:
                asked.append(text)
                yield Piece(text, ends=True)

        return lambda file: write_tokens(file, pieces(), tokenizer, limit=limit, name="a")

    everything, all_written = cached("all", write(None), limit=None)
    asked.clear()
    few, few_written = cached("key", write(50), limit=50)
    assert len(few) == 50 and few.tolist() == everything[:50].tolist()
    assert not few_written.complete
    many, _ = cached("key", write(300), limit=300)
    assert len(many) == 300
    asked.clear()
    again, again_written = cached("key", write(50), limit=50)
    assert asked == []
    digest = prefix_digest(few, few_written.digests)
    assert prefix_digest(again[:50], again_written.digests) == digest
    assert prefix_digest(everything[:50], all_written.digests) == digest
    whole, written = cached("key", write(10**6), limit=10**6)
    assert written.complete and len(whole) == len(everything)
    asked.clear()
    cached("key", write(10**7), limit=10**7)
    assert asked == []


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 16, 20])
def test_prefix_digest_does_not_depend_on_what_follows(monkeypatch, tmp_path, tokenizer, limit):
    monkeypatch.setattr(tokens, "CHUNK", 8)
    found = []
    for stop in (limit, 24, None):
        with (tmp_path / f"{stop}.npy").open("w+b") as file:
            written = write_tokens(
                file, [Piece("abcde" * 9, True)], tokenizer, limit=stop, name="a"
            )
        found.append(prefix_digest(np.load(tmp_path / f"{stop}.npy")[:limit], written.digests))
    assert len(set(found)) == 1


def test_token_run_reads_across_arrays():
    parts = [np.arange(3, dtype=np.uint16), np.arange(3, 4), np.arange(4, 10, dtype=np.int32)]
    run = TokenRun(parts)
    assert len(run) == 10
    for start in range(10):
        for stop in range(start + 1, 11):
            assert run.read(start, stop).tolist() == list(range(start, stop))


def test_file_digest_is_noted_for_files_that_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = file_digest(path)
    # A file of a moment ago may change within its time stamp's resolution: not noted.
    assert not (user_cache() / "tokens/digests").exists()
    os.utime(path, (1, 1))
    assert file_digest(path) == first
    time.sleep(2.1)
    assert file_digest(path) == first
    note = next((user_cache() / "tokens/digests").iterdir())
    record = json.loads(note.read_text())
    note.write_text(json.dumps(record | {"sha256": "noted"}))
    assert file_digest(path) == "noted"
    # Same size, same time of change as far as `touch` goes: ctime tells.
    path.write_text("two")
    os.utime(path, (1, 1))
    assert file_digest(path) not in ("noted", first)
    note.write_text("{")
    assert file_digest(path) not in ("noted", first)


class Bytes:
    """A tokenizer without threads, which do not live through a fork."""

    eos_token_id = 0

    def get_vocab(self):
        return {chr(byte): byte for byte in range(256)}

    def __call__(self, texts, **options):
        return {"input_ids": [list(text.encode()) for text in texts]}


def test_processes_that_start_together():
    text = [Piece("words " * 1000, True)] * 20

    def process(number, found):
        written = []

        def write(file):
            written.append(number)
            return write_tokens(file, text, Bytes(), limit=None, name="a")

        tokens, _ = cached("key", write, limit=None)
        found.put((len(written), tokens.sum(dtype=np.int64).item()))

    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    processes = [context.Process(target=process, args=(n, found)) for n in range(6)]
    for each in processes:
        each.start()
    answers = [found.get() for _ in processes]
    for each in processes:
        each.join()
    assert {total for _, total in answers} == {20 * sum(("words " * 1000).encode())}
    assert sum(written for written, _ in answers) == 1
    assert len(entries()) == 1


MEMORY = """
import resource, sys
from transformers import AutoTokenizer
from cast_serve.trainer.data import files, load_corpus, tokens
from cast_serve.trainer.data_source import DataSource
files.PIECE, tokens._BATCH_CHARACTERS = 1 << 14, 1 << 16
model, *texts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
peaks = []
for text in texts:
    load_corpus((DataSource(place=text),), tokenizer, context=64, held_out=0.0)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(llama_dir, tmp_path):
    """Of tokens of a byte, each costs some 400 bytes while it is made: 2 GB for all 5 MB."""
    texts = []
    for megabytes in (1, 5):
        # One document without an end, as a dump of a book collection may be.
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes((b"words " * 11 + b"\n") * (megabytes * 1_000_000 // 67))
        texts.append(str(path))
    command = [sys.executable, "-c", MEMORY, str(llama_dir), *texts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = (int(peak) // 1024 for peak in done.stdout.split())
    assert large - small < 100
