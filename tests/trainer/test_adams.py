"""AdamS against the rule of Algorithm 1, written out per entry in plain Python floats."""

import copy
import math

import pytest
import torch

from cast_serve.trainer.adams import rule as adams_rule
from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.config import Pattern

LR, DECAY, BETA1, BETA2, EPS = 3e-2, 0.4, 0.9, 0.95, 1e-8


def transcribed_mask(row: list[float], kept: int, group: int) -> list[bool]:
    mask = [False] * len(row)
    for start in range(0, len(row), group):
        order = sorted(range(start, start + group), key=lambda i: (-abs(row[i]), i))
        for i in order[:kept]:
            mask[i] = True
    return mask


def transcribed(
    rows: list[list[float]],
    gradients: list[list[list[float]]],
    *,
    nm: tuple[int, int] | None,
    decay: float = DECAY,
    interval: int = 3,
    masked_rate: float = 1.0,
    second_moment: str = "momentum",
) -> tuple[list[list[float]], list[list[bool]]]:
    """Final weights and last masks after len(gradients) steps; nm None keeps every weight."""
    steps = len(gradients)
    rows = [list(row) for row in rows]
    mu = [[0.0] * len(row) for row in rows]
    v = [[0.0] * len(row) for row in rows]
    masks = [[True] * len(row) for row in rows]
    for t, g in enumerate(gradients, start=1):
        if nm is not None and (t - 1) % interval == 0:
            masks = [transcribed_mask(row, *nm) for row in rows]
        a = t / steps
        for r, row in enumerate(rows):
            for c, w in enumerate(row):
                mu[r][c] = BETA1 * mu[r][c] + (1 - BETA1) * g[r][c]
                mixed, squared, speed = mu[r][c], g[r][c], 1.0
                if not masks[r][c]:
                    sign = (w > 0) - (w < 0)
                    mixed = (1 - a) * mu[r][c] + a * decay * sign
                    squared = (1 - a) * g[r][c] + a * decay * sign
                    speed = 1 + a * (masked_rate - 1)
                if second_moment == "momentum":
                    squared = mixed
                v[r][c] = BETA2 * v[r][c] + (1 - BETA2) * squared**2
                top = mixed / (1 - BETA1**t)
                bottom = math.sqrt(v[r][c] / (1 - BETA2**t)) + EPS
                row[c] = w - speed * LR * top / bottom
    return rows, masks


def adams(weight: torch.Tensor, pattern: Pattern, *, input_dim: int | None, steps: int) -> AdamS:
    return AdamS(
        [{"params": [weight], "input_dim": input_dim}],
        lr=LR,
        decay=DECAY,
        total_steps=steps,
        pattern=pattern,
        betas=(BETA1, BETA2),
        eps=EPS,
        mask_interval=3,
    )


def take_steps(optimizer: AdamS, weight: torch.Tensor, gradients: torch.Tensor) -> None:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [3, 8] and 20 gradients, fp64; small weights so that masks change on the way."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64) * 0.1
    return weight, torch.randn(20, 3, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)], ids="{0[0]}:{0[1]}".format)
@pytest.mark.parametrize("input_dim", [0, 1])
def test_step_against_transcription(problem, nm, input_dim):
    rows, gradients = problem
    expected, masks = transcribed(rows.tolist(), gradients.tolist(), nm=nm)
    turn = (lambda x: x) if input_dim == 1 else (lambda x: x.mT.contiguous())
    weight = torch.nn.Parameter(turn(rows))
    optimizer = adams(weight, Pattern(kept=nm[0], group=nm[1]), input_dim=input_dim, steps=20)
    take_steps(optimizer, weight, turn(gradients))
    torch.testing.assert_close(turn(weight.detach()), torch.tensor(expected, dtype=torch.float64))
    assert turn(optimizer.state[weight]["mask"]).tolist() == masks


