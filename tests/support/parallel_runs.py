"""Runs of cast-train on one process and on several, and whether they came to the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_state import read_checkpoint

from cast_serve.trainer.journal import read_history
from cast_serve.trainer.run_dir import checkpoints

# Warm-up, refreshes of the mask, logs and a save all happen in these steps.
FLAGS = {
    "context": 32,
    "steps": 24,
    # The decay's sign makes a jump of the order of the rate out of a difference in rounding.
    "lr": 5e-4,
    "lambda": 1e-4,
    "mask-interval": 5,
    "save-steps": 12,
    "log-steps": 1,
    "device": "cpu",
    "export": "training",
}


def start(
    processes: int, model: Path, text: Path, output: Path, *more: str, **changes: object
) -> subprocess.CompletedProcess[str]:
    """cast-train on `processes` processes; four sequences a step together.

    A change to None leaves the flag out.
    """
    flags = FLAGS | {"batch-size": 4 // processes} | changes
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["cast_serve.trainer.main", "--model", str(model), "--data", str(text)]
    command += ["--output", str(output), "--allow-short-travel", *more]
    given = {key: value for key, value in flags.items() if value is not None}
    command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def ended_well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_alike(output: Path, oracle: Path) -> None:
    """Masks are equal, losses and weights but for the order of sums."""
    ours, theirs = (one.with_name(f"{one.name}.run") for one in (output, oracle))
    found, expected = (read_checkpoint(checkpoints(one)[-1]) for one in (ours, theirs))
    assert found.keys() == expected.keys()
    masks = [name for name in expected if name.endswith(".mask")]
    assert len(masks) >= 8
    assert all(torch.equal(found[name], expected[name]) for name in masks)
    for one, other in zip(read_history(ours), read_history(theirs), strict=True):
        for key in ("loss", "ce", "kl", "sparse_weight_ratio"):
            assert one[key] == pytest.approx(other[key], abs=1e-5), key
        assert one.get("mask_flips") == pytest.approx(other.get("mask_flips"), abs=1e-7)
    weights, others = (load_file(one / "model.safetensors") for one in (output, oracle))
    for name, weight in weights.items():
        # Not each: a masked weight near zero may be on its other side.
        assert (weight - others[name]).norm() <= 1e-3 * others[name].norm(), name
