"""Resuming a run: bit-exact after kill -9 in a step, in a save and anywhere; refused elsewhere.

One that another process is writing is refused, too, resumed or not.

The model is GPT-2 with dropout, so random numbers have to come back as well.
"""

import dataclasses
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from parallel_runs import ended_well, start
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from training_state import read_checkpoint

from cast_serve.trainer import train
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.main import main
from cast_serve.trainer.run_dir import checkpoints, held

STEPS = 40
QUIET = Console(quiet=True)
SETTINGS = {
    "context": 16,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "steps": STEPS,
    "lr": 1e-3,
    "lambda": 1e-4,
    "save_steps": 10,
    "device": "cpu",
    "export": "training",
}

# Kills its own process at a given place: no race with a parent that would have to time it.
DRIVER = """
import os, signal, sys
from cast_serve.trainer import checkpoint, data
from cast_serve.trainer.main import main

where, at, *flags = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "step":
    read = data.BlockStream.__getitem__
    def getitem(self, index):
        if index == int(at):
            die()
        return read(self, index)
    data.BlockStream.__getitem__ = getitem
if where == "save":
    publish = checkpoint._publish
    def half_written(staging, target, *rest):
        if target.name == f"checkpoint-{at}":
            (staging / "__0_0.distcp").write_bytes(b"half")
            die()
        publish(staging, target, *rest)
    checkpoint._publish = half_written
sys.exit(main(flags))
"""


def flags(model: Path, text: Path, output: Path) -> list[str]:
    places = ["--model", str(model), "--data", str(text), "--output", str(output)]
    settings = [(f"--{key.replace('_', '-')}", str(value)) for key, value in SETTINGS.items()]
    return [*places, "--allow-short-travel", *(part for pair in settings for part in pair)]


