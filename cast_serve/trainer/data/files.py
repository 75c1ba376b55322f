r"""The documents of local files, read piece by piece: a file may be larger than memory.

    .txt .text .md   documents separated by three newlines (two blank lines)
    .jsonl           one object a line, the text under `text_key`
    .parquet         one document a row, the text in the column `text_key`
    + .xz .gz .zst   any of the first four, compressed

Text is UTF-8, with a byte order mark or without. Line ends of .txt are read as newlines, also those
of Windows (\r\n) and of old Macs (\r).

A document longer than PIECE characters comes in several pieces, cut before a line break or a space
where there is one.
"""

import codecs
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cast_serve.trainer.errors import RunError, first_line

_TEXT = (".txt", ".text", ".md")
_PACKED = (".xz", ".gz", ".zst")
# Kinds whose rows have keys, one of which is that of the text.
WITH_KEYS = (".jsonl", ".parquet")
_DOCUMENT_END = "\n\n\n"
_READ = 1 << 20
PIECE = 1 << 20


class Piece(NamedTuple):
    """A document, or a part of a long one; `ends` with its last part."""

    text: str
    ends: bool


def expand(path: Path) -> list[Path]:
    """The file itself, or every file of a folder, also below it, sorted; hidden ones are left out.

    Links are followed; a folder that several names lead to is read once.

    Raises:
        RunError: an empty folder or one that cannot be read, a file of no known kind, a link to
            nothing.
    """
    if path.is_dir():
        files = sorted(_below(path))
        if not files:
            raise RunError(f"{path}: the folder holds no files")
    else:
        files = [path]
    for file in files:
        if kind_of(file) is None:
            known = ", ".join((*_TEXT, ".jsonl"))
            elsewhere = "" if file == path else "; move it out, or name the files to read"
            raise RunError(
                f"{file}: unknown kind of file; use {known}, each also with "
                f"{', '.join(_PACKED)}, or .parquet{elsewhere}"
            )
        if file != path and not file.is_file():
            raise RunError(f"{file}: is no file, nor a link to one; move it out")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """What a folder and those below it hold, in no order, without hidden names."""
    seen: set[str] = set()
    # Links wait until all else is walked: of a folder's names the one without a link is kept.
    waiting = [str(folder)]
    while waiting:
        for here, folders, names in os.walk(waiting.pop(0), onerror=_unreadable):
            place = os.path.realpath(here)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = [os.path.join(here, name) for name in folders]
            waiting += filter(os.path.islink, inside)
            yield from (Path(here, name) for name in names if not name.startswith("."))


def _unreadable(error: OSError) -> NoReturn:
    raise RunError(f"{error.filename}: cannot be read: {_reason(error)}") from error


def suffix(path: Path) -> str:
    """What decides how a file is read: ".txt", ".jsonl.xz"."""
    return "".join(path.suffixes[-2:]) if path.suffix in _PACKED else path.suffix


def documents(path: Path, *, text_key: str) -> Iterator[Piece]:
    """The documents of one file in order, without blank ones.

    Raises:
        RunError: the file cannot be read, is damaged, is not UTF-8, has no `text_key`, or holds no
            text; names the file, and the line, row or byte.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        pieces = _parquet(path, text_key)
    elif kind == ".jsonl":
        pieces = _json_lines(path, text_key)
    else:
        pieces = _plain(path)
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        raise RunError(f"{path}: holds no text")


def cut(text: str, where: str) -> Iterator[Piece]:
    """A whole document in pieces; nothing where it is blank.

    Raises:
        RunError: as require_unicode.
    """
    require_unicode(text, where)
    if not text.strip():
        return
    while len(text) > PIECE:
        end = _end_of_piece(text)
        yield Piece(text[:end], ends=False)
        text = text[end:]
    yield Piece(text, ends=True)


def require_unicode(text: str, where: str) -> None:
    """Raise RunError where `text` holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RunError(f"{where} holds half a surrogate pair") from error


def kind_of(path: Path) -> str | None:
    """The suffix without that of the compression; None where it is unknown."""
    if path.suffix in (".parquet", ".jsonl", *_TEXT):
        return path.suffix
    inner = Path(path.stem).suffix
    return inner if path.suffix in _PACKED and inner in (".jsonl", *_TEXT) else None


def _plain(path: Path) -> Iterator[Piece]:
    rest, inside = "", False
    for text in _decoded(path):
        rest += text
        *whole, rest = rest.split(_DOCUMENT_END)
        for part in whole:
            yield from _last_piece(part, inside)
            inside = False
        while len(rest) > PIECE:
            rest = rest if inside else rest.lstrip()
            end = _end_of_piece(rest)
            if rest[:end]:
                yield Piece(rest[:end], ends=False)
                inside = True
            rest = rest[end:]
    yield from _last_piece(rest, inside)


