"""One layer at every M: dense, the op, and kernels that are forced, judged and timed together."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cast_serve.bench.accuracy import Judge
from cast_serve.bench.linear_results import Row, roof_us, sparse_bytes
from cast_serve.bench.search import Search
from cast_serve.bench.shapes import Layer
from cast_serve.bench.timing import time_variants
from cast_serve.bench.weights import make_copies, resident_share
from cast_serve.kernels.op import linear_2of4
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.selection import plan_for, warm

# Eager calls for the host's time: few enough that the launch queue never fills. Their median, for
# the first ones after a wait find host and GPU asleep.
HOST_CALLS = 50

DENSE, OP = "dense", "op"


@dataclass(frozen=True)
class Rates:
    """What roofs are made of, measured in the same run."""

    copy_gbps: float
    dense_tflops: float


@dataclass(frozen=True)
class Forced:
    """A kernel to time beside the op's own choice; without a config, at its best one."""

    kernel: str
    config: str | None

    @classmethod
    def parse(cls, name: str) -> "Forced":
        """From NAME or NAME:CONFIG.

        Raises:
            ValueError: no such kernel.
        """
        kernel, _, config = name.partition(":")
        if kernel not in KERNELS:
            raise ValueError(f"no kernel {kernel!r}; there is {', '.join(KERNELS)}")
        return cls(kernel, config or None)


def measure_layer(
    model: str,
    layer: Layer,
    *,
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    forced: Sequence[Forced],
    rates: Rates,
    budget_ms: float,
    run: str,
) -> list[Row]:
    """A row for the op at each M, then one for each forced kernel that supports the layer.

    Raises:
        NoKernel: nothing supports the layer.
        WrongResult: a kernel is wrong; nothing of that point was timed.
    """
    problem = Problem.on(device, N=layer.N, K=layer.K, dtype=dtype)
    plan = plan_for(problem)
    warm(problem, device)
    forced = [force for force in forced if KERNELS[force.kernel].supports(problem) is None]
    specs = {force.kernel: KERNELS[force.kernel] for force in forced}
    layouts = dict.fromkeys((*plan.layouts, *(spec.metadata for spec in specs.values())))
    resident = {
        OP: resident_share(layer, dtype=dtype, layouts=plan.layouts),
        **{
            name: resident_share(layer, dtype=dtype, layouts=(spec.metadata,))
            for name, spec in specs.items()
        },
    }
    copies = make_copies(layer, dtype=dtype, layouts=tuple(layouts), device=device)
    search = Search(problem=problem, specs=specs, copies=copies)
    rows = []
    for M in tokens:
        x = torch.randn(M, layer.K, device=device).to(dtype)
        least = roof_us(
            N=layer.N,
            K=layer.K,
            M=M,
            copy_gbps=rates.copy_gbps,
            dense_tflops=rates.dense_tflops,
        )
        choice = plan.choice(M)
        names = {OP: (choice.kernel, choice.config)}
        calls: dict[str, list[Callable[[], torch.Tensor]]] = {
            DENSE: [partial(torch.nn.functional.linear, x, copy.dense) for copy in copies],
            OP: [
                partial(
                    linear_2of4,
                    x,
                    copy.sparse.values,
                    [copy.metadata(layout) for layout in plan.layouts],
                    None,
                )
                for copy in copies
            ],
        }
        for force in forced:
            candidate = (force.kernel, _config(force, search, x, least))
            names[force.kernel] = candidate
            calls[force.kernel] = search.calls(candidate, x)
        judge = Judge.of(x, copies[0].dense)
        for name, (kernel, config) in names.items():
            judge.check(f"{kernel} {config} for {model} {layer.name}", calls[name][0])
        # Before timing: the exact result of 16384 tokens is gigabytes.
        del judge
        workspaces = {name: workspace_bytes(calls[name][0]) for name in names}
        timings = time_variants(calls, least_us=least, budget_ms=budget_ms)
        moved = sparse_bytes(N=layer.N, K=layer.K, M=M)
        for name, (kernel, config) in names.items():
            rows.append(
                Row(
                    model=model,
                    layer=layer.name,
                    N=layer.N,
                    K=layer.K,
                    M=M,
                    dtype=str(dtype).removeprefix("torch."),
                    kernel=kernel,
                    config=config,
                    selected=name == OP,
                    dense_us=timings[DENSE].us,
                    dense_iqr_us=timings[DENSE].iqr_us,
                    sparse_us=timings[name].us,
                    sparse_iqr_us=timings[name].iqr_us,
                    gbps=moved / timings[name].us / 1e3,
                    copy_gbps=rates.copy_gbps,
                    dense_tflops=rates.dense_tflops,
                    host_us=host_us(calls[name][0]),
                    resident=resident[name],
                    workspace_bytes=workspaces[name],
                    run=run,
                )
            )
    return rows


def host_us(call: Callable[[], object]) -> float:
    """Host microseconds an eager call takes until it returns; the GPU is not waited for."""
    torch.cuda.synchronize()
    taken = []
    for _ in range(HOST_CALLS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return statistics.median(taken) * 1e6


def workspace_bytes(call: Callable[[], torch.Tensor]) -> int:
    """Bytes of torch's allocator that an eager call takes beside its result, and gives back."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    kept = result.nbytes
    return torch.cuda.max_memory_allocated() - before - kept


def _config(force: Forced, search: Search, x: torch.Tensor, least_us: float) -> str:
    """The config that is forced, prepared, or the fastest one of its kernel."""
    if force.config is not None:
        search.specs[force.kernel].prepare(search.problem, force.config, x.shape[0])
        return force.config
    alone = Search(
        problem=search.problem,
        specs={force.kernel: search.specs[force.kernel]},
        copies=search.copies,
    )
    times = alone.times(x, least_us=least_us)
    return min(times, key=lambda candidate: times[candidate])[1]
