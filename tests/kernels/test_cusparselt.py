import ctypes

import pytest
import torch

from cast_serve.kernels import cusparselt, cusparselt_abi, cusparselt_plan
from cast_serve.kernels.cusparselt_abi import ELEMENTS, LibraryNotFoundError, Opaque, open_shared
from cast_serve.kernels.cusparselt_plan import BUCKETS, MAX_BUCKET, Plan, Plans, buckets
from cast_serve.kernels.packing import pack, unpack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.reference import spmm_ref

DTYPES = list(ELEMENTS)
# qkv of SmolLM2-135M, a K that is no power of two, the smallest K, and sizes the library pads.
SHAPES = [(960, 576), (512, 1792), (256, 64), (16, 48)]
# In and between buckets, and above the largest that `Layer` prepares.
ROWS = [1, 7, 16, 17, 63, 64, 127, 128, 129, 143, 144, 256, 500]
LARGEST_PREPARED = 256


def problem_of(
    N: int = 256, K: int = 128, dtype: torch.dtype = torch.bfloat16, sm: tuple[int, int] = (9, 0)
) -> Problem:
    return Problem(N=N, K=K, dtype=dtype, capability=sm, gpu="test")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        pytest.param(
            problem_of(dtype=torch.float32),
            "float32 is not one of bfloat16, float16",
            id="dtype",
        ),
        pytest.param(
            problem_of(sm=(10, 0)),
            "sm_100 is not one of sm_80, sm_86, sm_89, sm_90",
            id="blackwell",
        ),
        pytest.param(
            problem_of(sm=(7, 5)),
            "sm_75 is not one of sm_80, sm_86, sm_89, sm_90",
            id="turing",
        ),
        pytest.param(problem_of(N=100), "N=100 is not a multiple of 16", id="N"),
        pytest.param(problem_of(N=0), "N=0 is not a multiple of 16", id="N0"),
        pytest.param(problem_of(K=72), "K=72 is not a multiple of 16", id="K"),
    ],
)
def test_supports_says_why_not(problem: Problem, reason: str) -> None:
    assert cusparselt.supports(problem) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_supports_without_gpu() -> None:
    assert cusparselt.supports(problem_of()) == "torch sees no CUDA device"


def test_open_shared_says_what_it_searched() -> None:
    with pytest.raises(LibraryNotFoundError) as raised:
        open_shared("libnot-there.so.0", ("no-such-package", "torch"))
    message = str(raised.value)
    assert "libnot-there.so.0" in message
    assert "packages searched: no-such-package, torch" in message
    assert "Install the one for the CUDA of torch" in message


def test_load_declares_every_function() -> None:
    try:
        library = cusparselt_abi.load()
    except LibraryNotFoundError as error:
        pytest.skip(str(error))
    assert library.version >= cusparselt_abi.MIN_VERSION
    # A null handle: refused by every version, with or without a GPU.
    with pytest.raises(cusparselt_abi.CusparseltError, match=r"^cusparseLtInit: .*status \d+"):
        library.call("cusparseLtInit", None)


def test_opaque_is_large_and_aligned() -> None:
    # cusparseLt.h: uint8_t data[1024] in 0.7.1; alignas(16) uint8_t data[512] in 0.8.0 and 0.8.1.
    assert cusparselt_abi.OPAQUE_BYTES >= 1024
    for _ in range(16):
        opaque = Opaque()
        address = opaque._as_parameter_
        assert address % 16 == 0
        start = ctypes.addressof(opaque._memory)
        assert start <= address
        assert address + 1024 <= start + ctypes.sizeof(opaque._memory)


def test_enum_values() -> None:
    """Those of cusparseLt.h 0.7.1 to 0.8.1, and of cuSPARSE's and CUDA's library_types.h."""
    assert ELEMENTS[torch.float16].value == 2
    assert ELEMENTS[torch.bfloat16].value == 14
    assert {element.compute for element in ELEMENTS.values()} == {2}
    assert (cusparselt_abi.ORDER_COLUMN, cusparselt_abi.ORDER_ROW) == (1, 2)


def test_configs_are_one() -> None:
    assert cusparselt.configs(problem_of(), 512) == ("default",)


