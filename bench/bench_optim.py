"""How much longer than AdamW's does a step of AdamS take, on the same parameters?

    python -m bench.bench_optim                                  SmolLM2-135M and a Llama of 1B
    python -m bench.bench_optim --models SmolLM2-135M
    python -m bench.bench_optim                                  on a CPU: a small model, one table

Against   torch.optim.AdamW(fused=True), and foreach. The floor: AdamS by Triton, with its mask
          refreshes spread over the T1 = 10 steps between them, in at most 1.10 of AdamW fused.
Roof      The bytes a step must read and write at the speed of a device-to-device copy: 28 a weight
          for AdamW, 29 for AdamS where it is sparsified, 6 more at a refresh.
Method    Ten steps between two CUDA events, with nothing waited for in between, so that the host's
          part counts where it is the longer one; variants in turn, after a warm-up; median and IQR.
          Gradients lie where they lay the step before. Steps with a refresh are timed on their own.
Writes    optim-GPU.json under --out; on a CPU only where --out is given. The last line on stdout is
          one JSON object.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from cast_serve.bench import environment
from cast_serve.bench.by_model import add_common_arguments, find_device, find_models, run
from cast_serve.bench.decoders import Decoder
from cast_serve.bench.result_file import positive
from cast_serve.bench.timing import Timing, copy_gbps
from cast_serve.kernels.measure import stream_time_us
from cast_serve.trainer.adams.optimizer import AdamS
from cast_serve.trainer.config import Pattern

MOST_RATIO = 1.10
MASK_INTERVAL = 10
BURST = 10
WARM_UP = 3
# Read w, g, m, v; write w, m, v. AdamS also reads a mask of one byte.
ADAMW_BYTES, MASK_BYTES, REFRESH_BYTES = 28, 1, 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer on one model's parameters.

    Attributes:
        step_us, refresh_us: medians of a step without and with a mask refresh, equal for AdamW;
            *_iqr_us their interquartile ranges.
        mean_us: a step with refreshes spread over the steps between them.
        adamw_us: AdamW fused in the same run.
        gbps: bytes that a step without refresh must move / step_us.
        copy_gbps: a large copy in the same run, bytes read and written; 0 on a CPU.
    """

    model: str
    optimizer: str
    parameters: int
    tensors: int
    step_us: float
    step_iqr_us: float
    refresh_us: float
    refresh_iqr_us: float
    mean_us: float
    adamw_us: float
    gbps: float
    copy_gbps: float
    run: str

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.optimizer

    @property
    def ratio(self) -> float:
        """Time per step over AdamW's."""
        return self.mean_us / self.adamw_us


