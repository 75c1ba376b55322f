"""Where the time of a step goes, read from a trace that torch.profiler made of a vLLM worker.

vLLM marks what a step runs as execute_context_A(B)_generation_C(D): A requests in prefill with B
tokens, C in decode with D. A step here lasts from its mark on the GPU to the next one, so sampling
is part of it; one without decodes to its last kernel, as the next waits for a client's request.
"""

import gzip
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First match wins.
KINDS = (
    ("sampling", re.compile(r"argmax|sample|sampling|topk|top_k|_ranks", re.IGNORECASE)),
    ("2:4 linear", re.compile(r"mma_sp|sparse")),
    ("attention", re.compile(r"flash|fmha|attention|attn|reshape_and_cache")),
    ("dense linear", re.compile(r"nvjet|gemm|gemv|cutlass|cublas|splitk|xmma", re.IGNORECASE)),
    ("norm, rotary, activation", re.compile(r"triton|norm|rotary|silu|act_and_mul|quant")),
)
LM_HEAD, OTHER, IDLE = "lm_head", "other", "GPU idle"
_GEMMS = ("2:4 linear", "dense linear")
# In the order in which they are shown.
PARTS = (*(name for name, _ in KINDS), LM_HEAD, OTHER, IDLE)

_MARK = re.compile(r"execute_context_(\d+)\(\d+\)_generation_(\d+)\(\d+\)")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class TraceError(ValueError):
    """A trace that holds no step of the kind asked for."""


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Milliseconds of a step by kind of kernel; medians over the steps, each kind on its own.

    Attributes:
        steps: how many there were.
        step_ms: from one step's start to the next one's, with the profiler running.
        parts_ms: by kind, `IDLE` among them.
    """

    steps: int
    step_ms: float
    parts_ms: dict[str, float]


@dataclass(frozen=True)
class _Step:
    prefills: int
    decodes: int
    begin: float
    end: float


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file, gzipped or not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return json.load(file)["traceEvents"]


def breakdown(events: Sequence[dict[str, Any]], *, prefills: int, decodes: int) -> Breakdown:
    """The steps that run just so many requests in prefill and in decode.

    Raises:
        TraceError: there is none; lists those there are.
    """
    kernels = sorted(
        (event for event in events if event.get("cat") in _ON_GPU), key=lambda event: event["ts"]
    )
    steps = _steps(events, kernels)
    chosen = [step for step in steps if (step.prefills, step.decodes) == (prefills, decodes)]
    if not chosen:
        found = sorted({f"{step.prefills} + {step.decodes}" for step in steps})
        raise TraceError(
            f"no step with {prefills} requests in prefill and {decodes} in decode; there are "
            f"{', '.join(found) or 'no steps on a GPU'}"
        )
    parts = [_parts(step, kernels) for step in chosen]
    return Breakdown(
        steps=len(chosen),
        step_ms=statistics.median(step.end - step.begin for step in chosen) / 1e3,
        parts_ms={name: statistics.median(part[name] for part in parts) / 1e3 for name in PARTS},
    )


def kind(kernel: str) -> str:
    """What a kernel belongs to, by its name."""
    return next((name for name, pattern in KINDS if pattern.search(kernel)), OTHER)


def _steps(events: Iterable[dict[str, Any]], kernels: Sequence[dict[str, Any]]) -> list[_Step]:
    marks = sorted(
        (event["ts"], int(found[1]), int(found[2]))
        for event in events
        if event.get("cat") == "gpu_user_annotation"
        and (found := _MARK.fullmatch(event["name"])) is not None
    )
    steps = []
    # The last one's end is not known.
    for (begin, prefills, decodes), (after, *_) in itertools.pairwise(marks):
        ends = [one["ts"] + one["dur"] for one in kernels if begin <= one["ts"] < after]
        end = max(ends, default=after) if decodes == 0 else after
        steps.append(_Step(prefills, decodes, begin, end))
    return steps


def _parts(step: _Step, kernels: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of a step by kind.

    A kernel that starts before the one ahead of it has ended (programmatic dependent launch) is
    counted from that one's end: until then it waits. lm_head is a GEMM like others by its name,
    and the last one of its step.
    """
    own = [event for event in kernels if step.begin <= event["ts"] < step.end]
    kinds = [kind(event["name"]) for event in own]
    gemms = [index for index, name in enumerate(kinds) if name in _GEMMS]
    if gemms:
        kinds[gemms[-1]] = LM_HEAD
    parts = dict.fromkeys(PARTS, 0.0)
    ahead = step.begin
    for event, name in zip(own, kinds, strict=True):
        end = event["ts"] + event["dur"]
        parts[name] += max(0.0, end - max(event["ts"], ahead))
        ahead = max(ahead, end)
    return parts | {IDLE: max(0.0, step.end - step.begin - sum(parts.values()))}
