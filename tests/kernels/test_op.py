"""cast_serve::linear_2of4: what it takes, what it refuses, and that torch.compile sees through it.

The op is the same on a CPU, where the fp32 reference computes, and on a GPU; test_linear_gpu.py
judges the kernels.
"""

from dataclasses import replace

import pytest
import torch
from layers import random_packed

from cast_serve.kernels import op
from cast_serve.kernels.op import as_rows_of_16_bytes, linear_2of4
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.reference import spmm_ref
from cast_serve.kernels.registry import KERNELS
from cast_serve.kernels.selection import plan_for
from cast_serve.kernels.spec import Run
from cast_serve.kernels.weight import SparseWeight, build

N, K = 96, 256

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.usefixtures("poisoned_memory", "forget_plans", "empty_user_cache")


def weight(device: str, monkeypatch: pytest.MonkeyPatch) -> SparseWeight:
    """A weight for the op, which is all that is tested: on a GPU, too, the reference computes."""
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    values, mask = random_packed(N, K, torch.bfloat16, device)
    return build(values, mask, ("mask",))


def inputs(*shape: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, K, generator=generator, device=device).to(torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (2, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear(device, shape, with_bias, monkeypatch):
    w = weight(device, monkeypatch)
    x = inputs(*shape, device=device)
    bias = torch.randn(N, device=device).to(x.dtype) if with_bias else None
    y = linear_2of4(x, w.values, w.metadata, bias)
    assert y.shape == (*shape, N) and y.dtype == x.dtype
    # Not bit by bit: cuBLAS and oneDNN sum in another order for another shape.
    torch.testing.assert_close(y, spmm_ref(x, w.values, w.metadata[0], bias))


@pytest.mark.parametrize("device", DEVICES)
def test_linear_of_a_slice(device, monkeypatch):
    """As vLLM cuts q, k and v out of one tensor: rows lie apart."""
    w = weight(device, monkeypatch)
    wide = inputs(7, 3, device=device).flatten(1)
    columns = inputs(7, device=device).t().contiguous().t()
    for x in (wide[:, K : 2 * K], wide[:, 1 : K + 1], wide[:1, 8 : K + 8], columns):
        torch.testing.assert_close(
            linear_2of4(x, w.values, w.metadata, None),
            linear_2of4(x.contiguous(), w.values, w.metadata, None),
        )


def test_rows_are_copied_only_when_needed():
    base = torch.zeros(8, 4 * K, dtype=torch.bfloat16)
    for kept in (base, base[:, :K], base[:, 8 : K + 8], base[:1]):
        assert as_rows_of_16_bytes(kept).data_ptr() == kept.data_ptr()
    apart = [
        base[:, 1 : K + 1],  # starts at 2 bytes
        base.t(),  # columns are not adjacent
        base[:1, :K].expand(4, K),  # rows overlap
        base.flatten()[: 8 * (K + 4)].view(8, K + 4)[:, :K],  # rows at multiples of 8 bytes
    ]
    for copied in apart:
        rows = as_rows_of_16_bytes(copied)
        assert rows.data_ptr() != copied.data_ptr() and rows.is_contiguous()
        assert torch.equal(rows, copied)


def test_single_row_has_its_own_stride():
    """Its stride says nothing, but kernels would hand it to the hardware."""
    single = torch.zeros(4, 3 * K, dtype=torch.bfloat16)[1:2, :K]
    assert single.stride() == (3 * K, 1)
    rows = as_rows_of_16_bytes(single)
    assert rows.stride() == (K, 1) and rows.data_ptr() == single.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, K + 8)}, r"x \[4, 264\] does not fit values \[96, 128\]"),
        ({"x": torch.tensor(1.0)}, r"x \[\] does not fit"),
        ({"x": torch.zeros(4, K).double()}, r"x is torch.float64 on cpu, values are torch.float32"),
        ({"values": torch.zeros(K)}, r"does not fit values \[256\]: needs .* \[N, K/2\]"),
        ({"bias": torch.zeros(1)}, r"bias \[1\] does not fit values \[96, 128\]: needs \[N\]"),
        ({"bias": torch.zeros(N).half()}, "bias is torch.float16"),
        (
            {"metadata": [torch.zeros(N, K // 8, device="meta")]},
            "metadata is on meta, values are on",
        ),
        ({"metadata": []}, r"0 metadata tensors for W \[96, 256\], whose plan needs 1"),
    ],
)
def test_refusals(change, message):
    values, mask = random_packed(N, K, torch.float32, "cpu")
    given = {"x": torch.zeros(4, K), "values": values, "metadata": [mask], "bias": None, **change}
    with pytest.raises(ValueError, match=message):
        linear_2of4(given["x"], given["values"], given["metadata"], given["bias"])


def test_kernel_and_metadata_by_tokens(monkeypatch):
    """The plan's row that holds M runs, with the metadata of its own kernel."""
    plan = Plan.of({8: ("wgmma_sp", "few"), 64: ("mma_sp", "more"), 8192: ("wgmma_sp", "many")})
    ran: list[tuple[int, str, str, str]] = []

    def recorder(name: str) -> Run:
        def run(x, values, metadata, bias, config):
            ran.append((x.shape[0], name, config, plan.layouts[metadata.item()]))
            return x.new_zeros(x.shape[0], N)

        return run

    # What a CPU takes for every layer.
    monkeypatch.setattr(op, "REFERENCE_PLAN", plan)
    recorders = {name: replace(spec, run=recorder(name)) for name, spec in KERNELS.items()}
    monkeypatch.setattr(op, "NAMED", recorders)
    values, _ = random_packed(N, K, torch.bfloat16, "cpu")
    metadata = [torch.tensor(index) for index in range(len(plan.layouts))]
    for M in (1, 8, 9, 64, 65, 8193):
        linear_2of4(inputs(M, device="cpu"), values, metadata, None)
    assert ran == [
        (1, "wgmma_sp", "few", "wgmma_sp"),
        (8, "wgmma_sp", "few", "wgmma_sp"),
        (9, "mma_sp", "more", "mma_sp"),
        (64, "mma_sp", "more", "mma_sp"),
        (65, "wgmma_sp", "many", "wgmma_sp"),
        (8193, "wgmma_sp", "many", "wgmma_sp"),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device, monkeypatch):
    w = weight(device, monkeypatch)
    bias = torch.randn(N, device=device).to(torch.bfloat16)
    metadata = list(w.metadata)
    for x, b in ((inputs(5, device=device), bias), (inputs(2, 3, device=device), None)):
        torch.library.opcheck(linear_2of4, (x, w.values, metadata, b))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_breaks_or_recompiles(device, monkeypatch):
    w = weight(device, monkeypatch)
    compiled = []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(linear_2of4(x, w.values, list(w.metadata), None))

    for M in (2, 3, 17, 640):
        x = inputs(M, device=device)
        expected = torch.relu(linear_2of4(x, w.values, w.metadata, None))
        torch.testing.assert_close(layer(x), expected)
    assert len(compiled) == 1


@pytest.mark.gpu
def test_another_device_than_the_current_one(monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.delenv("CAST_SERVE_KERNEL", raising=False)
    values, mask = random_packed(512, 1024, torch.bfloat16, "cuda:1")
    with torch.cuda.device(1):
        problem = Problem.on(values.device, N=512, K=1024, dtype=values.dtype)
        w = build(values, mask, plan_for(problem).layouts)
    x = torch.randn(9, 1024, device="cuda:1").to(values.dtype)
    y = linear_2of4(x, w.values, w.metadata, None)
    torch.testing.assert_close(y, spmm_ref(x, values, mask))