def fault(row: Row) -> str | None:
    """What is wrong with the values of a row."""
    good = positive(row.step_us, row.refresh_us, row.mean_us, row.adamw_us, row.gbps)
    return None if good else "a time or rate that is not above zero"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 2 cannot run as asked."""
    parser = argparse.ArgumentParser(
        prog="cast-bench optim", description="Time a step of AdamS against torch's AdamW."
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--repeats", type=int, default=50, metavar="N", help=f"times {BURST} steps of each"
    )
    given = parser.parse_args(arguments)
    device = find_device()
    on_gpu = device.type == "cuda"
    try:
        models = find_models(given.models, device)
        if given.repeats < 2:
            raise ValueError(f"--repeats {given.repeats}: needs 2 or more")
    except ValueError as error:
        print(f"bench_optim: {error}", file=sys.stderr)
        return 2
    copy_rate = copy_gbps(device) if on_gpu else 0.0
    env = environment.describe(device if on_gpu else None, commit=given.commit)
    env["copy_gbps"] = copy_rate
    run(
        "optim",
        models,
        env,
        row_type=Row,
        fault=fault,
        measure=partial(
            measure, device=device, repeats=given.repeats, copy_rate=copy_rate, run=env["run"]
        ),
        show=show,
        summarize=summarize,
        device=device,
        out=given.out,
    )
    return 0


def measure(
    model: Decoder, *, device: torch.device, repeats: int, copy_rate: float, run: str
) -> list[Row]:
    """The rows of a model: every way to make a step that this device has."""
    sparse = [_parameter(shape, device) for shape in model.linears()]
    dense = [_parameter(shape, device) for shape in model.rest()]
    count = sum(p.numel() for p in (*sparse, *dense))
    sparse_count = sum(p.numel() for p in sparse)
    optimizers = _optimizers(sparse, dense, device)
    samples: dict[tuple[str, bool], list[float]] = {}
    for turn in range(WARM_UP + repeats):
        for name, optimizer in optimizers.items():
            for refresh in (True, False) if isinstance(optimizer, AdamS) else (False,):
                us = _time_us(partial(_burst, optimizer, refresh=refresh), device) / BURST
                if turn >= WARM_UP:
                    samples.setdefault((name, refresh), []).append(us)
    timings = {key: Timing.of(taken) for key, taken in samples.items()}
    rows = []
    for name, optimizer in optimizers.items():
        step = timings[name, False]
        refresh_step = timings.get((name, True), step)
        moved = ADAMW_BYTES * count + MASK_BYTES * sparse_count * isinstance(optimizer, AdamS)
        rows.append(
            Row(
                model=model.name,
                optimizer=name,
                parameters=count,
                tensors=len(sparse) + len(dense),
                step_us=step.us,
                step_iqr_us=step.iqr_us,
                refresh_us=refresh_step.us,
                refresh_iqr_us=refresh_step.iqr_us,
                mean_us=step.us + (refresh_step.us - step.us) / MASK_INTERVAL,
                adamw_us=timings["AdamW fused", False].us,
                gbps=moved / step.us / 1e3,
                copy_gbps=copy_rate,
                run=run,
            )
        )
    return rows


def show(rows: Sequence[Row]) -> Table:
    """A table of a model's rows."""
    first = rows[0]
    table = Table(title=f"{first.model}: {first.parameters:,} in {first.tensors} tensors")
    for name in (
        "optimizer",
        "step us ± IQR",
        "with refresh",
        "mean",
        "x AdamW",
        "GB/s",
        "of copy",
    ):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for row in rows:
        table.add_row(
            row.optimizer,
            f"{row.step_us:.0f} ± {row.step_iqr_us:.0f}",
            f"{row.refresh_us:.0f} ± {row.refresh_iqr_us:.0f}",
            f"{row.mean_us:.0f}",
            f"{row.ratio:.3f}",
            f"{row.gbps:.0f}",
            f"{row.gbps / row.copy_gbps:.0%}" if row.copy_gbps else "",
        )
    return table


def summarize(env: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What the last line says: each model's ratio, and whether the floor holds where it counts."""
    ratios = {row.model: row.ratio for row in rows if row.optimizer == "AdamS triton"}
    return {
        "benchmark": "optim",
        "gpu": env["gpu"],
        "commit": env["commit"],
        "most_ratio": MOST_RATIO,
        "ratios": ratios,
        "missed": [model for model, ratio in ratios.items() if ratio > MOST_RATIO],
        "rows": [asdict(row) for row in rows],
    }


def _parameter(shape: tuple[int, ...], device: torch.device) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(shape, device=device) * 0.02)
    parameter.grad = torch.randn(shape, device=device) * 1e-3
    return parameter


def _optimizers(
    sparse: list[torch.nn.Parameter], dense: list[torch.nn.Parameter], device: torch.device
) -> dict[str, torch.optim.Optimizer]:
    """The ways, by name; each has its own state, and all move the same parameters."""
    lr = 1e-4
    found: dict[str, torch.optim.Optimizer] = {
        "AdamW fused": torch.optim.AdamW([*sparse, *dense], lr=lr, fused=True),
        "AdamW foreach": torch.optim.AdamW([*sparse, *dense], lr=lr, foreach=True),
    }
    for name in ("triton", "reference") if device.type == "cuda" else ("reference",):
        groups: list[dict[str, Any]] = [
            {"params": sparse, "input_dim": 1},
            {"params": dense, "input_dim": None},
        ]
        found[f"AdamS {name}"] = AdamS(
            groups,
            lr=lr,
            decay=1e-5,
            total_steps=10_000,
            pattern=Pattern(kept=2, group=4),
            mask_interval=MASK_INTERVAL,
            implementation=name,  # type: ignore[arg-type]
        )
    return found


def _burst(optimizer: torch.optim.Optimizer, *, refresh: bool) -> None:
    """Steps in a row, all of them with a mask refresh or all without."""
    for _ in range(BURST):
        if isinstance(optimizer, AdamS):
            for group in optimizer.param_groups:
                group["step"] = 10 * MASK_INTERVAL + (0 if refresh else 1)
        optimizer.step()


def _time_us(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return stream_time_us(call)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    sys.exit(main())
