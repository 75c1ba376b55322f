"""Every kernel on every kind of layer: as exact as torch's dense linear, and nothing else touched.

The judge is the product in fp64. A kernel may err at most twice as much as torch's linear does on
the same inputs and dense weights, in norm and in the worst entry; where torch is lucky, twice as
much as the fp64 result rounded once. The reference kernel goes through the same tests on a CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import triton
from layers import random_packed
from torch import Tensor

from cast_serve.bench.shapes import SHAPES
from cast_serve.kernels import nvrtc
from cast_serve.kernels.cusparselt_abi import Library
from cast_serve.kernels.op import linear_2of4
from cast_serve.kernels.packing import unpack
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS, NAMED
from cast_serve.kernels.selection import plan_for, warm
from cast_serve.kernels.spec import KernelSpec
from cast_serve.kernels.weight import SparseWeight, build

BF16, FP16 = torch.bfloat16, torch.float16

TOKENS = (1, 2, 7, 8, 9, 16, 33, 63, 64, 127, 500, 2048)
FEW_TOKENS = (1, 16, 500)

# Of a kernel's guesses at each M, the ones run here: compiling a config takes seconds.
CONFIGS = 2

# K of one step of an instruction, N of one tile, and K that are no powers of two.
ODD_SHAPES = ((16, 64), (16, 4096), (272, 64), (48, 576), (144, 1536), (80, 11008), (4096, 13824))

pytestmark = pytest.mark.usefixtures("poisoned_memory", "forget_plans")


def cases() -> Iterator[tuple[int, int, torch.dtype, tuple[int, ...]]]:
    """N, K, dtype and the M to run: the weights of one case are made once for all kernels and M."""
    main = [(layer.N, layer.K) for layer in SHAPES["Llama-3.1-8B"]]
    others = {(layer.N, layer.K) for layers in SHAPES.values() for layer in layers} - {*main}
    for N, K in main:
        yield N, K, BF16, TOKENS
    yield *main[0], FP16, TOKENS
    for N, K in sorted(others):
        yield N, K, BF16, FEW_TOKENS
    for N, K in ODD_SHAPES:
        yield N, K, BF16, TOKENS
        yield N, K, FP16, FEW_TOKENS


def on_gpu(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.gpu)


# Ordered so that the cached weights of a case serve its neighbours.
GPU_CASES = [
    on_gpu(kernel, N, K, dtype, M) for N, K, dtype, Ms in cases() for M in Ms for kernel in KERNELS
]
CPU_CASES = [("reference", *shape, BF16, M) for shape in ODD_SHAPES[:5] for M in (1, 9, 64)]

EVERY_KERNEL = ["reference", *(on_gpu(kernel) for kernel in KERNELS)]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight as packed, as torch's linear takes it, and exact."""

    values: Tensor
    mask: Tensor
    dense: Tensor

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.dense.shape
        return N, K

    def problem(self) -> Problem:
        N, K = self.shape
        if self.device.type == "cpu":
            return Problem(N=N, K=K, dtype=self.values.dtype, capability=(0, 0), gpu="none")
        return Problem.on(self.device, N=N, K=K, dtype=self.values.dtype)


# One weight of Llama-2-13B takes a gigabyte in fp64, so only the current one is kept.
@lru_cache(maxsize=1)
def layer_of(N: int, K: int, dtype: torch.dtype, device: str) -> Layer:
    values, mask = random_packed(N, K, dtype, device)
    return Layer(values=values, mask=mask, dense=unpack(values, mask))


@lru_cache(maxsize=4)
def built(N: int, K: int, dtype: torch.dtype, device: str, layout: str) -> SparseWeight:
    layer = layer_of(N, K, dtype, device)
    return build(layer.values, layer.mask, (layout,))


@lru_cache(maxsize=1)
def exact_weight(N: int, K: int, dtype: torch.dtype, device: str) -> Tensor:
    return layer_of(N, K, dtype, device).dense.double()


def device_of(kernel: str) -> str:
    return "cpu" if kernel == "reference" else "cuda"


def supported(kernel: str, layer: Layer) -> KernelSpec:
    """The kernel, or a skip with its reason."""
    spec = NAMED[kernel]
    if reason := spec.supports(layer.problem()):
        pytest.skip(f"{kernel}: {reason}")
    return spec


def tokens_of(M: int, layer: Layer, *, seed: int = 0) -> Tensor:
    generator = torch.Generator(layer.device).manual_seed(seed)
    x = torch.randn(M, layer.shape[1], generator=generator, device=layer.device)
    return x.to(layer.values.dtype)


