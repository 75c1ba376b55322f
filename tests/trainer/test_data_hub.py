"""Data sets through `datasets`, from folders on disk: streamed, cut at the budget, and bad input.

A hub id differs in where its commit and its rows come from alone.
"""

import dataclasses
import io
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import datasets
import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console

from cast_serve.trainer import train
from cast_serve.trainer.data import corpus, hub, load_corpus, tokens
from cast_serve.trainer.data.files import Piece
from cast_serve.trainer.data.hub import rows
from cast_serve.trainer.data_source import DataSource, HubName
from cast_serve.trainer.errors import RunError

datasets.disable_progress_bars()


def hub_name(folder, *, config=None, split="train"):
    return HubName(name=str(folder), config=config, split=split)


def read(folder, text_key="text", **parts):
    return [piece.text for piece in rows(hub_name(folder, **parts), None, text_key=text_key)]


@pytest.fixture
def folder(tmp_path):
    """Ten files of 100 documents of about 50 characters."""
    path = tmp_path / "set"
    (path / "data").mkdir(parents=True)
    for number in range(10):
        lines = [json.dumps({"text": f"{number} {row} " + "x" * 44}) for row in range(100)]
        (path / f"data/train-{number:02}.jsonl").write_text("\n".join(lines))
    (path / "data/test.jsonl").write_text('{"text": "for the test"}')
    return path


