"""Resuming a run: bit-exact after kill -9 in a step and in a save, refused when it is another run.

The model is GPT-2 with dropout, so the random state has to come back as well.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cast_serve.trainer import train
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.run_dir import checkpoints

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
import torch
from cast_serve.trainer import data
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
    save = torch.save
    def torch_save(value, path, *rest, **options):
        if f"checkpoint-{at}" in str(path) and str(path).endswith("optimizer.pt"):
            open(path, "wb").write(b"half")
            die()
        save(value, path, *rest, **options)
    torch.save = torch_save
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


def optimizer_state(run_dir: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    return torch.load(run_dir / f"checkpoint-{step}" / "optimizer.pt")["state"]


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
    assert (run_dir / ".staging/checkpoint-30/optimizer.pt").read_bytes() == b"half"
    assert [path.name for path in checkpoints(run_dir)][-1] == "checkpoint-20"

    done = drive("nowhere", 0, [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert "resuming after step 20 of 40" in done.stdout

    expected = load_file(straight / "model.safetensors")
    found = load_file(broken / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected_state = optimizer_state(tmp_path / "straight.run", STEPS)
    found_state = optimizer_state(run_dir, STEPS)
    assert expected_state.keys() == found_state.keys()
    masks = 0
    for key, state in expected_state.items():
        assert state.keys() == found_state[key].keys()
        assert all(torch.equal(state[name], found_state[key][name]) for name in state)
        masks += "mask" in state
    assert masks == 2 * 4


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


def test_resume_with_other_text(finished, text_file, tmp_path):
    text = text_file.read_text()
    try:
        text_file.write_text(text.replace("whale", "squid"))
        with pytest.raises(RunError, match="no longer give the tokens"):
            train.run(dataclasses.replace(finished, resume=True), QUIET)
    finally:
        text_file.write_text(text)


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
