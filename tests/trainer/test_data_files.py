"""Files to documents: what one is, read in pieces of any size; bad input by file and line."""

import gzip
import json
import lzma
import os
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cast_serve.trainer.data import files
from cast_serve.trainer.data.files import Piece, cut, documents, expand
from cast_serve.trainer.errors import RunError

PACK = {
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
}


def read(path, text_key="text"):
    """Whole documents of a file."""
    found, parts = [], []
    for text, ends in documents(path, text_key=text_key):
        parts.append(text)
        if ends:
            found.append("".join(parts))
            parts = []
    assert not parts
    return found


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("packed", ["", ".xz", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".text", ".md", ".jsonl"])
def test_documents(tmp_path, kind, packed):
    text = "one\n\ntwo\n\n\n\n\n\n \n\n\nthree\u2028é\n"
    if kind == ".jsonl":
        rows = ("one\n\ntwo", " \n", "three\u2028é")
        text = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows)
    raw = text.encode()
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](raw) if packed else raw)
    assert read(path) == ["one\n\ntwo", "three\u2028é"]


@pytest.mark.parametrize("packed", ["", ".xz", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_documents_of_windows(tmp_path, monkeypatch, kind, packed):
    """A byte order mark is no text, and a line ends with two characters, cut apart or not."""
    text = "one\n\ntwo\n\n\nthree\n"
    if kind == ".jsonl":
        text = "".join(json.dumps({"text": row}) + "\n" for row in ("one\n\ntwo", "three"))
    raw = "\ufeff".encode() + text.replace("\n", "\r\n").encode()
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](raw) if packed else raw)
    for chunk in (1 << 20, 1, 2, 3):
        monkeypatch.setattr(files, "_READ", chunk)
        assert read(path) == ["one\n\ntwo", "three"]


def test_byte_of_an_error_counts_the_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfab\r\n\xe9t")
    with pytest.raises(RunError, match="not UTF-8 at byte 7"):
        read(path)


@pytest.mark.parametrize("type_", [pyarrow.string(), pyarrow.large_string()])
def test_documents_of_parquet(tmp_path, type_):
    rows = [f"row {i}" for i in range(3000)]
    write_parquet(tmp_path / "a.parquet", number=list(range(3000)), body=pyarrow.array(rows, type_))
    assert read(tmp_path / "a.parquet", "body") == rows


def test_text_key_of_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 5, "body": "found"}')
    assert read(path, "body") == ["found"]


TEXT = st.text(alphabet="\n\n\n aé🙂", max_size=60)


