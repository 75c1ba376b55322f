"""Scan the data of a checkpoint: every group, every bitmask, every weight finite.

Where `stream` stops at the first fault, this goes on and names them all, tensor by tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cast_serve.kernels.packing import GROUP, Offender, check_mask
from cast_serve.kernels.packing import check as check_groups
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.finite import require_finite
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import Layers, LinearEntry, find_layers
from cast_serve.model_loaders.stream import (
    NOT_SPARSE,
    load_linear,
    read_bitmask,
    read_values,
    read_weight,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the scan of one linear, or of one other tensor at fault, found.

    Attributes:
        name: module name of a linear, else tensor name.
        file: where its main tensor is.
        groups, faulty, first: groups scanned, groups that break 2:4, and the first of them.
        why_dense: why a linear is dense, None where it is sparse.
        problem: the fault that keeps the checkpoint from being served, one line that names file
            and tensor; None where there is none.
    """

    name: str
    file: Path
    groups: int = 0
    faulty: int = 0
    first: tuple[Offender, ...] = ()
    why_dense: str | None = None
    problem: str | None = None


def check(
    checkpoint: Checkpoint, *, layers: Layers | None = None, limit: int = 3
) -> Iterator[Finding]:
    """One Finding a linear, in file order, then one for every other tensor at fault.

    Args:
        layers: what find_layers said of `checkpoint`, if it has been asked.
        limit: offenders kept of each linear.

    Raises:
        CheckpointError: the headers are at fault, so there is nothing to scan.
    """
    layers = layers or find_layers(checkpoint)
    for linear in layers.linears:
        yield _check_linear(checkpoint, layers.scheme.format, linear, limit)
    for name in layers.others:
        try:
            require_finite(checkpoint, name, checkpoint.read(name))
        except CheckpointError as error:
            yield Finding(name=name, file=error.file, problem=str(error))


def _check_linear(
    checkpoint: Checkpoint, stored: Format, linear: LinearEntry, limit: int
) -> Finding:
    file = checkpoint.entries[linear.tensors[0]].file
    groups = linear.shape[0] * linear.shape[1] // GROUP
    try:
        if linear.why_dense is not None:
            require_finite(checkpoint, linear.tensors[0], checkpoint.read(linear.tensors[0]))
            return Finding(name=linear.name, file=file, why_dense=linear.why_dense)
        if stored is Format.TRAINING:
            load_linear(checkpoint, stored, linear)
            return Finding(name=linear.name, file=file, groups=groups)
        if stored.stored_packed:
            at_fault = linear.tensors[1]
            bitmask = read_bitmask(checkpoint, linear)
            report = check_mask(bitmask, limit=limit)
            if report.ok:
                read_values(checkpoint, linear, bitmask)
        else:
            at_fault = linear.tensors[0]
            report = check_groups(read_weight(checkpoint, linear), limit=limit)
    except CheckpointError as error:
        return Finding(name=linear.name, file=error.file, groups=groups, problem=str(error))
    problem, why_dense = None, None
    if not report.ok:
        rule = "do not keep exactly two" if stored.stored_packed else "have more than two non-zeros"
        said = f"{report.faulty} of {report.groups} groups {rule}, the first at {report.first[0]}"
        if stored is Format.PLAIN:
            why_dense = f"{NOT_SPARSE}: {said}"
        else:
            problem = str(checkpoint.error(at_fault, said))
    return Finding(
        name=linear.name,
        file=file,
        groups=report.groups,
        faulty=report.faulty,
        first=report.first,
        why_dense=why_dense,
        problem=problem,
    )