def test_prepare_refuses_config() -> None:
    with pytest.raises(ValueError, match="has no config 'alg36': there is 'default' alone"):
        cusparselt.prepare(problem_of(), "alg36", 512)


def test_buckets_ascend_in_16s() -> None:
    assert BUCKETS[:6] == (16, 32, 48, 64, 80, 96)
    assert BUCKETS[-1] == MAX_BUCKET
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert all(rows % 16 == 0 for rows in BUCKETS)


def test_buckets_waste_little() -> None:
    """M's octave holds a bucket at or above M, within 15 rows or an eighth of it."""
    for M in range(1, MAX_BUCKET + 1):
        upper = min(rows for rows in buckets(M) if rows >= M)
        assert upper - M < max(16, M / 8), M


def test_buckets_of_powers_of_two_are_all() -> None:
    prepared = [rows for power in range(15) for rows in buckets(1 << power)]
    assert sorted(set(prepared)) == list(BUCKETS)
    assert buckets(1 << 16) == buckets(MAX_BUCKET)


def plans_with(*rows: int) -> Plans:
    nothing = Opaque()
    weight = cusparselt_plan.Weight(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        N=16,
        K=16,
        handle=nothing,
        descriptor=nothing,
    )
    plans = Plans(weight=weight)
    plans.add(
        [
            Plan(
                rows=count,
                workspace_bytes=0,
                handle=nothing,
                plan=nothing,
                alive=(),
            )
            for count in rows
        ]
    )
    return plans


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [(0, 16)]),
        (16, [(0, 16)]),
        (17, [(0, 64)]),
        (64, [(0, 64)]),
        (65, [(0, 64), (64, 16)]),
        (128, [(0, 64), (64, 64)]),
        (145, [(0, 64), (64, 64), (128, 64)]),
    ],
)
def test_cover(rows: int, expected: list[tuple[int, int]]) -> None:
    cover = plans_with(64, 16).cover(rows)
    assert [(start, plan.rows) for start, plan in cover] == expected


