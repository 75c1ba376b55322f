"""AdamS by Triton's kernels beside the reference, on a GPU or, interpreted, on a CPU.

Usage: python adams_cases.py      interprets every case and prints what came out as JSON
"""

import json
import os
from dataclasses import dataclass

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from cast_serve.trainer.adams.fused import Fused
from cast_serve.trainer.adams.rule import Reference, Slot, StepNumbers
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.schedule import decay_share

STEPS, INTERVAL = 40, 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A parameter group: its weights' shapes, the pattern and the dimension it runs along.

    Attributes:
        offset: entries by which gradients begin after a 16-byte address, as in FSDP2's buffers.
    """

    shapes: tuple[tuple[int, ...], ...]
    input_dim: int | None = 1
    pattern: str = "2:4"
    offset: int = 0
    steps: int = STEPS
    of_gradient: bool = False


# A program takes 8,192 entries, or 256 columns of 8 groups.
STEP_CASES = {
    "rows": Case(shapes=((3, 8), (1, 4), (0, 8))),
    "columns": Case(shapes=((8, 3), (36, 5)), input_dim=0),
    "dense": Case(shapes=((5,), (3, 5, 7)), input_dim=None),
    "4:8": Case(shapes=((3, 264),), pattern="4:8"),
    "unaligned": Case(shapes=((7, 8), (3, 4)), offset=1),
    "programs of rows": Case(shapes=((33, 260), (2, 8)), steps=3),
    "programs of columns": Case(shapes=((36, 260), (4, 3)), input_dim=0, steps=3),
    "programs of dense": Case(shapes=((8192,), (9001,), (3,)), input_dim=None, steps=3),
    "v of the gradient": Case(shapes=((3, 8), (1, 4)), of_gradient=True),
    "dense, v of the gradient": Case(shapes=((5,), (3, 7)), input_dim=None, of_gradient=True),
    "3:5 by the reference": Case(shapes=((4, 15),), pattern="3:5"),
}
MASK_PATTERNS = ("1:4", "2:4", "3:4", "4:8", "2:16", "9:16")

# Ties, zeros of both signs, denormals, infinities, and NaNs of two signs.
SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, 2e-40, 1e-38, float("inf"), float("nan"))


def excess_error(case: Case, device: str) -> float:
    """How much further from the rule in fp64 the kernels are than the reference in fp32, at most.

    Over the case's steps with refreshes, each from one state; 1 is twice the reference's largest
    error in a tensor, plus half a unit of its largest entry for each of the four roundings that
    follow v. Masks and counts of changed entries must be equal: infinity otherwise.
    """
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern.parse(case.pattern)
    slots = [_slot(shape, generator, case, device) for shape in case.shapes]
    fused, reference = Fused(), Reference()
    worst = 0.0
    for t in range(1, case.steps + 1):
        grads = [_offset(torch.randn(s, generator=generator), case, device) for s in case.shapes]
        copies = [Slot(*(None if x is None else x.clone() for x in slot)) for slot in slots]
        if case.input_dim is not None and (t - 1) % INTERVAL == 0:
            counts = [
                int(
                    way.refresh(
                        [slot.weight for slot in own],
                        [slot.mask for slot in own],
                        pattern,
                        input_dim=case.input_dim,
                    )
                )
                for way, own in ((fused, slots), (reference, copies))
            ]
            same = all(torch.equal(a.mask, b.mask) for a, b in zip(slots, copies, strict=True))
            if counts[0] != counts[1] or not same:
                return float("inf")
        numbers = StepNumbers(
            t=t,
            lr=3e-2,
            masked_lr=3e-2 * (1 + t % 3),
            share=decay_share(t, case.steps, ramp=0.5),
            decay=0.4,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            of_gradient=case.of_gradient,
        )
        exact = [Slot(*(x.double() for x in slot[:3]), slot.mask) for slot in copies]
        fused.update(slots, grads, numbers)
        reference.update(copies, grads, numbers)
        reference.update(exact, [grad.double() for grad in grads], numbers)
        for tensors in zip(slots, copies, exact, strict=True):
            for ours, theirs, judge in zip(*(slot[:3] for slot in tensors), strict=True):
                if judge.numel():
                    unit = judge.abs().max() * torch.finfo(torch.float32).eps / 2
                    errors = [(x - judge).abs().max() for x in (ours, theirs)]
                    worst = max(worst, (errors[0] / (2 * errors[1] + 4 * unit)).item())
    return worst


def mask_faults(text: str, input_dim: int, device: str) -> int:
    """Entries, and counts, in which a mask of special values differs from the reference's."""
    generator = torch.Generator().manual_seed(len(text) + input_dim)
    values = torch.tensor(SPECIAL)
    shape = (31, 48) if input_dim == 1 else (48, 31)
    weight = values[torch.randint(len(SPECIAL), shape, generator=generator)]
    # Of either sign, NaN too; and of two payloads.
    weight = torch.where(torch.rand(shape, generator=generator) < 0.5, weight, -weight)
    bits = weight.view(torch.int32)
    bits += (weight.isnan() & (torch.rand(shape, generator=generator) < 0.5)).int()
    weight = weight.to(device)
    masks = [(torch.rand(shape, generator=generator) < 0.5).to(device)]
    masks.append(masks[0].clone())
    counts = [
        int(way.refresh([weight], [mask], Pattern.parse(text), input_dim=input_dim))
        for way, mask in zip((Fused(), Reference()), masks, strict=True)
    ]
    return int((masks[0] != masks[1]).sum()) + abs(counts[0] - counts[1])


def _slot(shape: tuple[int, ...], generator: torch.Generator, case: Case, device: str) -> Slot:
    weight = (torch.randn(shape, generator=generator) * 0.1).to(device)
    mask = None if case.input_dim is None else torch.zeros_like(weight, dtype=torch.bool)
    return Slot(weight, torch.zeros_like(weight), torch.zeros_like(weight), mask)


def _offset(grad: torch.Tensor, case: Case, device: str) -> torch.Tensor:
    """`grad` on the device, at `offset` entries after an address that an allocator gives."""
    buffer = torch.empty(grad.numel() + case.offset, device=device)
    return buffer[case.offset :].view(grad.shape).copy_(grad)


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "errors": {name: excess_error(case, "cpu") for name, case in STEP_CASES.items()},
                "faults": {
                    f"{text} {input_dim}": mask_faults(text, input_dim, "cpu")
                    for text in MASK_PATTERNS
                    for input_dim in (0, 1)
                },
            }
        )
    )
