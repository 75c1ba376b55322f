"""Runs mma_sp on CPUs, its instructions emulated, and prints what came out as JSON.

Usage: python mma_sp_emulated.py '[{"M": 3, "N": 16, "K": 64, "dtype": "bfloat16", ...}, ...]'
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import ptx_emulation
import torch

from cast_serve.kernels.mma_sp import SPEC, metadata_layout
from cast_serve.kernels.packing import pack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.kernels.reference import spmm_ref


def run(case: dict) -> dict:
    torch.manual_seed(case["M"] + case["N"] + case["K"])
    M, N, K, dtype = case["M"], case["N"], case["K"], getattr(torch, case["dtype"])
    weight = torch.randn(N, K)
    values, mask = pack((weight * nm_mask(weight)).to(dtype))
    x = torch.randn(M, K + case["gap"]).to(dtype)[:, :K]
    for token, column, value in case["special"]:
        x[token, column] = float(value)
    bias = torch.randn(N).to(dtype) if case["bias"] else None
    y = SPEC.run(x, values, metadata_layout(mask), bias, case["config"])
    # Products of kept entries only, as the hardware has them: no 0 * inf of a pruned entry.
    clean = torch.where(x.isfinite(), x, torch.zeros_like(x))
    expected = spmm_ref(clean.float(), values, mask, bias)
    finite = torch.ones(M, N, dtype=torch.bool)
    for token, column, _ in case["special"]:
        bit = mask[:, column // 8] >> column % 8 & 1
        finite[token] &= bit == 0
    # Relative to each output, with room for the sum's order where terms cancel.
    error = (y.float() - expected).abs() / (expected.abs() + 1e-3 * expected.abs().max())
    return {
        "error": error[finite].max().item(),
        "finite_where_unused": bool(y[finite].isfinite().all()),
        "special_where_used": bool((~y[~finite].isfinite()).all()),
    }


if __name__ == "__main__":
    ptx_emulation.install()
    # Memory from torch.empty holds NaN.
    torch.use_deterministic_algorithms(True)
    print(json.dumps([run(case) for case in json.loads(sys.argv[1])]))
