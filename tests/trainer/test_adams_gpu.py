"""AdamS on a GPU: the kernels against the reference, whole runs, and no wait for the device."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import adams_cases
from adams_cases import MASK_PATTERNS, STEP_CASES, Case
from transformers.pytorch_utils import Conv1D

from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.methods.adamw import MaskedAdamW
from cast_serve.trainer.methods.layers import MaskedConv1D, MaskedLinear

pytestmark = pytest.mark.gpu

# Real layers: SmolLM2-135M's and GPT-2's, several programs each.
GPU_CASES = STEP_CASES | {
    "SmolLM2": Case(shapes=((576, 576), (192, 576), (1536, 576), (576, 1536))),
    "GPT-2": Case(shapes=((768, 2304), (3072, 768)), input_dim=0),
    "embedding": Case(shapes=((49152, 64), (576,), (576, 2)), input_dim=None),
    "2:16": Case(shapes=((576, 1536),), pattern="2:16"),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_update(name: str):
    assert adams_cases.excess_error(GPU_CASES[name], "cuda") <= 1


@pytest.mark.parametrize("text", MASK_PATTERNS)
@pytest.mark.parametrize("input_dim", [0, 1])
def test_masks_of_special_values(text: str, input_dim: int):
    assert adams_cases.mask_faults(text, input_dim, "cuda") == 0


def make(implementation: str) -> tuple[AdamS, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(192, 64), (64, 192), (192, 64), (64,)]
    weights = [
        torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).cuda())
        for shape in shapes
    ]
    groups = [
        {"params": weights[:2], "input_dim": 1},
        {"params": weights[2:3], "input_dim": 0},
        {"params": weights[3:], "input_dim": None},
    ]
    optimizer = AdamS(
        groups,
        lr=1e-3,
        decay=0.4,
        total_steps=40,
        pattern=Pattern(kept=2, group=4),
        implementation=implementation,
    )
    return optimizer, weights


def take_step(optimizer: AdamS, weights: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator, device="cuda")
    optimizer.step()


def test_run_is_the_references():
    runs = {name: make(name) for name in ("auto", "reference")}
    flips: dict[str, list[float | None]] = {name: [] for name in runs}
    for step in range(40):
        for name, (optimizer, weights) in runs.items():
            take_step(optimizer, weights, step)
            flips[name].append(optimizer.flips)
    # The last bit of a weight may decide a mask, and its weight goes another way from there.
    for ours, theirs in zip(runs["auto"][1], runs["reference"][1], strict=True):
        close = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.999
    assert flips["auto"][-1] == pytest.approx(flips["reference"][-1], abs=1e-3)
    assert any(flips["auto"])


def test_two_runs_are_bit_identical():
    ends = []
    for _ in range(2):
        optimizer, weights = make("auto")
        for step in range(12):
            take_step(optimizer, weights, step)
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_step_does_not_wait_for_the_device(implementation: str):
    optimizer, weights = make(implementation)
    take_step(optimizer, weights, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Past a refresh, with gradients in the same and in other places.
        for step in range(1, 13):
            take_step(optimizer, weights, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_of_bfloat16_take_the_reference(caplog: pytest.LogCaptureFixture):
    weight = torch.nn.Parameter(torch.randn(8, 16, device="cuda").bfloat16())
    optimizer = AdamS(
        [{"params": [weight], "input_dim": 1}],
        lr=1e-2,
        decay=0.1,
        total_steps=4,
        pattern=Pattern(kept=2, group=4),
    )
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert not torch.equal(weight, before)
    said = [record.message for record in caplog.records if "slow way" in record.message]
    # One for masks and one for updates.
    assert len(said) == 2 and all("float32" in message for message in said)


@pytest.mark.parametrize("weighed", [False, True])
def test_masked_adamw_refreshes_every_step(weighed: bool):
    """SR-STE's masks: those that each layer would choose by itself, and no wait for the device."""
    pattern = Pattern(kept=2, group=4)
    options = {"blocks": 2, "pattern": pattern, "straight_through": True, "learn_scale": False}
    layers = [
        MaskedLinear(torch.nn.Linear(192, 64, bias=False), **options),
        MaskedConv1D(Conv1D(64, 192), **options),
        MaskedLinear(torch.nn.Linear(64, 192, bias=False), **options),
    ]
    model = torch.nn.Sequential(*layers).cuda()
    if weighed:
        for layer in layers:
            layer.set_importance(torch.linspace(0.1, 2, layer.weight.shape[layer.input_dim]))
    optimizer = MaskedAdamW(model, lr=1e-2, decay=2e-4, mask_interval=1)
    flips = []
    for step in range(6):
        generator = torch.Generator("cuda").manual_seed(step)
        for layer in layers:
            shape = layer.weight.shape
            layer.weight.grad = torch.randn(shape, generator=generator, device="cuda")
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for layer in layers:
            assert torch.equal(layer.mask, layer.current_mask(pattern))
        flips.append(optimizer.flips)
    assert all(0 < share < 1 for share in flips)
