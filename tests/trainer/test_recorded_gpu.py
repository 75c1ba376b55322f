"""Passes recorded as a CUDA graph against the same passes one by one."""

from pathlib import Path

import pytest
import torch
from parallel_runs import ended_well, start
from safetensors.torch import load_file

from cast_serve.trainer.journal import read_history

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="fp32"),
        pytest.param(["--gradient-accumulation", "3"], id="accumulation"),
        pytest.param(["--compute", "bf16", "--compile"], id="compiled in bf16"),
        pytest.param(["--teacher", "cached"], id="cached teacher"),
        pytest.param(["--method", "sr-ste"], id="masks in the forward pass"),
    ],
)
def test_a_recording_is_the_pass(llama_dir, text_file, tmp_path, flags):
    assert_alike(llama_dir, text_file, tmp_path, flags)


def test_dropout_is_drawn_anew(gpt2_dir, text_file, tmp_path):
    assert_alike(gpt2_dir, text_file, tmp_path, [])


def assert_alike(model: Path, text: Path, folder: Path, flags: list[str]) -> None:
    """Losses and weights are equal, but for sums by atomic additions."""
    changes: dict[str, object] = {"device": "auto"}
    if "sr-ste" in flags:
        changes |= {"export": "dense", "mask-interval": None}
    plain, recorded = folder / "plain", folder / "recorded"
    ended_well(start(1, model, text, plain, *flags, **changes))
    ended_well(start(1, model, text, recorded, *flags, "--cuda-graph", **changes))
    ours, theirs = (read_history(one.with_name(f"{one.name}.run")) for one in (recorded, plain))
    assert len(ours) == len(theirs) > 20
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
    weights, others = (load_file(one / "model.safetensors") for one in (recorded, plain))
    for name, weight in weights.items():
        difference = (weight.float() - others[name].float()).norm()
        assert difference <= 1e-3 * others[name].float().norm(), name