def bias_of(layer: Layer) -> Tensor:
    generator = torch.Generator(layer.device).manual_seed(1)
    # As large as y: a bias that is rounded before it is added shows.
    bias = torch.randn(layer.shape[0], generator=generator, device=layer.device) * 30
    return bias.to(layer.values.dtype)


def run(
    spec: KernelSpec, layer: Layer, x: Tensor, bias: Tensor | None = None, *, config: str = ""
) -> Tensor:
    """The kernel with `config`, else its first guess, prepared for it."""
    config = config or spec.configs(layer.problem(), x.shape[0])[0]
    spec.prepare(layer.problem(), config, x.shape[0])
    N, K = layer.shape
    weight = built(N, K, x.dtype, layer.device.type, spec.metadata)
    return spec.run(x, weight.values, weight.metadata[0], bias, config)


def assert_as_exact_as_torch(y: Tensor, x: Tensor, layer: Layer, bias: Tensor | None) -> None:
    exact = x.double() @ exact_weight(*layer.shape, x.dtype, layer.device.type).t()
    if bias is not None:
        exact += bias.double()
    assert y.shape == exact.shape and y.dtype == x.dtype

    def error(result: Tensor) -> tuple[float, float]:
        difference = result.double() - exact
        return difference.norm().item(), difference.abs().max().item()

    torch_error = error(torch.nn.functional.linear(x, layer.dense, bias))
    rounding = error(exact.to(x.dtype))
    for ours, theirs, least in zip(error(y), torch_error, rounding, strict=True):
        assert ours <= 2 * max(theirs, least)


@pytest.mark.parametrize(("kernel", "N", "K", "dtype", "M"), [*CPU_CASES, *GPU_CASES])
def test_accuracy(kernel, N, K, dtype, M):
    layer = layer_of(N, K, dtype, device_of(kernel))
    spec = supported(kernel, layer)
    x = tokens_of(M, layer)
    for config in spec.configs(layer.problem(), M)[:CONFIGS]:
        assert_as_exact_as_torch(run(spec, layer, x, config=config), x, layer, None)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("M", [1, 8, 64, 512])