@pytest.fixture
def load(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load(*places, **options):
        sources = tuple(DataSource.parse(place) for place in places)
        return load_corpus(sources, tokenizer, context=32, **({"held_out": 0.0} | options))

    return load


def test_rows_of_a_folder_in_order(folder):
    found = read(folder)
    assert len(found) == 1000
    assert found[0].startswith("0 0 ") and found[-1].startswith("9 99 ")
    assert read(folder, split="test") == ["for the test"]


@pytest.mark.parametrize("several", [True, False])
def test_rows_of_a_saved_data_set(tmp_path, several):
    saved = Dataset.from_dict({"body": ["one", " ", "two"], "number": [1, 2, 3]})
    (DatasetDict({"train": saved}) if several else saved).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", "body") == ["one", "two"]
    if several:
        with pytest.raises(RunError, match="no split test; has train"):
            read(tmp_path / "saved", "body", split="test")


def test_budget_reads_no_more_than_it_needs(folder, load, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH", 16)
    # Damage in the last file is only met by who reads it.
    (folder / "data/train-09.jsonl").write_text("{")
    corpus = load(f"hub:{folder}", budget=5000)
    assert 5000 <= corpus.train_blocks * 32 <= 5000 + 64
    again = load(f"hub:{folder}", budget=2000)
    assert again.train_blocks < corpus.train_blocks
    assert again.parts[0][3].tolist() == corpus.parts[0][3].tolist()
    with pytest.raises(RunError, match="data: hub:"):
        load(f"hub:{folder}")


def test_budget_counts_the_held_out_share_and_the_weight(folder, load, text_file):
    corpus = load(f"hub:{folder}=1", f"{text_file}=3", budget=20000, held_out=0.5)
    assert 20000 / 4 <= len(corpus.parts[0]) * 32 <= 20000 / 4 + 3 * 32
    assert corpus.names == ("hub:set", text_file.name)


def test_known_tokens_are_not_read_again(folder, load, monkeypatch):
    first = load(f"hub:{folder}", budget=5000)

    def fail(*_, **__):
        raise AssertionError("the data set was read")
        yield

    monkeypatch.setattr(corpus, "rows", fail)
    assert load(f"hub:{folder}", budget=5000).sha256 == first.sha256
    assert load(f"hub:{folder}", budget=3000).sha256 != first.sha256


def test_errors(folder):
    with pytest.raises(RunError, match='no column "body"; set text_key to one of text'):
        read(folder, "body")
    with pytest.raises(RunError, match=r"data: hub:.*Bad split: valid"):
        read(folder, split="valid")
    with pytest.raises(RunError, match=r"data: hub:.*BuilderConfig 'other' not found"):
        read(folder, config="other")
    (folder / "data/test.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(RunError, match='row 2 has no string: "text"'):
        read(folder, split="test")


def test_a_data_set_that_is_a_program(load, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/set.py").write_text("import datasets\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"hub:\./set: .* found set\.py; give .* as files"):
        load("hub:./set")


def link_more(place, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/train-more.jsonl").write_text('{"text": "more"}\n')
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")


def test_linked_folder_is_not_left_out(folder, tmp_path):
    link_more(folder / "data/more", tmp_path)
    with pytest.raises(RunError, match=r"set/data/more is a link, and datasets reads no"):
        read(folder)


@pytest.mark.parametrize("place", ["data/.more", ".cache/more", "__pycache__/more"])
def test_hidden_links_are_nobodys_rows(folder, tmp_path, place):
    link_more(folder / place, tmp_path)
    assert len(read(folder)) == 1000


def test_rows_say_what_to_install(folder, monkeypatch):
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        RunError, match=r"needs datasets; install it: pip install 'cast-serve\[train"
    ):
        read(folder)


def test_absent_folder(load):
    with pytest.raises(RunError, match=r"hub:.*absent: no such folder"):
        load("hub:./absent")


@pytest.mark.slow
def test_hub_that_cannot_be_reached(llama_dir, tmp_path):
    command = [sys.executable, "-m", "cast_serve.trainer.main", "--model", str(llama_dir)]
    command += ["--data", "hub:org/name:config@train", "--output", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("cast-train: error: data: hub:org/name: ")
    assert "local copy as hub:./folder" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def endpoint(monkeypatch):
    """A hub that knows one data set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/api/datasets/org/name"
            sha = self.server.sha
            body = json.dumps({"id": "org/name", "sha": sha} if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sha = "abc"
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_commit_last_seen_serves_where_the_hub_cannot_be_reached(
    endpoint, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known, unknown = (HubName(name=n, config=None, split="train") for n in ("org/name", "org/no"))
    assert hub.revision(known) == "abc"
    with pytest.raises(RunError, match=r"data: hub:org/no: .*404"):
        hub.revision(unknown)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.revision(known) == "abc"
    assert "taking commit abc, last seen" in caplog.text
    with pytest.raises(RunError, match="data: hub:org/name: "):
        hub.revision(known, cache=False)


@pytest.fixture
def commits_read(monkeypatch):
    """Commits whose rows were read; each has its own text."""
    read = []

    def rows_of(hub, commit, *, text_key):
        read.append(commit)
        for number in range(200):
            yield Piece(f"row {number} of {commit}", ends=True)

    monkeypatch.setattr(corpus, "rows", rows_of)
    return read


@pytest.mark.parametrize("cache", [True, False])
def test_a_run_resumes_at_the_commit_it_started_with(
    endpoint, make_config, monkeypatch, tmp_path, commits_read, cache
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = make_config(
        data=(DataSource.parse("hub:org/name"),),
        steps=2,
        allow_short_travel=True,
        token_cache=cache,
    )
    train.run(config, Console(quiet=True))
    record = json.loads((config.run_dir / "run.json").read_text())
    assert record["fixed"]["hub_commits"] == {"org/name": "abc"}
    output = json.loads((config.output / "cast.json").read_text())
    assert output["data"]["hub_commits"] == {"org/name": "abc"}

    endpoint.sha = "def"
    said = io.StringIO()
    resumed = dataclasses.replace(config, resume=True)
    train.run(resumed, Console(file=said, width=1000))
    assert "hub:org/name is read at commit abc, as when the run started" in said.getvalue()
    # Nor is the hub asked.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    train.run(resumed, Console(quiet=True))
    assert set(commits_read) == {"abc"}


def test_a_run_that_recorded_no_commit_takes_the_newest(
    endpoint, make_config, monkeypatch, tmp_path, commits_read
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = make_config(data=(DataSource.parse("hub:org/name"),), steps=2, allow_short_travel=True)
    train.run(config, Console(quiet=True))
    path = config.run_dir / "run.json"
    record = json.loads(path.read_text())
    del record["fixed"]["hub_commits"]
    path.write_text(json.dumps(record))
    train.run(dataclasses.replace(config, resume=True), Console(quiet=True))
    endpoint.sha = "def"
    with pytest.raises(RunError, match="no longer give the tokens"):
        train.run(dataclasses.replace(config, resume=True), Console(quiet=True))


def test_evaluation_data_and_folders_and_commits(endpoint, folder):
    sources = tuple(map(DataSource.parse, ("hub:org/name:en", f"hub:{folder}", "a.txt")))
    assert hub.hub_commits(sources, known={}, cache=False) == {"org/name": "abc"}
    endpoint.sha = "def"
    assert hub.hub_commits(sources, known={"org/name": "abc"}, cache=False) == {"org/name": "abc"}
    with pytest.raises(RunError, match="hub:org/no: "):
        hub.hub_commits((DataSource.parse("hub:org/no"),), known={}, cache=False)
