"""Peak memory of streaming a 200 MB checkpoint, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, SIZE = 24, 2048
CONFIG = (
    '{"quantization_config": {"quant_method": "cast", "format": "%s", "sparsity": "2:4",'
    ' "version": 1}}'
)

# VmHWM and not ru_maxrss: that one also remembers the pytest process it was forked from.
SCRIPT = """
import sys
from pathlib import Path
import torch
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.stream import stream

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

big, small = map(Path, sys.argv[1:3])
dtype = torch.bfloat16
# What libraries allocate on first use is not the loader's.
list(stream(Checkpoint.open(small), dtype=dtype))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
kept = list(stream(Checkpoint.open(big), dtype=dtype))
print(status("VmHWM") - before, sum(p.values.nbytes + p.bitmask.nbytes for p in kept))
"""


def write(folder: Path, stored: str, layers: int, size: int) -> int:
    """A checkpoint whose layers are all the same weight; returns the bytes of one."""
    weight = torch.randn(size, size // 4, 4)
    tensors = {}
    if stored == "dense":
        weight[..., 1::2] = 0.0
        weight = weight.bfloat16()
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.up_proj"
        tensors[name + ".weight"] = weight.reshape(size, size).clone()
        if stored == "training":
            tensors[name + ".cast_scale"] = torch.ones(size, 2)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(CONFIG % stored)
    return weight.nbytes


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs of Linux"
)
@pytest.mark.parametrize(("stored", "layers"), [("dense", LAYERS), ("training", LAYERS // 2)])
def test_stream_peak_memory(tmp_path: Path, stored: str, layers: int) -> None:
    one_layer = write(tmp_path / "big", stored, layers, SIZE)
    assert layers * one_layer > 200e6
    write(tmp_path / "small", stored, 1, 512)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "big", tmp_path / "small"],
        capture_output=True,
        text=True,
        check=True,
        # One thread: no arena of the allocator for each, and no waiting for busy neighbours.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak, packed = map(int, run.stdout.split())
    # The packed model is there, so the measurement is not of nothing.
    assert peak > packed
    assert peak <= packed + one_layer + 24e6
