"""Runs on two processes against runs on one: same masks, same losses, same checkpoints (gloo)."""

import json
import re
import shutil
from pathlib import Path

import pytest
from parallel_runs import assert_alike, ended_well, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(llama_dir, text_file, tmp_path_factory) -> Path:
    """A run on one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    ended_well(start(1, llama_dir, text_file, output))
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
def test_two_processes_are_one_with_twice_the_batch(alone, llama_dir, text_file, tmp_path, flags):
    output = tmp_path / "out"
    said = ended_well(start(2, llama_dir, text_file, output, *flags))
    assert_alike(output, alone)
    # The first process alone talks and writes.
    assert len(re.findall("wrote ", said)) == 1
    record = json.loads((output / "cast.json").read_text())
    assert (record["processes"], record["batch"]) == (2, 4)
    assert record["tokens"] == json.loads((alone / "cast.json").read_text())["tokens"]


def test_checkpoint_of_two_shards_resumes_in_one_process(alone, llama_dir, text_file, tmp_path):
    output = tmp_path / "out"
    ended_well(start(2, llama_dir, text_file, output, parallel="fsdp"))
    shutil.rmtree(tmp_path / "out.run" / "checkpoint-24")
    said = ended_well(start(1, llama_dir, text_file, output, "--resume"))
    assert "resuming after step 12 of 24" in said
    assert_alike(output, alone)
    refused = start(1, llama_dir, text_file, output, "--resume", **{"batch-size": 3})
    assert refused.returncode == 2
    assert "4 sequences a step" in refused.stderr


def test_conv1d_is_cut_along_its_outputs(gpt2_dir, text_file, tmp_path):
    """GPT-2: a cut along dimension 0 would go through groups."""
    model = tmp_path / "gpt2"
    shutil.copytree(gpt2_dir, model)
    config = json.loads((model / "config.json").read_text())
    # Each process draws its own dropout.
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    ended_well(start(1, model, text_file, tmp_path / "one"))
    ended_well(start(2, model, text_file, tmp_path / "two", parallel="fsdp"))
    assert_alike(tmp_path / "two", tmp_path / "one")
