"""AdamS's Triton kernels against the reference: interpreted here, on a GPU in test_adams_gpu.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import adams_cases
from adams_cases import MASK_PATTERNS, STEP_CASES


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What adams_cases.py found; a process of its own, since Triton interprets all or nothing."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, adams_cases.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout), "log": done.stderr}


@pytest.mark.parametrize("name", STEP_CASES)
def test_update(interpreted, name):
    assert interpreted["errors"][name] <= 1


@pytest.mark.parametrize("text", MASK_PATTERNS)
@pytest.mark.parametrize("input_dim", [0, 1])
def test_masks_of_special_values(interpreted, text, input_dim):
    assert interpreted["faults"][f"{text} {input_dim}"] == 0


def test_what_the_kernels_do_not_take_is_said_once(interpreted):
    said = "AdamS: a weight takes the slow way: there is no kernel for masks of 3:5"
    assert interpreted["log"].count(said) == 1