class Layer:
    """A random 2:4 layer on the GPU, ready to run up to LARGEST_PREPARED rows at once."""

    def __init__(self, N: int, K: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(N + K)
        weight = torch.randn(N, K, device="cuda", generator=generator)
        weight *= nm_mask(weight)
        # Groups with no non-zero at all, and with one.
        weight[:, :4] = 0
        weight[::2, 4:7] = 0
        packed, self.mask = pack(weight.to(dtype))
        self.problem = Problem.on(torch.device("cuda"), N=N, K=K, dtype=dtype)
        reason = cusparselt.supports(self.problem)
        if reason is not None:
            pytest.skip(reason)
        size = cusparselt.blob_bytes(self.problem)
        self.blob = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.values = self.blob[: packed.nbytes].view(dtype).view(N, K // 2)
        self.values.copy_(packed)
        cusparselt.fill_metadata(self.blob, self.mask, self.problem)
        assert torch.equal(self.values, packed)
        for power in range(4, LARGEST_PREPARED.bit_length()):
            cusparselt.prepare(self.problem, cusparselt.CONFIG, 1 << power)

    def x(self, M: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(M)
        x = torch.randn(M, self.problem.K, device="cuda", generator=generator)
        return x.to(self.problem.dtype)

    def bias(self) -> torch.Tensor:
        return torch.randn(self.problem.N, device="cuda").to(self.problem.dtype)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return cusparselt.run(x, self.values, self.blob, bias, cusparselt.CONFIG)

    def check(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Error against fp32 at most twice that of torch's linear on the same inputs."""
        wide_bias = None if bias is None else bias.float()
        exact = spmm_ref(x.float(), self.values.float(), self.mask, wide_bias)
        y = self.run(x, bias)
        assert (y.shape, y.dtype) == (exact.shape, x.dtype)
        assert y.is_contiguous()
        dense = torch.nn.functional.linear(x, unpack(self.values, self.mask), bias)
        ours, torchs = ((result - exact).norm() / exact.norm() for result in (y, dense))
        assert ours <= 2 * torchs + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_run(N: int, K: int, dtype: torch.dtype) -> None:
    layer = Layer(N, K, dtype)
    for M in ROWS:
        layer.check(layer.x(M))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_run_bias(dtype: torch.dtype) -> None:
    layer = Layer(512, 256, dtype)
    for M in (1, 16, 100, 500):
        layer.check(layer.x(M), layer.bias())


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 100])
def test_run_strided_x(M: int) -> None:
    layer = Layer(256, 128, torch.bfloat16)
    wide = torch.full((M, 192), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide[:, 64:] = layer.x(M)
    layer.check(wide[:, 64:])


@pytest.mark.gpu
def test_run_lets_inf_and_nan_through() -> None:
    layer = Layer(256, 128, torch.bfloat16)
    clean = layer.x(20)
    y = layer.run(clean)
    for bad in (float("inf"), float("nan")):
        x = clean.clone()
        x[3] = bad
        spoilt = layer.run(x)
        assert not spoilt[3].isfinite().any()
        spoilt[3] = y[3]
        assert torch.equal(spoilt, y)


@pytest.mark.gpu
def test_run_repeats_bit_for_bit() -> None:
    layer = Layer(512, 1792, torch.bfloat16)
    x = layer.x(200)
    first = layer.run(x)
    assert all(torch.equal(layer.run(x), first) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [64, 100])
def test_run_in_cuda_graph(M: int) -> None:
    layer = Layer(512, 256, torch.bfloat16)
    x, bias = layer.x(M), layer.bias()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.run(x, bias)
    x.copy_(layer.x(M).flip(0))
    graph.replay()
    assert torch.equal(y, layer.run(x, bias))


@pytest.mark.gpu
def test_run_builds_nothing() -> None:
    layer = Layer(256, 128, torch.bfloat16)
    device = torch.device("cuda", torch.cuda.current_device())
    plans = cusparselt_plan.plans_of(device, torch.bfloat16, 256, 128)
    built = list(plans.built)
    caches = (cusparselt_plan.plans_of, cusparselt_plan.weight_of, cusparselt_abi.load)
    misses = [cached.cache_info().misses for cached in caches]
    for M in ROWS:
        layer.run(layer.x(M))
    assert [cached.cache_info().misses for cached in caches] == misses
    assert plans.built == built


@pytest.mark.gpu
def test_run_unprepared() -> None:
    # A shape that no test prepares: plans last as long as the process.
    values = torch.zeros(48, 24, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(4, 48, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(AssertionError, match="cusparselt was not prepared for N=48 K=48"):
        cusparselt.run(x, values, values, None, cusparselt.CONFIG)


@pytest.mark.gpu
def test_only_prepare_warns_of_a_slow_version(caplog: pytest.LogCaptureFixture) -> None:
    problem = Problem.on(torch.device("cuda"), N=32, K=64, dtype=torch.bfloat16)
    cusparselt._warn_if_slow.cache_clear()
    reason = cusparselt.supports(problem)
    if reason is not None:
        pytest.skip(reason)
    assert not caplog.records
    cusparselt.prepare(problem, cusparselt.CONFIG, 1)
    version = cusparselt_abi.load().version
    slow = version == cusparselt.SLOW_VERSION and problem.sm in cusparselt.SLOW_SM
    assert ("pip install" in caplog.text) == slow


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_metadata_is_that_of_the_mask(dtype: torch.dtype) -> None:
    """x that is 1 at one column and 0 elsewhere reads W's columns back, position by position."""
    layer = Layer(256, 128, dtype)
    # Kept zeros too: with every value set, each kept position shows.
    layer.values.fill_(1.0)
    columns = layer.run(torch.eye(128, dtype=dtype, device="cuda"))
    kept = unpack(torch.ones_like(layer.values), layer.mask)
    assert torch.equal(columns.t(), kept)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(128, 128), (4096, 14336), (1536, 576)])
def test_blob_bytes(N: int, K: int) -> None:
    """Values and N*K/8 bytes of metadata; padding at most to multiples of 128."""
    problem = Problem.on(torch.device("cuda"), N=N, K=K, dtype=torch.bfloat16)
    padded = -(-N // 128) * 128 * -(-K // 128) * 128
    assert N * K + N * K // 8 <= cusparselt.blob_bytes(problem) <= N * K + padded // 8
