"""Other weights in an engine that runs: vLLM's `reload_weights`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_worker import GPU_MEMORY, PROMPTS
from safetensors.torch import load_file, save_file

from cast_serve.model_loaders.convert import convert

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Completes the prompts with the first checkpoint, and again after each of the others is loaded.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

prompts, options, first, *others = json.loads(sys.argv[1])
llm = LLM(
    first, enforce_eager=True, max_model_len=128, distributed_executor_backend="uni", **options
)

def complete():
    completions = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        use_tqdm=False,
    )
    return [list(completion.outputs[0].token_ids) for completion in completions]

answers = [complete()]
for other in others:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    # Else what the old weights made of a prompt would be taken for the new ones'.
    llm.reset_prefix_cache()
    answers.append(complete())
print("ANSWERS " + json.dumps(answers))
"""


def answers(checkpoints: list[Path], environment: dict[str, str]) -> list[list[list[int]]]:
    memory = GPU_MEMORY if torch.cuda.is_available() else {}
    job = json.dumps([PROMPTS, memory, *map(str, checkpoints)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, job],
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.rpartition("ANSWERS ")[2])


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="dense"),
        pytest.param({"CAST_SERVE_KERNEL": "reference"}, id="packed"),
    ],
)
def test_reload(stored, tmp_path, environment):
    first, other = tmp_path / "first", tmp_path / "other"
    convert(stored("llama"), first, to="packed")
    shutil.copytree(first, other)
    tensors = load_file(other / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("down_proj.compressed"):
            tensor.neg_()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    before, same, changed, after = answers([first, first, other, first], environment)
    # Of the same kernel: others add in another order.
    (loaded,) = answers([other], environment)
    assert same == before
    assert changed == loaded != before
    assert after == before
