"""Plans that ship with the package: kernels/tables/<name>.json, measured by bench/make_table.py.

A table is {"gpu": "NVIDIA H200", "plans": [row, ...]}, a row what `row_of` gives. It serves GPUs of
that very name: another form factor, or a slice of one, has other clocks and multiprocessors.

Tables are measured in bfloat16. float16 moves the same bytes at the same instruction rate, so a
bfloat16 row serves float16 where the table has none of its own. Not one with cuSPARSELt, which has
kernels of its own for each dtype.
"""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

import torch

from cast_serve.kernels import cusparselt
from cast_serve.kernels.cache import versions
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.problem import Problem


def row_of(problem: Problem, plan: Plan) -> dict[str, Any]:
    """The row of a plan measured here.

    It has cuSPARSELt's version where the plan runs it: its kernels get faster or slower from one
    version to the next.
    """
    row = {**_key(problem), "plan": plan.to_json()}
    if _uses_cusparselt(plan):
        row["cusparselt"] = versions()["cusparselt"]
    return row


def find(problem: Problem) -> Plan | None:
    """The shipped plan for this GPU, shape, dtype and cuSPARSELt, if there is one."""
    rows = [row for table in tables() if problem.gpu == table["gpu"] for row in table["plans"]]
    own = _row(rows, problem)
    if own is not None:
        return _plan_here(own)
    if problem.dtype is not torch.float16:
        return None
    lent = _row(rows, dataclasses.replace(problem, dtype=torch.bfloat16))
    if lent is None:
        return None
    plan = Plan.from_json(lent["plan"])
    return None if _uses_cusparselt(plan) else plan


def _row(rows: list[dict[str, Any]], problem: Problem) -> dict[str, Any] | None:
    key = _key(problem)
    return next((row for row in rows if {name: row[name] for name in key} == key), None)


@functools.cache
def tables() -> list[dict[str, Any]]:
    """Every shipped table."""
    folder = resources.files("cast_serve.kernels") / "tables"
    return [
        json.loads(file.read_text())
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".json")
    ]


def _plan_here(row: dict[str, Any]) -> Plan | None:
    plan = Plan.from_json(row["plan"])
    if _uses_cusparselt(plan) and row.get("cusparselt") != versions()["cusparselt"]:
        return None
    return plan


def _uses_cusparselt(plan: Plan) -> bool:
    return any(row.kernel == cusparselt.SPEC.name for row in plan.rows)


def _key(problem: Problem) -> dict[str, Any]:
    return {"N": problem.N, "K": problem.K, "dtype": problem.dtype_name}
