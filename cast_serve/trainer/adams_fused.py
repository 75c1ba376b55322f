"""AdamS on an NVIDIA GPU: one launch a parameter group (adams_triton.py), and nothing that waits.

  Shapes   any, contiguous; masks of N:4, N:8 and N:16
  Dtypes   weights, gradients and moments fp32, masks bool
  Bytes    29 a weight and step (AdamW: 28), and 6 a weight and refresh

What the kernels do not take goes through the reference, with one warning that says why.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from triton import knobs

from cast_serve.trainer.adams_rule import Reference, Slot, StepNumbers
from cast_serve.trainer.adams_triton import (
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


class _Launch(NamedTuple):
    """What the weights of one launch have in common."""

    kind: str
    device: torch.device
    masked: bool
    aligned: bool


class Fused:
    """`Implementation` by Triton kernels; one object a parameter group."""

    def __init__(self) -> None:
        self._reference = Reference()
        self._tables: dict[_Launch, _Table] = {}
        self._warned: set[str] = set()

    def update(self, slots: Sequence[Slot], numbers: StepNumbers) -> None:
        """See `Implementation`."""
        by_launch: dict[_Launch, list[list[int]]] = {}
        left = []
        for slot in slots:
            reason = _unfit(slot)
            if reason is not None:
                self._warn(reason)
                left.append(slot)
                continue
            row = [0 if tensor is None else tensor.data_ptr() for tensor in slot]
            aligned = not any(address % _ACCESS for address in row)
            launch = _Launch("update", slot.weight.device, slot.mask is not None, aligned)
            by_launch.setdefault(launch, []).append([*row, slot.weight.numel()])
        chunk = BLOCK * UNROLL * ROUNDS
        for launch, rows in by_launch.items():
            table = self._table(launch, rows, [-(-row[-1] // chunk) for row in rows])
            table.launch(
                update_kernel,
                *_arguments(numbers),
                COLUMNS=UPDATE_COLUMNS,
                MASKED=launch.masked,
                ALIGNED=launch.aligned,
                BLOCK=BLOCK,
                UNROLL=UNROLL,
                ROUNDS=ROUNDS,
                num_warps=WARPS,
            )
        self._reference.update(left, numbers)

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
        by_launch: dict[_Launch, list[list[int]]] = {}
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
            launch = _Launch("refresh", weight.device, True, aligned)
            by_launch.setdefault(launch, []).append(row)
        for launch, rows in by_launch.items():
            changed += self._refresh(launch, rows, pattern, input_dim)
        if left:
            changed += self._reference.refresh(left, left_masks, pattern, input_dim=input_dim)
        return changed

    def _refresh(
        self, launch: _Launch, rows: list[list[int]], pattern: Pattern, input_dim: int
    ) -> torch.Tensor:
        kernel: Any
        options: dict[str, object]
        if input_dim == 1:
            # 16 weights in flight a lane.
            unroll = max(GROUPS) // pattern.group
            kernel = refresh_rows_kernel
            options = {"ALIGNED": launch.aligned, "LANES": LANES, "UNROLL": unroll}
            options |= {"ROUNDS": REFRESH_ROUNDS, "num_warps": WARPS}
            programs = [-(-row[2] // (LANES * unroll * REFRESH_ROUNDS)) for row in rows]
        else:
            kernel = refresh_columns_kernel
            options = {"BLOCK": COLUMN_BLOCK, "ROUNDS": COLUMN_ROUNDS, "num_warps": COLUMN_WARPS}
            programs = [-(-row[2] // COLUMN_ROUNDS) * -(-row[3] // COLUMN_BLOCK) for row in rows]
        table = self._table(launch, rows, programs)
        # Sums a program and not an atomic sum: thousands of programs would wait for one address.
        changed = torch.zeros(sum(programs), dtype=torch.int32, device=launch.device)
        table.launch(
            kernel,
            changed,
            COLUMNS=REFRESH_COLUMNS,
            KEPT=pattern.kept,
            GROUP=pattern.group,
            **options,
        )
        return changed.sum(dtype=torch.int64)

    def _table(self, launch: _Launch, rows: list[list[int]], programs: list[int]) -> "_Table":
        if launch not in self._tables:
            self._tables[launch] = _Table(launch.device)
        table = self._tables[launch]
        table.hold(rows, programs)
        return table

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("AdamS: a weight takes the slow way: %s", reason)


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
            counts = torch.tensor(programs)
            owner = torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32), counts)
            self._owner = self._send(owner)
            self._programs, self._rows = programs, []
        if rows != self._rows:
            first = 0
            flat: list[int] = []
            for row, count in zip(rows, programs, strict=True):
                flat += [*row, first]
                first += count
            self._table = self._send(torch.tensor(flat, dtype=torch.int64))
            self._rows = rows

    def launch(self, kernel: Any, *arguments: object, **options: object) -> None:
        """Run `kernel` with one program for each of all tensors' programs."""
        if not self._owner.numel():
            return
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(self._table):
            kernel[(self._owner.numel(),)](self._table, self._owner, *arguments, **options)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            # From pinned memory the copy is queued; from any other the host would wait for it.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


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
    )


def _unfit(slot: Slot) -> str | None:
    """Why `update_kernel` cannot take this weight; None where it can."""
    for name, tensor in zip(("weight", "gradient", "mu", "nu"), slot, strict=False):
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
