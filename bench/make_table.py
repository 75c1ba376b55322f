"""Measures the table of plans that ships for a GPU: kernels/tables/NAME.json.

    python -m bench.make_table --models Llama-3.1-8B,Qwen3-14B --minutes 8

Question  Which kernel and config is fastest at each M of `BUCKETS`, for every distinct layer of the
          models? All configs are timed (bench/search.py).
Resumes   Shapes that the table has are left alone (--again measures them), and the file is written
          after every shape: run it until it says that nothing is left.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cast_serve.bench.environment import require_gpu, slug
from cast_serve.bench.linear_results import roof_us
from cast_serve.bench.paths import ROOT
from cast_serve.bench.search import Search
from cast_serve.bench.shapes import MODELS, Layer, Model, find_model
from cast_serve.bench.timing import copy_gbps, dense_tflops
from cast_serve.bench.weights import make_copies
from cast_serve.kernels.plan import BUCKETS, Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.shipped import row_of
from cast_serve.kernels.tune import choose

TABLES = ROOT / "kernels" / "tables"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.make_table", description="Measure the plans that ship for this GPU."
    )
    names = ",".join(model.name for model in MODELS)
    parser.add_argument("--models", default=names, help=f"of {names}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--kernels", default=",".join(KERNELS), help="to time, others are left out")
    parser.add_argument("--minutes", type=float, default=60, help="start no shape after this long")
    parser.add_argument("--again", action="store_true", help="shapes that the table has, too")
    parser.add_argument("--tables", type=Path, default=TABLES, help="the folder to write to")
    options = parser.parse_args(arguments)
    try:
        models = [find_model(name) for name in options.models.split(",")]
        kernels = options.kernels.split(",")
        if unknown := ", ".join(name for name in kernels if name not in KERNELS):
            raise ValueError(f"no kernel {unknown}; there are {', '.join(KERNELS)}")
        device = require_gpu()
    except ValueError as error:
        print(f"make_table: {error}", file=sys.stderr)
        return 2
    left = make_table(
        models,
        kernels=kernels,
        dtype=getattr(torch, options.dtype),
        device=device,
        seconds=options.minutes * 60,
        again=options.again,
        tables=options.tables,
    )
    print(f"{left} shapes left" if left else "nothing left")
    return 0


def make_table(
    models: Sequence[Model],
    *,
    kernels: Sequence[str] = tuple(KERNELS),
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    again: bool = False,
    tables: Path = TABLES,
) -> int:
    """Measure the distinct layers of `models` and write them into the table of the GPU.

    Returns:
        How many shapes were left when `seconds` had passed.
    """
    gpu = torch.cuda.get_device_name(device)
    path, table = find_table(tables, gpu)
    layers = list({(x.N, x.K): x for model in models for x in model.layers}.values())
    known = {(row["N"], row["K"]) for row in table["plans"] if row["dtype"] == _name(dtype)}
    todo = [layer for layer in layers if again or (layer.N, layer.K) not in known]
    started = time.monotonic()
    rates = copy_gbps(device), dense_tflops(device, dtype)
    for index, layer in enumerate(todo):
        if time.monotonic() - started > seconds:
            return len(todo) - index
        problem = Problem.on(device, N=layer.N, K=layer.K, dtype=dtype)
        with torch.inference_mode():
            plan = best_plan(problem, layer, kernels, device, *rates)
        torch.cuda.empty_cache()
        if plan is None:
            continue
        add_plan(table, problem, plan)
        write_table(path, table)
        passed = time.monotonic() - started
        print(f"[{passed:4.0f} s] {problem}: {json.dumps(plan.to_json())}", flush=True)
    return 0


def best_plan(
    problem: Problem,
    layer: Layer,
    kernels: Sequence[str],
    device: torch.device,
    gbps: float,
    tflops: float,
) -> Plan | None:
    """The fastest plan for `problem`; None, with the reasons on stderr, if no kernel runs it."""
    reasons = {name: KERNELS[name].supports(problem) for name in kernels}
    specs = {name: KERNELS[name] for name, reason in reasons.items() if reason is None}
    if not specs:
        print(f"{problem}: {reasons}", file=sys.stderr)
        return None
    layouts = tuple(dict.fromkeys(spec.metadata for spec in specs.values()))
    copies = make_copies(layer, dtype=problem.dtype, layouts=layouts, device=device)
    search = Search(problem=problem, specs=specs, copies=copies)
    timings = {}
    for M in BUCKETS:
        x = torch.randn(M, problem.K, device=device).to(problem.dtype)
        least = roof_us(N=problem.N, K=problem.K, M=M, copy_gbps=gbps, dense_tflops=tflops)
        timings[M] = search.times(x, least_us=least)
        if math.isinf(min(timings[M].values())):
            print(f"{problem}: no kernel is right at M={M}; no plan is written", file=sys.stderr)
            return None
    shares = dict(zip(layouts, copies[0].sparse.metadata_shares, strict=True))
    return choose(timings, {name: spec.metadata for name, spec in specs.items()}, shares)


def find_table(tables: Path, gpu: str) -> tuple[Path, dict[str, Any]]:
    """The table that serves `gpu`, or a new one."""
    for path in sorted(tables.glob("*.json")):
        table = json.loads(path.read_text())
        if gpu == table["gpu"]:
            return path, table
    return tables / f"{slug(gpu)}.json", {"gpu": gpu, "plans": []}


def add_plan(table: dict[str, Any], problem: Problem, plan: Plan) -> None:
    """Put `plan` into `table`, in place of one of the same shape and dtype."""
    row = row_of(problem, plan)
    key = (row["N"], row["K"], row["dtype"])
    kept = [r for r in table["plans"] if (r["N"], r["K"], r["dtype"]) != key]
    table["plans"] = sorted([*kept, row], key=lambda r: (r["dtype"], r["N"], r["K"]))


def write_table(path: Path, table: dict[str, Any]) -> None:
    """One line a plan, whole or not at all."""
    plans = ",\n".join(json.dumps(row) for row in table["plans"])
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(f'{{"gpu": {json.dumps(table["gpu"])}, "plans": [\n{plans}\n]}}\n')
    part.replace(path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
