"""Runs on two GPUs (NCCL) against runs on one: same masks, same losses."""

import pytest
import torch
from parallel_runs import assert_alike, ended_well, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def alone(llama_dir, text_file, tmp_path_factory):
    """A run on one GPU."""
    output = tmp_path_factory.mktemp("alone") / "out"
    ended_well(start(1, llama_dir, text_file, output, device="auto"))
    return output


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--parallel", "ddp"], id="ddp"),
        pytest.param(["--parallel", "fsdp"], id="fsdp"),
        pytest.param(["--parallel", "fsdp", "--offload"], id="fsdp offloaded"),
        pytest.param(["--parallel", "fsdp", "--teacher", "offload"], id="fsdp, teacher offloaded"),
    ],
)
def test_two_gpus_are_one_with_twice_the_batch(alone, llama_dir, text_file, tmp_path, flags):
    output = tmp_path / "out"
    ended_well(start(2, llama_dir, text_file, output, *flags, device="auto"))
    assert_alike(output, alone)


def test_compiled_in_bf16(llama_dir, text_file, tmp_path):
    """As users run it; what the compiler fuses rounds otherwise, so that it ends is what counts."""
    flags = ["--parallel", "fsdp", "--compile", "--compute", "bf16", "--gradient-checkpointing"]
    ended_well(start(2, llama_dir, text_file, tmp_path / "out", *flags, device="auto"))
