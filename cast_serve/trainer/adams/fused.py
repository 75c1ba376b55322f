"""AdamS on an NVIDIA GPU: one launch a parameter group (triton_kernels.py), and nothing that waits.

  Shapes   any, contiguous; masks of N:4, N:8 and N:16
  Dtypes   weights, gradients and moments fp32, masks bool
  Bytes    29 a weight and step (AdamW: 28), and 6 a weight and refresh

What the kernels do not take goes through the reference, with one warning that says why.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs

from cast_serve.trainer.adams.rule import Reference, Slot, StepNumbers
from cast_serve.trainer.adams.triton_kernels import (
    REFRESH_COLUMNS,
    UPDATE_COLUMNS,
    refresh_columns_kernel,
    refresh_rows_kernel,
    update_kernel,
)
from cast_serve.trainer.config import Pattern

_log = logging.getLogger(__name__)

GROUPS = (4, 8, 16)

# Four entries a lane: a load of the mask and one of fp32 then give every lane the same entries, and
# nothing is exchanged between lanes.
WARPS = 8
BLOCK = 4 * 32 * WARPS
# 128 bytes in flight a lane.
UNROLL = 2
# Blocks a program: the two dependent reads of its table row are paid once in 8,192 entries.
ROUNDS = 4

LANES = 32 * WARPS
REFRESH_ROUNDS = 2
COLUMN_WARPS = 4
COLUMN_BLOCK = 256
COLUMN_ROUNDS = 8

# Bytes of the widest access.
_ACCESS = 16


class Fused:
    """`Implementation` by Triton kernels; one object a parameter group."""

    def __init__(self) -> None:
        self._reference = Reference()
        self._slots: Sequence[Slot] = ()
        # Of each gradient whether 16-byte accesses may read it, or why no kernel may.
        self._forms: list[bool | str] = []
        self._updates: list[_Update] = []
        self._left: list[int] = []
        self._tables: dict[tuple[torch.device, bool], _Table] = {}
        self._warned: set[str] = set()

    def update(
        self, slots: Sequence[Slot], grads: Sequence[torch.Tensor], numbers: StepNumbers
    ) -> None:
        """See `Implementation`."""
        addresses = [grad.data_ptr() for grad in grads]
        forms = [
            address % _ACCESS == 0
            if grad.dtype is torch.float32 and grad.is_contiguous()
            else "its gradient is not contiguous, or not float32"
            for grad, address in zip(grads, addresses, strict=True)
        ]
        if slots is not self._slots or forms != self._forms:
            self._bind(slots, forms)
        arguments = _arguments(numbers)
        for update in self._updates:
            grads_here = [addresses[place] for place in update.places]
            update.run(grads_here, arguments, of_gradient=numbers.of_gradient)
        if self._left:
            left = [slots[place] for place in self._left]
            self._reference.update(left, [grads[place] for place in self._left], numbers)

    def _bind(self, slots: Sequence[Slot], forms: list[bool | str]) -> None:
        """Sort the weights into launches."""
        places: dict[tuple[torch.device, bool, bool], list[int]] = {}
        self._slots, self._forms, self._left = slots, forms, []
        for place, (slot, form) in enumerate(zip(slots, forms, strict=True)):
            reason = form if isinstance(form, str) else _unfit(slot)
            if reason is not None:
                self._warn(reason)
                self._left.append(place)
                continue
            aligned = bool(form) and not any(t is not None and t.data_ptr() % _ACCESS for t in slot)
            key = (slot.weight.device, slot.mask is not None, aligned)
            places.setdefault(key, []).append(place)
        self._updates = [
            _Update(slots, found, masked=masked, aligned=aligned)
            for (_, masked, aligned), found in places.items()
        ]

    def refresh(
        self,
        weights: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor],
        pattern: Pattern,
        *,
        input_dim: int,
    ) -> torch.Tensor:
        """See `Implementation`."""
        changed = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        by_launch: dict[tuple[torch.device, bool], list[list[int]]] = {}
        left: list[torch.Tensor] = []
        left_masks: list[torch.Tensor] = []
        for weight, mask in zip(weights, masks, strict=True):
            reason = _unfit_for_refresh(weight, mask, pattern)
            if reason is not None:
                self._warn(reason)
                left.append(weight)
                left_masks.append(mask)
                continue
            inputs = weight.shape[input_dim] // pattern.group
            others = weight.shape[1 - input_dim]
            row = [weight.data_ptr(), mask.data_ptr()]
            row += [inputs * others, 1] if input_dim == 1 else [inputs, others]
            aligned = not any(address % _ACCESS for address in row[:2])
            by_launch.setdefault((weight.device, aligned), []).append(row)
        for key, rows in by_launch.items():
            changed += self._refresh(*key, rows, pattern, input_dim)
        if left:
            changed += self._reference.refresh(left, left_masks, pattern, input_dim=input_dim)
        return changed

    def _refresh(
        self,
        device: torch.device,
        aligned: bool,
        rows: list[list[int]],
        pattern: Pattern,
        input_dim: int,
    ) -> torch.Tensor:
        kernel: Any
        options: dict[str, object]
        if input_dim == 1:
            # 16 weights in flight a lane.
            unroll = max(GROUPS) // pattern.group
            kernel = refresh_rows_kernel
            options = {"ALIGNED": aligned, "LANES": LANES, "UNROLL": unroll}
            options |= {"ROUNDS": REFRESH_ROUNDS, "num_warps": WARPS}
            programs = [-(-row[2] // (LANES * unroll * REFRESH_ROUNDS)) for row in rows]
        else:
            kernel = refresh_columns_kernel
            options = {"BLOCK": COLUMN_BLOCK, "ROUNDS": COLUMN_ROUNDS, "num_warps": COLUMN_WARPS}
            programs = [-(-row[2] // COLUMN_ROUNDS) * -(-row[3] // COLUMN_BLOCK) for row in rows]
        if (device, aligned) not in self._tables:
            self._tables[device, aligned] = _Table(device)
        table = self._tables[device, aligned]
        table.hold(rows, programs)
        # Sums a program and not an atomic sum: thousands of programs would wait for one address.
        changed = torch.zeros(sum(programs), dtype=torch.int32, device=device)
        table.launch(
            kernel,
            changed,
            COLUMNS=REFRESH_COLUMNS,
            KEPT=pattern.kept,
            GROUP=pattern.group,
            **options,
        )
        return changed.sum(dtype=torch.int64)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("AdamS: a weight takes the slow way: %s", reason)


class _Update:
    """One launch of `update_kernel`: the slots at `places`, which are alike."""

    def __init__(
        self, slots: Sequence[Slot], places: list[int], *, masked: bool, aligned: bool
    ) -> None:
        self.places = places
        self._device = slots[places[0]].weight.device
        self._constants = {"MASKED": masked, "ALIGNED": aligned}
        self._addresses: list[int] = []
        self._grads: torch.Tensor
        rows, programs = [], []
        for place in places:
            weight, mu, nu, mask = slots[place]
            row = [weight.data_ptr(), mu.data_ptr(), nu.data_ptr()]
            rows.append([*row, mask.data_ptr() if mask is not None else 0, weight.numel()])
            programs.append(-(-weight.numel() // (BLOCK * UNROLL * ROUNDS)))
        self._table = _Table(self._device)
        self._table.hold(rows, programs)

    def run(self, grads: list[int], arguments: tuple[float, ...], *, of_gradient: bool) -> None:
        """Launch with gradients at these addresses, which every backward pass may change."""
        if grads != self._addresses:
            self._grads = _send(torch.tensor(grads, dtype=torch.int64), self._device)
            self._addresses = grads
        self._table.launch(
            update_kernel,
            self._grads,
            *arguments,
            COLUMNS=UPDATE_COLUMNS,
            **self._constants,
            OF_GRADIENT=of_gradient,
            BLOCK=BLOCK,
            UNROLL=UNROLL,
            ROUNDS=ROUNDS,
            num_warps=WARPS,
        )


class _Table:
    """Which tensors a launch works on, on the device; sent again only when one of them moved."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[list[int]] = []
        self._programs: list[int] = []
        self._table: torch.Tensor
        self._owner: torch.Tensor

    def hold(self, rows: list[list[int]], programs: list[int]) -> None:
        """Take the table's `rows`, one a tensor, and how many programs each tensor gets."""
        if programs != self._programs:
            owner = torch.arange(len(programs), dtype=torch.int32)
            owner = owner.repeat_interleave(torch.tensor(programs))
            self._owner = _send(owner, self._device)
            self._programs, self._rows = programs, []
        if rows != self._rows:
            first = 0
            flat: list[int] = []
            for row, count in zip(rows, programs, strict=True):
                flat += [*row, first]
                first += count
            self._table = _send(torch.tensor(flat, dtype=torch.int64), self._device)
            self._rows = rows

    def launch(self, kernel: Any, *arguments: object, **options: object) -> None:
        """Run `kernel` with all programs of all tensors."""
        programs = self._owner.numel()
        # A rank's shards may all be empty.
        if programs:
            # Triton launches on the current device, which need not be the tensors'.
            with torch.cuda.device_of(self._table):
                kernel[(programs,)](self._table, self._owner, *arguments, **options)


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        # From pinned memory the copy is queued; from any other the host would wait for it.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _arguments(numbers: StepNumbers) -> tuple[float, ...]:
    """The floats of `update_kernel`, in order; computed in fp64, rounded once."""
    n = numbers
    return (
        n.beta1,
        1 - n.beta1,
        n.beta2,
        1 - n.beta2,
        1 - n.share,
        n.share * n.decay,
        1 / (1 - n.beta2**n.t),
        n.eps,
        n.lr / (1 - n.beta1**n.t),
        n.masked_lr / (1 - n.beta1**n.t),
    )


def _unfit(slot: Slot) -> str | None:
    """Why `update_kernel` cannot take this weight; None where it can."""
    for name, tensor in zip(("weight", "mu", "nu"), slot, strict=False):
        assert tensor is not None
        if tensor.dtype != torch.float32:
            return f"its {name} is {tensor.dtype}, not float32"
        if not tensor.is_contiguous():
            return f"its {name} is not contiguous"
    if slot.mask is not None and not slot.mask.is_contiguous():
        return "its mask is not contiguous"
    return _unfit_device(slot.weight)


def _unfit_for_refresh(weight: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> str | None:
    """Why the refresh kernels cannot take this weight; None where they can."""
    if pattern.group not in GROUPS:
        return f"there is no kernel for masks of {pattern}, only for N of {GROUPS}"
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}, not float32"
    if not (weight.is_contiguous() and mask.is_contiguous()):
        return "its weight or mask is not contiguous"
    return _unfit_device(weight)


def _unfit_device(weight: torch.Tensor) -> str | None:
    on_gpu = weight.is_cuda or knobs.runtime.interpret
    return None if on_gpu else f"it is on {weight.device}"
