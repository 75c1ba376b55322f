"""Few launches of every kernel on small shapes, for compute-sanitizer, which slows them down a lot.

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \\
        python -m pytest tests/kernels/test_sanitize.py

The same with `--tool racecheck`. API errors are left out: looking up what a driver does not have
is one.
"""

import pytest
import torch
from layers import random_packed

from cast_serve.kernels.packing import unpack
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.weight import build

pytestmark = pytest.mark.gpu

# Beside a kernel's first guess: K split over a cluster, x shared in one, both, sums that take the
# place of stages, and large tiles.
CONFIGS = {
    "wgmma_sp": (
        "g1x1-t8-w256-k2-o2",
        "g2x1-t64-w256-k1c2-o1",
        "g1x1-t64-w256-k2c2-o1",
        "g2x1-t128-w256-k2-o1",
        "g2x2-t192-w128-k1c2-o1",
        "g2x1-t256-w128-k1-o1",
    )
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("N", "K"), [(16, 64), (144, 576), (272, 1536)])
@pytest.mark.parametrize("M", [1, 33, 130])
def test_small_shapes(kernel, N, K, M):
    spec = KERNELS[kernel]
    device = torch.device("cuda", torch.cuda.current_device())
    problem = Problem.on(device, N=N, K=K, dtype=torch.bfloat16)
    if reason := spec.supports(problem):
        pytest.skip(f"{kernel}: {reason}")
    values, mask = random_packed(N, K, torch.bfloat16, "cuda")
    weight = build(values, mask, (spec.metadata,))
    x = torch.randn(M, K, device=device).bfloat16()
    bias = torch.randn(N, device=device).bfloat16()
    exact = x.double() @ unpack(values, mask).double().t() + bias.double()
    guesses = spec.configs(problem, M)
    splits = [name for name in CONFIGS.get(kernel, ()) if K > 64 or "k1" in name]
    for config in (guesses[0], *splits):
        spec.prepare(problem, config, M)
        y = spec.run(x, weight.values, weight.metadata[0], bias, config)
        assert (y.double() - exact).norm() <= 5e-3 * exact.norm()
