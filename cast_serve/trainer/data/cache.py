"""Tokenised sources on disk, <user cache>/tokens, so that a text is tokenised once.

    KEY/tokens.npy    the tokens
    KEY/written.json  their number, whether the source holds more, and the chunks' digests
    commits/          of data sets of the hub, as last seen
    digests/          SHA-256 of source files by path, size and time of change

KEY is made of the content of the source's files (or the data set's commit), the tokenizer,
the versions of what tokenises, and the options of reading. An entry is renamed into place when it
is whole; one that is damaged is made again. All of it can be deleted.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from cast_serve.kernels.user_cache import user_cache, write_whole
from cast_serve.trainer.data.tokens import CHUNK, ChunkDigest, Written
from cast_serve.trainer.errors import RunError

logger = logging.getLogger(__name__)

# Chunks that are read to see whether an entry is whole: all of a small one, 16 of a large one.
_CHECKED = 16
# A file changed this recently may change again within the resolution of its time stamp.
_SETTLED_NS = 2_000_000_000

Write = Callable[[IO[bytes]], Written]


class DamagedError(Exception):
    """An entry does not hold what it says."""


def tokens_folder() -> Path:
    return user_cache() / "tokens"


def cached(key: str, write: Write, *, limit: int | None) -> tuple[np.ndarray, Written]:
    """The tokens of `key`, memory-mapped; `write` makes them where they are not cached.

    An entry with fewer than `limit` tokens (None: all) of a longer source is made again.

    Raises:
        RunError: from `write`; the cache cannot be written.
    """
    folder = tokens_folder()
    with _writing():
        folder.mkdir(parents=True, exist_ok=True)
        # Processes that start together tokenise once. A lock goes with the process that held it.
        with FileLock(folder / f"{key}.lock"):
            found = _usable(folder / key, limit)
            if found is None:
                _make(folder, key, write)
                found = _load(folder / key)
    return found


def uncached(write: Write) -> tuple[np.ndarray, Written]:
    """The same in a temporary file, which goes with the process.

    Raises:
        RunError: from `write`; there is no room for it.
    """
    try:
        with tempfile.TemporaryFile() as file:
            written = write(file)
            return _mapped(file), written
    except OSError as error:
        raise RunError(
            f"data: cannot write tokens to {tempfile.gettempdir()}: {error.strerror or error}; "
            "make room, or set TMPDIR"
        ) from error


def key_of_source(parts: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a source's tokens depend on; `parts` name its content and how it is read."""
    import tokenizers
    import transformers

    whole = hashlib.sha256()
    for part in (*parts, f"transformers {transformers.__version__}", tokenizers.__version__):
        whole.update(f"{len(part)}:{part}".encode())
    for raw in _tokenizer_content(tokenizer):
        whole.update(f"{len(raw)}:".encode() + raw)
    return whole.hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> Iterator[bytes]:
    yield f"eos {tokenizer.eos_token_id}".encode()
    if tokenizer.is_fast:
        # Not its files: they also say where it was loaded from. Truncation and padding are what the
        # last call has set.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        yield json.dumps(state | {"truncation": None, "padding": None}).encode()
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield path.name.encode()
            yield path.read_bytes()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; read again only where its size or times have changed.

    Raises:
        RunError: it cannot be read; the cache cannot be written.
    """
    path = path.resolve()
    note = tokens_folder() / "digests" / hashlib.sha256(str(path).encode()).hexdigest()
    try:
        before = path.stat()
        stamp = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
        known = _noted(note, stamp)
        if known is not None:
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS:
        with _writing():
            write_whole(note, json.dumps({"stamp": stamp, "sha256": digest}).encode())
    return digest


def note_commit(name: str, commit: str) -> None:
    """Keep the commit of a data set of the hub.

    Raises:
        RunError: the cache cannot be written.
    """
    with _writing():
        write_whole(_commit_note(name), commit.encode())


def noted_commit(name: str) -> str | None:
    """The commit last noted for a data set of the hub."""
    try:
        return _commit_note(name).read_text()
    except OSError:
        return None


def _commit_note(name: str) -> Path:
    return tokens_folder() / "commits" / hashlib.sha256(name.encode()).hexdigest()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"data: cannot write the token cache {tokens_folder()}: {error.strerror or error}; "
            "make room, set XDG_CACHE_HOME, or start with --no-token-cache"
        ) from error


def _noted(note: Path, stamp: list[int]) -> str | None:
    try:
        record = json.loads(note.read_text())
        return str(record["sha256"]) if record["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _usable(entry: Path, limit: int | None) -> tuple[np.ndarray, Written] | None:
    if not entry.exists():
        return None
    try:
        tokens, written = _load(entry)
        _check(tokens, written)
    except (OSError, ValueError, KeyError, TypeError, DamagedError) as error:
        logger.warning("token cache %s is damaged (%s); tokenising again", entry, error)
        return None
    if not written.complete and (limit is None or written.tokens < limit):
        return None
    return tokens, written


def _load(entry: Path) -> tuple[np.ndarray, Written]:
    record = json.loads((entry / "written.json").read_text())
    written = Written(
        tokens=record["tokens"], complete=record["complete"], digests=tuple(record["digests"])
    )
    with (entry / "tokens.npy").open("rb") as file:
        return _mapped(file), written


def _mapped(file: IO[bytes]) -> np.ndarray:
    """The one-dimensional array of an open .npy file."""
    file.seek(0)
    np.lib.format.read_magic(file)
    (count,), _, dtype = np.lib.format.read_array_header_1_0(file)
    # np.memmap takes open files, np.load(mmap_mode=) only paths: a temporary file has none.
    return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=(count,))


def _check(tokens: np.ndarray, written: Written) -> None:
    """Raise DamagedError where the tokens are not those that were written.

    All chunks of a small entry are read; of a large one _CHECKED, evenly spread, the last included.
    """
    chunks = -(-written.tokens // CHUNK)
    if len(tokens) != written.tokens or len(written.digests) != chunks:
        raise DamagedError(f"{len(tokens)} tokens, {written.tokens} expected")
    for place in np.unique(np.linspace(0, chunks - 1, min(chunks, _CHECKED)).round().astype(int)):
        digest = ChunkDigest()
        digest.update(tokens[place * CHUNK : (place + 1) * CHUNK])
        if digest.finish() != (written.digests[place],):
            raise DamagedError(f"chunk {place} has other tokens")


def _make(folder: Path, key: str, write: Write) -> None:
    with _staging(folder, key) as staging:
        entry = staging / "entry"
        entry.mkdir()
        with (entry / "tokens.npy").open("w+b") as file:
            written = write(file)
        (entry / "written.json").write_text(json.dumps(asdict(written)))
        # A folder is not renamed over one that holds files; who mapped the old one keeps it.
        if (folder / key).exists():
            (folder / key).rename(staging / "old")
        entry.rename(folder / key)


@contextmanager
def _staging(folder: Path, key: str) -> Iterator[Path]:
    """A fresh folder; those that killed processes left for the same key go first."""
    for left in folder.glob(f".{key}.*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{key}.", dir=folder) as staging:
        yield Path(staging)
