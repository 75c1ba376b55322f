"""Runs the Triton kernel of the distillation loss on CPUs, and prints what came out as JSON.

Usage: python distill_emulated.py '[{"tokens": 3, "vocab": 17, "dtype": "bfloat16", ...}, ...]'
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from cast_serve.trainer.distillation import triton_kernel as distill_triton
from cast_serve.trainer.distillation.block import block_loss


def run(case: dict) -> dict:
    draw = torch.Generator().manual_seed(case["vocab"])
    tokens, vocab, dtype = case["tokens"], case["vocab"], getattr(torch, case["dtype"])
    # Rows further apart than they are long.
    z = (torch.randn(tokens, vocab + 3, generator=draw) * 4).to(dtype)[:, :vocab]
    t = (torch.randn(tokens, vocab, generator=draw) * 4).to(dtype) if case["teacher"] else None
    labels = torch.randint(vocab, (tokens,), generator=draw)
    labels[1] = -100
    options = {"eta": case["eta"], "temperature": case["temperature"]}
    scale = torch.tensor(0.25)
    # On CPUs block_loss is torch's.
    expected = torch.empty(tokens, vocab)
    wide = t.float() if t is not None else None
    ce, kl = block_loss(z.float(), wide, labels, scale=scale, out_CV=expected, **options)
    distill_triton.BLOCK = case["block"]
    found_ce, found_kl = distill_triton.distill_rows(z, t, labels, scale, out_CV=None, **options)
    own_ce, own_kl = distill_triton.distill_rows(z, t, labels, scale, out_CV=z, **options)
    assert torch.equal(found_ce, own_ce) and torch.equal(found_kl, own_kl)
    return {
        "ce": abs(found_ce.sum() - ce).item() / max(1, abs(ce.item())),
        "kl": abs(found_kl.sum() - kl).item() / max(1, abs(kl.item())),
        "gradient": (z.float() - expected).abs().max().item() / expected.abs().max().item(),
        "ignored": found_ce[1].item() == found_kl[1].item() == z[1].abs().max().item() == 0,
    }


if __name__ == "__main__":
    # Memory from torch.empty holds NaN.
    torch.use_deterministic_algorithms(True)
    print(json.dumps([run(case) for case in json.loads(sys.argv[1])]))
