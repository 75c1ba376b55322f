"""Measured plans on disk: used again, never trusted blindly, never half written."""

import json
import logging
import resource
import threading

import pytest
from layers import problem

from cast_serve.kernels import cache
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.user_cache import user_cache

PLAN = Plan.of({8: ("mma_sp", "a"), 8192: ("wgmma_sp", "b")})

pytestmark = pytest.mark.usefixtures("forget_plans", "empty_user_cache")


def test_cache_round_trip(tmp_path):
    assert cache.read(problem()) is None
    cache.write(problem(), PLAN)
    assert cache.read(problem()) == PLAN
    assert cache.read(problem(N=1024)) is None
    path = cache.path_of(problem())
    assert path.parent.parent == tmp_path / "cast-serve" / "plans"
    assert path.parent.name.startswith("nvidia-grasshopper-1-")
    assert path.name == "512x1024-bfloat16.json"


@pytest.mark.parametrize("unusable", [None, "", "relative"])
def test_user_cache_without_xdg_cache_home(monkeypatch, tmp_path, unusable):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if unusable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
    assert user_cache() == tmp_path / ".cache" / "cast-serve"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"plan": 3}', '{"plan": [[3]]}'])
def test_corrupt_cache_file_is_named(text, caplog):
    path = cache.path_of(problem())
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cache.read(problem()) is None
    assert str(path) in caplog.text


@pytest.mark.parametrize("change", [{"gpu": "NVIDIA L4"}, {"N": 16}, {"versions": {}}])
def test_foreign_cache_file_is_named(change, caplog):
    cache.write(problem(), PLAN)
    path = cache.path_of(problem())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with caplog.at_level(logging.WARNING):
        assert cache.read(problem()) is None
    assert "of another GPU, shape or version" in caplog.text


def test_cache_folder_that_cannot_be_made(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        cache.write(problem(), PLAN)
    assert "measured again at every start" in caplog.text


def test_cache_file_without_a_plan(caplog):
    cache.write(problem(), PLAN)
    path = cache.path_of(problem())
    stored = json.loads(path.read_text())
    del stored["plan"]
    path.write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING):
        assert cache.read(problem()) is None
    assert str(path) in caplog.text


def test_cache_that_cannot_be_written_leaves_nothing_behind(caplog):
    path = cache.path_of(problem())
    path.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        cache.write(problem(), PLAN)
    assert "measured again at every start" in caplog.text
    assert list(path.parent.iterdir()) == [path]


def test_cache_on_a_full_disk(caplog):
    """A limit of the size of files is met in the middle of writing, as the end of a disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
            cache.write(problem(), PLAN)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "measured again at every start" in caplog.text
    assert list(cache.path_of(problem()).parent.iterdir()) == []
    assert cache.read(problem()) is None


def test_cache_is_never_half_written():
    """As ranks do: several write the same shape while others read it."""
    cache.write(problem(), PLAN)
    seen = []

    def rank() -> None:
        for _ in range(50):
            cache.write(problem(), PLAN)
            seen.append(cache.read(problem()))

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert seen == [PLAN] * 200
    assert [path.name for path in cache.path_of(problem()).parent.iterdir()] == [
        cache.path_of(problem()).name
    ]
