"""The loss inside of the head, under DDP and FSDP2: two processes are one with the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_loss import WORLD, batch, gradients

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, bool], dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("meet")
    processes = [
        subprocess.Popen(
            [sys.executable, SUPPORT / "sharded_loss.py", str(rank), folder],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-4000:]
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(found, how, tied):
    expected = gradients("alone", batch(), tied=tied)
    assert found[how, tied].keys() == expected.keys()
    assert expected[""][2] > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(found[how, tied][name], value, msg=name)
