"""The loss inside of the head, under DDP and FSDP2: two processes are one with the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_loss import WORLD, batch, gradients

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one(how, tmp_path):
    command = [sys.executable, SUPPORT / "sharded_loss.py"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), tmp_path, how],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(WORLD)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-4000:]
    found = torch.load(tmp_path / "gradients.pt")
    for tied in (False, True):
        expected = gradients("alone", batch(), tied=tied)
        assert found[tied].keys() == expected.keys()
        assert expected[""][2] > 0.01
        for name, value in expected.items():
            torch.testing.assert_close(found[tied][name], value, msg=f"{name} tied={tied}")
