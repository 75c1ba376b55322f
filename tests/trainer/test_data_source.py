"""What a data entry may be: flag and YAML, weights, hub names, and the identity of a run."""

from pathlib import Path

import pytest

from cast_serve.trainer.arguments import parse
from cast_serve.trainer.data_source import DataSource, HubName, shares
from cast_serve.trainer.errors import RunError

REQUIRED = ["--model", "m", "--output", "o"]


@pytest.mark.parametrize(
    ("text", "place", "weight"),
    [
        ("books.txt", "books.txt", None),
        ("books.txt=0.3", "books.txt", 0.3),
        ("a=b.txt=3", "a=b.txt", 3.0),
        ("a=b.txt", "a=b.txt", None),
        ("books.txt=", "books.txt=", None),
        ("hub:org/name:config@train=1e-1", "hub:org/name:config@train", 0.1),
    ],
)
def test_parse(text, place, weight):
    assert DataSource.parse(text) == DataSource(place=place, weight=weight)


def test_a_path_that_exists_has_no_weight(tmp_path, monkeypatch):
    """Folders of a partitioned table are called so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2024").mkdir()
    (tmp_path / "year=2024/part.parquet").touch()
    for place in ("year=2024", "year=2024/", "year=2024/part.parquet", "hub:./year=2024"):
        assert DataSource.parse(place) == DataSource(place=place)
        assert DataSource.parse(f"{place}=0.5") == DataSource(place=place, weight=0.5)
    assert DataSource.parse("year=2023") == DataSource(place="year", weight=2023.0)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("hub:org/name", HubName(name="org/name", config=None, split="train")),
        ("hub:org/name@test", HubName(name="org/name", config=None, split="test")),
        ("hub:org/name:en", HubName(name="org/name", config="en", split="train")),
        ("hub:name:en@test", HubName(name="name", config="en", split="test")),
        ("hub:./set@test", HubName(name="./set", config=None, split="test")),
        ("books.txt", None),
    ],
)
def test_hub(place, name):
    assert DataSource(place=place).hub == name


def test_folder_of_a_hub_name():
    assert DataSource(place="hub:./set").hub.folder == Path("set")
    assert DataSource(place="hub:org/name").hub.folder is None


@pytest.mark.parametrize("place", ["hub:", "hub:@train", "hub:a:b:c", "hub:a@b@c"])
def test_no_hub_name(place):
    with pytest.raises(RunError, match=f"{place!r} names no data set; write hub:org/name"):
        DataSource(place=place)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_impossible_weight(weight):
    with pytest.raises(RunError, match=r"the weight of a\.txt is .*; give one above 0"):
        DataSource.parse(f"a.txt={weight}")


def test_names_tell_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["/data/books.txt=2", "shards/", ".", f"hub:{tmp_path}/set:en@test", "hub:org/name:en"]
    assert [DataSource.parse(name).name for name in names] == [
        "books.txt",
        "shards",
        tmp_path.name,
        "hub:set:en@test",
        "hub:org/name:en",
    ]


def test_identity_is_that_of_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other in (
        ("./a.txt", "a.txt"),
        ("a.txt=0.30", f"{tmp_path}/a.txt=0.3"),
        ("hub:./set@test", f"hub:{tmp_path}/set@test"),
    ):
        assert DataSource.parse(one).identity() == DataSource.parse(other).identity()
    assert DataSource.parse("a.txt=1").identity() != DataSource.parse("a.txt").identity()
    assert DataSource.parse("hub:org/name").identity() == "hub:org/name"


def test_shares():
    assert shares((DataSource.parse("a.txt"), DataSource.parse("b.txt"))) is None
    assert shares((DataSource.parse("a.txt=1"), DataSource.parse("b.txt=3"))) == (0.25, 0.75)
    with pytest.raises(RunError, match=r"data: b\.txt has no weight and others have one"):
        shares((DataSource.parse("a.txt=1"), DataSource.parse("b.txt")))


def test_flags_and_both_forms_of_yaml_are_one(tmp_path):
    from_flags = parse([*REQUIRED, "--data", "a.txt=0.3", "hub:org/name:en=0.7"])
    for number, text in enumerate(
        ["[a.txt=0.3, 'hub:org/name:en=0.7']", "{a.txt: 0.3, 'hub:org/name:en': 7e-1}"]
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"data: {text}\n")
        assert parse([*REQUIRED, "--config", str(path)]) == from_flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {a.txt: much}", "data: a.txt: expected a number, got 'much'"),
        ("data: {a.txt: }", "data: a.txt: expected a number, got None"),
        ("data: [a.txt=1, b.txt]", "b.txt has no weight"),
        ("data: a.txt\neval_data: b.txt=1", "eval_data: b.txt has a weight"),
        ("data: [{a.txt: 1}]", "data: expected text, got mapping"),
        ("data: a.txt\nsteps: {a: 1}", "steps: expected a whole number"),
    ],
)
def test_yaml_errors(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RunError, match=message):
        parse([*REQUIRED, "--config", str(path)])