def drive(where: str, at: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, where, str(at), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_same(ours: Path, theirs: Path) -> None:
    """Two finished runs have the same weights and the same state, bit for bit."""
    expected, found = (load_file(one / "model.safetensors") for one in (theirs, ours))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = [checkpoints(one.with_name(f"{one.name}.run"))[-1] for one in (theirs, ours)]
    expected, found = map(read_checkpoint, last)
    assert expected.keys() == found.keys()
    assert sum(name.endswith(".mask") for name in expected) == 2 * 4
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if torch.is_tensor(value) else value == found[name]
        assert same, name


@pytest.mark.slow
def test_resume_after_kill_is_bit_exact(gpt2_dir, text_file, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    done = drive("nowhere", 0, flags(gpt2_dir, text_file, straight))
    assert done.returncode == 0, done.stderr

    arguments = flags(gpt2_dir, text_file, broken)
    run_dir = tmp_path / "broken.run"
    # Sequences of step 27: 4 a step.
    killed = drive("step", 26 * 4, arguments)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(run_dir)] == ["checkpoint-10", "checkpoint-20"]

    killed = drive("save", 30, [*arguments, "--resume"])
    assert killed.returncode == -signal.SIGKILL
    assert (run_dir / ".staging/__0_0.distcp").read_bytes() == b"half"
    assert [path.name for path in checkpoints(run_dir)][-1] == "checkpoint-20"

    done = drive("nowhere", 0, [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert "resuming after step 20 of 40" in done.stdout

    assert_same(broken, straight)


@pytest.mark.slow
def test_resume_after_kills_at_random(gpt2_dir, text_file, tmp_path):
    """Whatever a process was doing: it is killed five times, after its first figures are logged."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    often = ["--save-steps", "1", "--log-steps", "1"]
    done = drive("nowhere", 0, [*flags(gpt2_dir, text_file, straight), *often])
    assert done.returncode == 0, done.stderr
    draw = random.Random(0)
    arguments = [*flags(gpt2_dir, text_file, broken), *often]
    log = tmp_path / "broken.run" / "log.jsonl"
    for _ in range(5):
        before = log.read_text() if log.exists() else ""
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, "nowhere", "0", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        while (log.read_text() if log.exists() else "") == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.wait()
        if "--resume" not in arguments:
            arguments.append("--resume")
    done = drive("nowhere", 0, arguments)
    assert done.returncode == 0, done.stderr
    assert_same(broken, straight)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "manifest"])
def test_damaged_checkpoint_is_refused(make_config, damage):
    config = make_config(steps=4, allow_short_travel=True, save_steps=2)
    train.run(config, QUIET)
    file = config.run_dir / "checkpoint-4" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    named = "__0_0.distcp"
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        named = "manifest.json"
        (file.parent / named).write_text("{")
    message = rf"checkpoint-4 is damaged: {named}.*; remove it to resume from checkpoint-2"
    with pytest.raises(RunError, match=message):
        train.run(dataclasses.replace(config, resume=True), QUIET)


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(llama_dir, text_file, tmp_path):
    """A file size limit stands for a full disk: the second save fails in the middle of a write."""
    limited = """
import resource, sys
from cast_serve.trainer import checkpoint
from cast_serve.trainer.main import main

save = checkpoint.save
def save_then_limit(*arguments, **options):
    save(*arguments, **options)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoint.save = save_then_limit
sys.exit(main(sys.argv[1:]))
"""
    arguments = [*flags(llama_dir, text_file, tmp_path / "out"), "--log-steps", "40"]
    ended = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    # rich breaks lines.
    said = " ".join(ended.stderr.split())
    assert "checkpoint-20 cannot be written" in said
    assert "checkpoint-10: make room and continue with --resume" in said
    names = {path.name for path in (tmp_path / "out.run").iterdir()}
    assert names == {"run.json", "log.jsonl", "logs", "checkpoint-10"}
    done = drive("nowhere", 0, [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10 of 40" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a step", "when resumed"])
def test_full_disk_while_logging_is_one_line(llama_dir, text_file, tmp_path, moment):
    """TensorBoard writes in a thread of its own, whose errors come later."""
    limited = """
import resource, sys
from cast_serve.trainer import journal
from cast_serve.trainer.main import main

limit, resumed = int(sys.argv[1]), "--resume" in sys.argv
begin = journal.Journal.__init__
def limit_and_begin(self, *arguments, **options):
    if not resumed:
        begin(self, *arguments, **options)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if resumed:
        begin(self, *arguments, **options)
journal.Journal.__init__ = limit_and_begin
sys.exit(main(sys.argv[2:]))
"""
    arguments = [*flags(llama_dir, text_file, tmp_path / "out"), "--log-steps", "1"]
    if moment == "when resumed":
        done = drive("step", 26 * 4, arguments)
        assert done.returncode == -signal.SIGKILL
        arguments.append("--resume")
    ended = subprocess.run(
        [sys.executable, "-c", limited, "3000", *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("cast-train: error: ") == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("cast-train: error: output: cannot write ")
    assert last.endswith("make room and continue with --resume")


@pytest.fixture
def finished(make_config):
    config = make_config(steps=2, allow_short_travel=True, save_steps=1)
    train.run(config, QUIET)
    return config


def test_resume_of_a_finished_run_writes_the_output_again(finished):
    before = load_file(finished.output / "model.safetensors")
    (finished.output / "model.safetensors").unlink()
    train.run(dataclasses.replace(finished, resume=True), QUIET)
    after = load_file(finished.output / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    leftovers = {path.name for path in finished.output.parent.iterdir()}
    assert leftovers == {"out", "out.run"}


def test_resume_before_the_first_checkpoint_starts_over(finished, make_config, tmp_path):
    expected = load_file(finished.output / "model.safetensors")
    again = make_config(
        steps=2, allow_short_travel=True, save_steps=1, output=tmp_path / "again", resume=True
    )
    again.run_dir.mkdir()
    record = (finished.run_dir / "run.json").read_text()
    (again.run_dir / "run.json").write_text(record)
    train.run(again, QUIET)
    found = load_file(again.output / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 3e-3}, "another configuration: lr was 0.002, is 0.003"),
        ({"steps": 3}, "steps was 2, is 3"),
        ({"lambda_": None}, "lambda was 0.0001, is the default"),
        ({"eta": 0.0, "seed": 5}, "eta was 0.333.*; seed was 0, is 5"),
    ],
)
def test_resume_with_another_configuration(finished, changes, message):
    with pytest.raises(RunError, match=message):
        train.run(dataclasses.replace(finished, resume=True, **changes), QUIET)


def test_another_step_is_refused_before_text_is_read(finished, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the text was read")

    monkeypatch.setattr(train, "load_text", fail)
    changed = dataclasses.replace(finished, resume=True, batch_size=3)
    with pytest.raises(RunError, match=r"started with 4 sequences a step, and .* is now 3"):
        train.run(changed, QUIET)
    twice = dataclasses.replace(finished, resume=True, batch_size=2, gradient_accumulation=2)
    with pytest.raises(AssertionError, match="the text was read"):
        train.run(twice, QUIET)


def test_resume_with_other_text(finished, text_file, tmp_path):
    text = text_file.read_text()
    try:
        text_file.write_text(text.replace("whale", "squid"))
        with pytest.raises(RunError, match="no longer give the tokens"):
            train.run(dataclasses.replace(finished, resume=True), QUIET)
    finally:
        text_file.write_text(text)


def test_resume_with_other_text_to_evaluate_on(make_config, tmp_path):
    """cast.json holds the perplexity of the dense model beside that of the sparse one."""
    text = tmp_path / "eval.txt"
    text.write_text("the captain and the whale of the sea and ship " * 12)
    source = (DataSource(place=str(text)),)
    config = make_config(steps=2, eval_data=source, allow_short_travel=True)
    train.run(config, QUIET)
    shutil.rmtree(config.output)
    text.write_text(text.read_text().replace("whale", "squid"))
    with pytest.raises(RunError, match="eval_data no longer gives the tokens"):
        train.run(dataclasses.replace(config, resume=True), QUIET)


@pytest.mark.parametrize("part", ["weights", "config.json"])
def test_resume_from_another_model(make_config, llama_dir, tmp_path, part):
    """It is the teacher, too."""
    shutil.copytree(llama_dir, tmp_path / "dense")
    config = make_config(model=tmp_path / "dense", steps=2, allow_short_travel=True)
    train.run(config, QUIET)
    shutil.rmtree(config.output)
    if part == "weights":
        file = tmp_path / "dense" / "model.safetensors"
        save_file(
            {name: 1.5 * weight for name, weight in load_file(file).items()},
            file,
            metadata={"format": "pt"},
        )
    else:
        file = tmp_path / "dense" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    with pytest.raises(RunError, match=r"weights or config.json of .*dense are not those the run"):
        train.run(dataclasses.replace(config, resume=True), QUIET)


def test_resume_with_a_damaged_log(finished):
    """What it logged is no reason not to go on."""
    log = finished.run_dir / "log.jsonl"
    log.write_bytes(b'\xff\n[1]\n{"loss": 1}\n{"step": "x"}\n' + log.read_bytes())
    shutil.rmtree(finished.output)
    train.run(dataclasses.replace(finished, resume=True), QUIET)
    assert (finished.output / "cast.json").is_file()
    assert [entry["step"] for entry in read_history(finished.run_dir)] == [1, 2]


def test_ctrl_c_in_a_save_is_no_full_disk(make_config, monkeypatch):
    """torch wraps it as it does errors of writing."""
    config = make_config(steps=2, allow_short_travel=True, save_steps=1)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    write = FileSystemWriter.write_data
    saves = iter([write, interrupt])
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *a, **k: next(saves)(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        train.run(config, QUIET)
    assert [path.name for path in checkpoints(config.run_dir)] == ["checkpoint-1"]
    assert not (config.run_dir / ".staging").exists()


def test_resume_needs_no_second_leave_for_short_travel(finished):
    train.run(dataclasses.replace(finished, resume=True, allow_short_travel=False), QUIET)
    assert (finished.output / "cast.json").is_file()


def test_resume_of_nothing(make_config):
    with pytest.raises(RunError, match="holds no run; leave --resume out"):
        train.run(make_config(resume=True), QUIET)


def test_resume_with_damaged_record(finished):
    (finished.run_dir / "run.json").write_text('{"config": {}}')
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        train.run(dataclasses.replace(finished, resume=True), QUIET)


def test_checkpoints_beyond_the_limit_are_removed(make_config):
    config = make_config(steps=5, allow_short_travel=True, save_steps=1, save_limit=2)
    train.run(config, QUIET)
    assert [path.name for path in checkpoints(config.run_dir)] == ["checkpoint-4", "checkpoint-5"]


HOLDER = """
import fcntl, pathlib, sys

path = pathlib.Path(sys.argv[1])
path.parent.mkdir(exist_ok=True)
file = path.open("a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(run_dir: Path) -> Iterator[None]:
    """One that holds the lock of `run_dir` until it is killed, at the end of the block."""
    command = [sys.executable, "-c", HOLDER, str(run_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


def times(folder: Path) -> dict[Path, int]:
    """When what is in a folder was last changed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_has_one_writer(gpt2_dir, text_file, tmp_path, capsys, resumed):
    run_dir = tmp_path / "out.run"
    short = ["--steps", "2", "--save-steps", "1"]
    arguments = [*flags(gpt2_dir, text_file, tmp_path / "out"), *short]
    if resumed:
        assert main(arguments) == 0
        arguments.append("--resume")
    with another_process(run_dir):
        before = times(tmp_path)
        capsys.readouterr()
        assert main(arguments) == 2
        said = f"another cast-train is writing {run_dir}; wait for it, or end it"
        assert capsys.readouterr().err == f"cast-train: error: output: {said}\n"
        assert times(tmp_path) == before
        # Writes nothing.
        assert main([*arguments, "--dry-run"]) == 0
        assert times(tmp_path) == before
    assert main(arguments) == 0
    assert [path.name for path in checkpoints(run_dir)] == ["checkpoint-1", "checkpoint-2"]


def test_a_run_is_held_until_it_ends(make_config, monkeypatch):
    config = make_config(steps=1, allow_short_travel=True)
    finish, refused = train.finish, []

    def finish_and_try(*arguments):
        with pytest.raises(RunError) as error, held(dataclasses.replace(config, resume=True)):
            raise AssertionError("held twice")
        refused.append(str(error.value))
        finish(*arguments)

    monkeypatch.setattr(train, "finish", finish_and_try)
    train.run(config, QUIET)
    assert "another cast-train is writing" in refused[0]
    with held(dataclasses.replace(config, resume=True)):
        assert (config.run_dir / ".lock").exists()
    assert not (config.run_dir / ".lock").exists()


@pytest.mark.parametrize("changes", [{"resume": True}, {"held_out": 0.9999}, {"context": 65}])
def test_a_start_that_is_refused_leaves_nothing(make_config, tmp_path, changes):
    with pytest.raises(RunError):
        train.run(make_config(**changes), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_went_with_its_run_is_taken_again(make_config, monkeypatch):
    """Another run ends between the opening of its lock and the locking."""
    config = make_config()
    lock, calls = fcntl.flock, []

    def after_the_other(file, operation):
        if not calls:
            (config.run_dir / ".lock").unlink()
            config.run_dir.rmdir()
        calls.append(None)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_other)
    with held(config):
        assert len(calls) == 2
        with pytest.raises(RunError, match="another cast-train is writing"), held(config):
            pass


def test_where_nothing_can_be_locked_a_run_goes_on(make_config, monkeypatch, caplog):
    def fail(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    # The token cache has a lock of its own.
    config = make_config(steps=1, allow_short_travel=True, token_cache=False)
    train.run(config, QUIET)
    assert (config.output / "cast.json").is_file()
    assert f"{config.run_dir} cannot be locked (No locks available)" in caplog.text


@pytest.mark.slow
def test_several_processes_hear_of_another_writer(llama_dir, text_file, tmp_path):
    with another_process(tmp_path / "out.run"):
        refused = start(2, llama_dir, text_file, tmp_path / "out")
    assert refused.returncode != 0
    assert refused.stderr.count("cast-train: error: output: another cast-train is writing ") == 1
    ended_well(start(2, llama_dir, text_file, tmp_path / "out"))