@pytest.mark.parametrize("input_dim", [0, 1, None])
def test_step_of_a_large_weight(monkeypatch, input_dim):
    """Slices of rows on a CPU, the last one shorter: as in one piece."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(100, 64, generator=generator)
    gradients = torch.randn(4, 100, 64, generator=generator)
    found = []
    for largest in (100 * 64, 24 * 64):
        monkeypatch.setattr(adams_rule, "_SLICE", largest)
        weight = torch.nn.Parameter(start.clone())
        optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=input_dim, steps=4)
        take_steps(optimizer, weight, gradients)
        found.append((weight.detach(), optimizer.state[weight]["nu"]))
    torch.testing.assert_close(found[0], found[1])


def test_step_masks_change_in_transcription(problem):
    # Otherwise the test above could not tell a refreshed mask from the first one.
    rows, gradients = problem
    first = [transcribed_mask(row, 2, 4) for row in rows.tolist()]
    assert transcribed(rows.tolist(), gradients.tolist(), nm=(2, 4))[1] != first


def test_step_dense_group(problem):
    rows, gradients = problem
    expected, _ = transcribed(rows.tolist(), gradients.tolist(), nm=None)
    weight = torch.nn.Parameter(rows.clone())
    take_steps(adams(weight, Pattern(kept=2, group=4), input_dim=None, steps=20), weight, gradients)
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=torch.float64))


def test_step_all_kept_without_decay_is_adam_on_mu(problem):
    rows, gradients = problem
    weight = torch.nn.Parameter(rows.clone())
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=1, steps=20)
    optimizer.param_groups[0] |= {"decay": 0.0, "mask_interval": 1000}
    mu, v, plain = torch.zeros_like(rows), torch.zeros_like(rows), rows.clone()
    for t, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        if t > 1:
            optimizer.state[weight]["mask"].fill_(True)
        else:
            # The first refresh is due in this step: put it behind us with nothing masked.
            optimizer.param_groups[0]["input_dim"] = None
            optimizer.state[weight]["mask"] = torch.ones_like(rows, dtype=torch.bool)
        optimizer.step()
        optimizer.param_groups[0]["input_dim"] = 1
        mu = BETA1 * mu + (1 - BETA1) * gradient
        v = BETA2 * v + (1 - BETA2) * mu**2
        plain -= LR * (mu / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
    torch.testing.assert_close(weight.detach(), plain)


def test_state_dict_continues_exactly(problem):
    rows, gradients = problem
    straight = torch.nn.Parameter(rows.float())
    optimizer = adams(straight, Pattern(kept=2, group=4), input_dim=1, steps=20)
    # 11 steps: the next refresh is not due at once, so the masks must come from the state.
    take_steps(optimizer, straight, gradients[:11].float())
    resumed = torch.nn.Parameter(straight.detach().clone())
    other = adams(resumed, Pattern(kept=2, group=4), input_dim=1, steps=7)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[resumed]["mask"].dtype == torch.bool
    take_steps(optimizer, straight, gradients[11:].float())
    take_steps(other, resumed, gradients[11:].float())
    assert torch.equal(straight, resumed)
    assert torch.equal(optimizer.state[straight]["mask"], other.state[resumed]["mask"])
    assert optimizer.flips == other.flips


def test_state_dict_of_the_first_release_continues(problem):
    # It had no ramp, no names and no choice of implementation.
    rows, gradients = problem
    straight = torch.nn.Parameter(rows.float())
    optimizer = adams(straight, Pattern(kept=2, group=4), input_dim=1, steps=20)
    take_steps(optimizer, straight, gradients[:11].float())
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("decay_ramp", "masked_rate", "second_moment", "implementation"):
            del group[key]
    resumed = torch.nn.Parameter(straight.detach().clone())
    group = {"params": [resumed], "param_names": ["layer.weight"], "input_dim": 1}
    other = AdamS([group], lr=1, decay=1, total_steps=1, pattern=Pattern(kept=2, group=4))
    other.load_state_dict(saved)
    take_steps(optimizer, straight, gradients[11:].float())
    take_steps(other, resumed, gradients[11:].float())
    assert torch.equal(straight, resumed)


def test_state_dict_holds_plain_numbers(problem):
    rows, gradients = problem
    weight = torch.nn.Parameter(rows.clone())
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=1, steps=20)
    take_steps(optimizer, weight, gradients[:5])
    (group,) = optimizer.state_dict()["param_groups"]
    assert isinstance(group["flips"], float)


def test_replaced_tensors_are_seen(problem):
    # What is kept from step to step must not outlive the tensors it was made from.
    rows, gradients = problem
    weight, other = (torch.nn.Parameter(rows.clone()) for _ in range(2))
    optimizers = [
        adams(each, Pattern(kept=2, group=4), input_dim=1, steps=20) for each in (weight, other)
    ]
    for step, gradient in enumerate(gradients):
        for optimizer, each in zip(optimizers, (weight, other), strict=True):
            take_steps(optimizer, each, gradient[None])
        if step % 4 == 0:
            weight.data = weight.data.clone()
            state = optimizers[0].state[weight]
            name = ("mu", "nu", "mask")[step // 4 % 3]
            state[name] = state[name].clone()
    assert torch.equal(weight, other)


def test_parameters_without_gradient_do_not_move(problem):
    rows, gradients = problem
    moving, still = (torch.nn.Parameter(rows.clone()) for _ in range(2))
    optimizer = AdamS(
        [{"params": [still, moving], "input_dim": 1}],
        lr=LR,
        decay=DECAY,
        total_steps=20,
        pattern=Pattern(kept=2, group=4),
    )
    take_steps(optimizer, moving, gradients[:3])
    assert torch.equal(still.detach(), rows) and not torch.equal(moving.detach(), rows)
    # Once it gets one, it moves from the next step on.
    still.grad = gradients[3].clone()
    optimizer.step()
    assert not torch.equal(still.detach(), rows)


def test_decay_ramp_is_a_shorter_run_then_full_strength(problem):
    rows, gradients = problem
    ramped, short = (torch.nn.Parameter(rows.clone()) for _ in range(2))
    optimizer = AdamS(
        [{"params": [ramped], "input_dim": 1}],
        lr=LR,
        decay=DECAY,
        total_steps=20,
        pattern=Pattern(kept=2, group=4),
        betas=(BETA1, BETA2),
        eps=EPS,
        mask_interval=3,
        decay_ramp=0.25,
    )
    take_steps(optimizer, ramped, gradients)
    take_steps(adams(short, Pattern(kept=2, group=4), input_dim=1, steps=5), short, gradients)
    assert torch.equal(ramped, short)


def test_masked_weights_have_a_rate_of_their_own(problem):
    rows, gradients = problem
    weight = torch.nn.Parameter(rows.clone())
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=1, steps=len(gradients))
    optimizer.param_groups[0]["masked_rate"] = 5.0
    take_steps(optimizer, weight, gradients)
    expected, masks = transcribed(rows.tolist(), gradients.tolist(), nm=(2, 4), masked_rate=5.0)
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=weight.dtype))
    assert optimizer.state[weight]["mask"].tolist() == masks


@pytest.mark.parametrize("nm", [(2, 4), None], ids=["2:4", "dense"])
def test_second_moment_of_the_gradient(problem, nm):
    rows, gradients = problem
    expected, masks = transcribed(
        rows.tolist(), gradients.tolist(), nm=nm, second_moment="gradient"
    )
    weight = torch.nn.Parameter(rows.clone())
    input_dim = None if nm is None else 1
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=input_dim, steps=20)
    optimizer.param_groups[0]["second_moment"] = "gradient"
    take_steps(optimizer, weight, gradients)
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=weight.dtype))
    if nm is not None:
        assert optimizer.state[weight]["mask"].tolist() == masks


def test_second_moment_of_the_gradient_is_adam_where_nothing_is_masked(problem):
    rows, gradients = problem
    ours, theirs = (torch.nn.Parameter(rows.clone()) for _ in range(2))
    optimizer = adams(ours, Pattern(kept=2, group=4), input_dim=None, steps=20)
    optimizer.param_groups[0]["second_moment"] = "gradient"
    adam = torch.optim.Adam([theirs], lr=LR, betas=(BETA1, BETA2), eps=EPS)
    for gradient in gradients:
        take_steps(optimizer, ours, gradient[None])
        theirs.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_flips_counts_changed_entries():
    weight = torch.nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=1, steps=20)
    optimizer.param_groups[0]["mask_interval"] = 1
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer.flips is None
    weight.data.copy_(torch.tensor([[1.0, 3.0, 2.0, 0.5]]))
    optimizer.step()
    assert optimizer.flips == 0.5


def test_first_update_is_ten_times_the_rate():
    # docs/method.md, AdamS, 1: v takes the momentum without its bias correction; hence the warm-up.
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=None, steps=20)
    take_steps(optimizer, weight, torch.tensor([[1e-3, -1e-3, 5.0, -7.0]], dtype=torch.float64))
    expected = torch.tensor([-10, 10, -10, 10], dtype=torch.float64) * LR
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=0)


def test_steady_update_is_once_the_rate():
    # docs/method.md, AdamS, 2: about 1.0 x lr under noise, where Adam makes 0.23 x lr.
    weight = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = adams(weight, Pattern(kept=2, group=4), input_dim=None, steps=200)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        before = weight.detach().clone()
        take_steps(optimizer, weight, torch.randn(1, 20_000, generator=generator))
    rms = (weight.detach() - before).square().mean().sqrt().item() / LR
    assert 0.85 < rms < 1.15