@given(text=TEXT, piece=st.integers(2, 9), chunk=st.integers(1, 7))
def test_documents_do_not_depend_on_how_a_file_is_read(tmp_path_factory, text, piece, chunk):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(text, newline="")
    expected = [part.strip() for part in text.split("\n\n\n") if part.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE", piece)
        patch.setattr(files, "_READ", chunk)
        if not expected:
            with pytest.raises(RunError, match="holds no text"):
                read(path)
            return
        # A document that was cut may keep blanks at its end: where it ends was not known yet.
        assert [document.rstrip() for document in read(path)] == expected
        assert all(len(part.text) <= piece for part in documents(path, text_key="text"))


@given(text=TEXT, piece=st.integers(2, 9))
def test_cut_loses_nothing(text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE", piece)
        pieces = list(cut(text, "here"))
    assert "".join(part.text for part in pieces) == (text if text.strip() else "")
    assert [part.ends for part in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_cut_is_before_a_line_break_or_a_space(monkeypatch):
    monkeypatch.setattr(files, "PIECE", 8)
    assert list(cut("ab\ncd ef gh", "here")) == [
        Piece("ab", ends=False),
        Piece("\ncd ef", ends=False),
        Piece(" gh", ends=True),
    ]


def test_expand_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.jsonl.zst", "sub/c.parquet", ".hidden", ".git/x.txt"):
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in expand(tmp_path)]
    assert found == ["a.jsonl.zst", "b.txt", "sub/c.parquet"]


def below(folder):
    return [str(path.relative_to(folder)) for path in expand(folder)]


def test_expand_follows_links_to_folders(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for name in ("data/b.txt", "elsewhere/a.txt", "elsewhere/sub/c.txt", "elsewhere/.hidden/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (folder / "a").symlink_to(elsewhere)
    (folder / ".b").symlink_to(elsewhere)
    assert below(folder) == ["a/a.txt", "a/sub/c.txt", "b.txt"]


def test_expand_ends_in_a_loop_of_links(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for name in ("data/b.txt", "elsewhere/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (folder / "out").symlink_to(elsewhere)
    (folder / "self").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    assert below(folder) == ["b.txt", "out/a.txt"]


def test_expand_reads_a_folder_once(tmp_path):
    """Of a folder's names the one without a link is kept, wherever it sorts."""
    (tmp_path / "m/n").mkdir(parents=True)
    (tmp_path / "m/n/a.txt").touch()
    for name in ("a", "m/o", "z"):
        (tmp_path / name).symlink_to(tmp_path / "m/n")
    assert below(tmp_path) == ["m/n/a.txt"]


@pytest.mark.parametrize("target", ["absent", "a.txt"])
def test_expand_refuses_a_link_to_nothing(tmp_path, target):
    (tmp_path / "b.txt").touch()
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    with pytest.raises(RunError, match=r"a\.txt: is no file, nor a link to one; move it out"):
        expand(tmp_path)


def test_expand_refuses_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").touch()
    scandir = os.scandir

    def deny(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(RunError, match="closed: cannot be read: Permission denied"):
        expand(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "a.jsonl.zst"])
def test_documents_say_what_to_install(tmp_path, monkeypatch, name):
    (tmp_path / name).touch()
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        RunError, match=r"needs pyarrow; install it: pip install 'cast-serve\[train"
    ):
        read(tmp_path / name)


def test_expand_errors(tmp_path):
    with pytest.raises(RunError, match="the folder holds no files"):
        expand(tmp_path)
    (tmp_path / "table.csv").touch()
    with pytest.raises(RunError, match=r"table\.csv: unknown kind.*move it out"):
        expand(tmp_path)
    with pytest.raises(RunError, match=r"a\.parquet\.gz: unknown kind of file; use \.txt"):
        expand(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("packed", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_damaged_compression(tmp_path, packed, damage, kind):
    raw = b'{"text": "words"}\n' * 5000
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](raw)[:-8] if damage == "cut" else b"no such thing, in any format")
    with pytest.raises(RunError, match=f"a{kind}{packed}: is not a whole {packed[1:]} file"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot be read: No such file"),
        ("absent.txt.zst", None, "cannot be read: No such file"),
        ("absent.parquet", None, "cannot be read: .*No such file"),
        ("empty.txt", b"\n\n\n \n", "holds no text"),
        ("latin.txt", b"ab" * (1 << 20) + b"\xe9t\xe9 ", "not UTF-8 at byte 2097152"),
        ("latin.txt", b"abc\xc3", "not UTF-8 at byte 3"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8 at byte 24"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("key.jsonl", b'{"content": "a"}\n', "line 1 is no object with a string"),
        ("list.jsonl", b'["text"]\n', "line 1 is no object with a string"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("long.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("mark.jsonl", b'\xef\xbb\xbf{"text": "\xe9"}\n', "not UTF-8 at byte 13"),
        ("none.jsonl", b"", "holds no text"),
        ("bad.parquet", b"PAR1 no", "is not a whole parquet file"),
    ],
)
def test_documents_errors(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_parquet_column_errors(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, title=["a", None], number=[1, 2])
    with pytest.raises(RunError, match='no column "text"; set text_key to one of title, number'):
        read(path)
    with pytest.raises(RunError, match='row 2 has no string under "title"'):
        read(path, "title")
    with pytest.raises(RunError, match='row 1 has no string under "number"'):
        read(path, "number")


@pytest.mark.parametrize(
    ("damaged", "says"),
    [(b"zebra", "row 2 is not UTF-8"), (b"title", "a column's name is not UTF-8")],
)
def test_parquet_that_is_not_utf_8(tmp_path, damaged, says):
    path = tmp_path / "a.parquet"
    write_parquet(path, title=["a", "zebra"])
    path.write_bytes(path.read_bytes().replace(damaged, b"\xff" * 5))
    with pytest.raises(RunError, match=says):
        read(path, "title")