def test_accuracy_of_every_config(kernel, M):
    layer = layer_of(576, 1536, BF16, "cuda")
    spec = supported(kernel, layer)
    x, bias = tokens_of(M, layer), bias_of(layer)
    for config in spec.configs(layer.problem(), M):
        assert_as_exact_as_torch(run(spec, layer, x, bias, config=config), x, layer, bias)


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("M", [1, 9, 64, 500])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_bias(kernel, M, dtype):
    layer = layer_of(272, 576, dtype, device_of(kernel))
    spec = supported(kernel, layer)
    x, bias = tokens_of(M, layer), bias_of(layer)
    assert_as_exact_as_torch(run(spec, layer, x, bias), x, layer, bias)


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("M", [1, 9, 500])
def test_rows_that_lie_apart(kernel, M):
    """As a slice of a wider tensor: the stride is a multiple of 16 bytes, and what lies between
    the rows is poison."""
    layer = layer_of(272, 576, BF16, device_of(kernel))
    spec = supported(kernel, layer)
    x = tokens_of(M, layer)
    wide = torch.full((M, 3 * 576), float("nan"), dtype=BF16, device=layer.device)
    apart = wide[:, 576 : 2 * 576]
    apart.copy_(x)
    assert torch.equal(run(spec, layer, apart), run(spec, layer, x))


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("M", [8, 64, 500])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_non_finite_tokens(kernel, M, value):
    """They come through wherever a kept weight meets them, and stay in their token."""
    layer = layer_of(272, 576, BF16, device_of(kernel))
    spec = supported(kernel, layer)
    x = tokens_of(M, layer)
    clean = run(spec, layer, x)
    assert clean.isfinite().all()
    hit = torch.zeros(M, dtype=torch.bool, device=layer.device)
    columns = {0: 0, M // 2: 301, M - 1: 575}
    for token, column in columns.items():
        x[token, column] = value
        hit[token] = True
    y = run(spec, layer, x)
    assert torch.equal(y[~hit], clean[~hit])
    for token, column in columns.items():
        met = layer.dense[:, column] != 0
        assert not y[token, met].isfinite().any()
        if value == value:
            expected = layer.dense[met, column].sign() * value
            if kernel == "cusparselt":  # its docstring says so
                expected = torch.where(expected < 0, torch.nan, expected)
            torch.testing.assert_close(y[token, met], expected, rtol=0, atol=0, equal_nan=True)
        # Elsewhere the product with a pruned 0 is either left out, or NaN as in a dense product.
        assert torch.logical_or(y[token, ~met] == clean[token, ~met], y[token, ~met].isnan()).all()


@pytest.mark.parametrize("kernel", EVERY_KERNEL)
@pytest.mark.parametrize("M", [1, 16, 127, 2048])
def test_runs_are_bit_identical(kernel, M):
    layer = layer_of(272, 4096, BF16, device_of(kernel))
    spec = supported(kernel, layer)
    x = tokens_of(M, layer)
    first = run(spec, layer, x)
    assert all(torch.equal(run(spec, layer, x), first) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("M", [1, 16, 500])
def test_nothing_beside_the_output_is_written(kernel, M):
    """x, weights, and the bytes around the output are as before."""
    layer = layer_of(272, 576, BF16, "cuda")
    spec = supported(kernel, layer)
    weight = built(272, 576, BF16, "cuda", spec.metadata)
    x, bias = tokens_of(M, layer), bias_of(layer)
    held = [x, bias, weight.values, *weight.metadata]
    before = [tensor.clone() for tensor in held]
    run(spec, layer, x, bias)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@dataclass(frozen=True, kw_only=True)
class Forced:
    """A layer for the op, which is forced to one kernel."""

    layer: Layer
    plan: Plan
    weight: SparseWeight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_2of4(x, self.weight.values, list(self.weight.metadata), bias)


@pytest.fixture(params=list(NAMED))
def forced(request, monkeypatch, forget_plans) -> Forced:
    layer = layer_of(512, 1024, BF16, "cuda")
    supported(request.param, layer)
    monkeypatch.setenv("CAST_SERVE_KERNEL", request.param)
    forget_plans()
    warm(layer.problem(), torch.device("cuda", torch.cuda.current_device()))
    plan = plan_for(layer.problem())
    return Forced(layer=layer, plan=plan, weight=build(layer.values, layer.mask, plan.layouts))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [0, 1, 9, 64, 500])
def test_op(forced, M):
    x, bias = tokens_of(M, forced.layer), bias_of(forced.layer)
    y = forced(x.view(1, M, 1, 1024), bias)
    assert y.shape == (1, M, 1, 512)
    if M:
        assert_as_exact_as_torch(y.flatten(0, 2), x, forced.layer, bias)


@pytest.mark.gpu
def test_op_copies_what_kernels_cannot_read(forced):
    base = tokens_of(8, forced.layer)
    expected = forced(base)
    shifted = torch.empty(8, 1032, dtype=BF16, device="cuda")[:, 1:1025]
    assert torch.equal(forced(shifted.copy_(base)), expected)
    assert torch.equal(forced(base.t().contiguous().t()), expected)
    assert torch.equal(forced(base[:1].expand(8, -1)), forced(base[:1].repeat(8, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 64, 500])
def test_op_opcheck(forced, M):
    arguments = (tokens_of(M, forced.layer), forced.weight.values, list(forced.weight.metadata))
    torch.library.opcheck(linear_2of4, (*arguments, bias_of(forced.layer)))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 256, 500])
def test_op_in_a_cuda_graph(forced, M):
    """Captured without a call before it, and replayed on other tokens."""
    x, bias = tokens_of(M, forced.layer), bias_of(forced.layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forced(x, bias)
    for seed in (1, 2):
        x.copy_(tokens_of(M, forced.layer, seed=seed))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, forced(x, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 64, 500])
def test_op_on_a_side_stream(forced, M):
    """It runs on the current stream: x is written there, behind work that delays it."""
    x = tokens_of(M, forced.layer)
    expected = forced(x)
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = forced(late)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_serving_compiles_nothing_and_never_waits(forced, monkeypatch):
    """After `warm`: no Triton or NVRTC compilation, no module loaded, no cuSPARSELt call but the
    product, no synchronisation, at any M."""
    happened: list[str] = []

    def record(name: str):
        return lambda *args, **kwargs: happened.append(name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", record("Triton"))
    monkeypatch.setattr(nvrtc, "compile_cubin", record("NVRTC"))
    monkeypatch.setattr(nvrtc.Function, "__init__", record("module"))
    monkeypatch.setattr(Library, "call", record("cuSPARSELt"))
    xs = [tokens_of(M, forced.layer) for M in (1, 3, 8, 17, 64, 100, 500, 1000, 5000, 20000)]
    bias = bias_of(forced.layer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in xs:
            forced(x)
            forced(x, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert happened == []


@pytest.mark.gpu
def test_reference_kernel_on_a_gpu():
    """What CAST_SERVE_KERNEL=reference runs, when a kernel is in doubt."""
    layer = layer_of(512, 1024, BF16, "cuda")
    x, bias = tokens_of(9, layer), bias_of(layer)
    assert_as_exact_as_torch(run(NAMED["reference"], layer, x, bias), x, layer, bias)