def _last_piece(text: str, inside: bool) -> Iterator[Piece]:
    text = text.rstrip() if inside else text.strip()
    if text or inside:
        yield Piece(text, ends=True)


def _end_of_piece(text: str) -> int:
    # From 1: a piece that was cut before a line break starts with it.
    for mark in ("\n", " "):
        end = text.rfind(mark, 1, PIECE)
        if end > 0:
            return end
    return min(PIECE, len(text))


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in pieces, its lines ending in a newline alone, without a BOM."""
    bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(bytes_to_text, translate=True)
    done = 0
    with _opened(path) as file:
        while True:
            raw = file.read(_READ)
            done += len(raw)
            try:
                yield decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                # error.object is what was left of the piece before, and this one.
                place = done - len(error.object) + error.start
                raise RunError(f"{path}: is not UTF-8 at byte {place}; convert it") from error
            if not raw:
                return


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line for errors, value) of every line of a .jsonl that is not blank.

    Raises:
        RunError: the file cannot be read, is damaged, is not UTF-8, or a line is not JSON.
    """
    start = 0
    with _opened(path) as file:
        # Lines of bytes end at \n alone: U+2028 and its like are legal inside a JSON string.
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}: line {number}", _json_value(path, number, start, line)
            start += len(line)


def _json_value(path: Path, number: int, start: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # error.object is the line without a BOM.
        place = start + len(line) - len(error.object) + error.start
        raise RunError(f"{path}: is not UTF-8 at byte {place}; convert it") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: line {number} is not JSON: {error.msg}") from error
    # A number of thousands of digits; lists in thousands of lists.
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: line {number} is not JSON that is read: {error}") from error


def _json_lines(path: Path, text_key: str) -> Iterator[Piece]:
    for where, row in json_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            raise RunError(f'{where} is no object with a string under "{text_key}" (text_key)')
        yield from cut(row[text_key], where)


def parquet_columns(path: Path) -> list[str]:
    """The names of a .parquet's columns.

    Raises:
        RunError: the file cannot be read, or is damaged; pyarrow is not installed.
    """
    with _parquet_file(path) as file:
        names: list[str] = file.schema_arrow.names
        return names


def parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row for errors, values by column) of every row of a .parquet.

    Raises:
        RunError: the file cannot be read, is damaged, or a text is not UTF-8; pyarrow is not
            installed.
    """
    number = 0
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in zip(*(batch.column(name) for name in columns), strict=True):
                number += 1
                where = f"{path}: row {number}"
                try:
                    values = [value.as_py() for value in row]
                except UnicodeDecodeError as error:
                    raise RunError(f"{where} is not UTF-8") from error
                yield where, dict(zip(columns, values, strict=True))


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; what fails inside is a RunError."""
    _require_pyarrow(path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            yield file
    except pyarrow.ArrowInvalid as error:
        raise RunError(f"{path}: is not a whole parquet file: {first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: a column's name is not UTF-8") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {_reason(error)}") from error


def _parquet(path: Path, text_key: str) -> Iterator[Piece]:
    columns = parquet_columns(path)
    if text_key not in columns:
        raise RunError(
            f'{path}: has no column "{text_key}"; set text_key to one of {", ".join(columns)}'
        )
    for where, row in parquet_rows(path, [text_key]):
        if not isinstance(row[text_key], str):
            raise RunError(f'{where} has no string under "{text_key}"')
        yield from cut(row[text_key], where)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, without its compression; what fails inside is a RunError."""
    # In the standard library from Python 3.14 on.
    if path.suffix == ".zst":
        _require_pyarrow(path)
    kind = path.suffix[1:]
    damaged: tuple[type[Exception], ...] = (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile)
    try:
        # Opened first whatever it is, so that what keeps it closed is told from what damages it.
        with path.open("rb") as raw:
            if path.suffix == ".zst":
                import pyarrow

                damaged = (*damaged, OSError)
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
                yield io.BufferedReader(stream)
            elif path.suffix == ".xz":
                with lzma.open(raw) as file:
                    yield file
            elif path.suffix == ".gz":
                with gzip.open(raw) as file:
                    yield file
            else:
                yield raw
    except damaged as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise RunError(f"{path}: cannot be read: {_reason(error)}") from error
        raise RunError(f"{path}: is not a whole {kind} file: {first_line(error)}") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {_reason(error)}") from error


def _require_pyarrow(path: Path) -> None:
    if find_spec("pyarrow") is None:
        raise RunError(
            f"{path}: reading it needs pyarrow; install it: pip install 'cast-serve[train]'"
        )


def _reason(error: OSError) -> str:
    return error.strerror.split("\n")[0] if error.strerror else first_line(error)
