"""What is chosen for a layer, in which order, and what is said where nothing can be."""

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from layers import GPU, problem

from cast_serve.bench.shapes import SHAPES
from cast_serve.kernels import cache, selection, shipped, tune
from cast_serve.kernels.plan import BUCKETS, Plan
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import KERNELS, LAYOUT_NAMES
from cast_serve.kernels.selection import NoKernel, plan_for, warm, warm_ahead

pytestmark = pytest.mark.usefixtures("forget_plans", "empty_user_cache")

LAYERS = sorted({(layer.N, layer.K) for layers in SHAPES.values() for layer in layers})


@pytest.fixture
def devices(monkeypatch) -> list[torch.device]:
    """GPUs without a driver: those that are current, the innermost last."""
    current: list[torch.device] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return current


def first_guess(kernel: str) -> Plan:
    return Plan.of({1: (kernel, KERNELS[kernel].configs(problem(), 1)[0])})


@pytest.mark.parametrize("kernel", ["mma_sp", "wgmma_sp"])
@pytest.mark.parametrize(("N", "K"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_support_the_layers_of_real_models(kernel, N, K, dtype):
    assert KERNELS[kernel].supports(problem(N, K, dtype=dtype)) is None


@pytest.mark.parametrize("kernel", ["mma_sp", "wgmma_sp"])
@pytest.mark.parametrize(("N", "K"), [*LAYERS, (16, 64), (16, 576), (48, 11008)])
def test_kernels_have_a_config_for_every_M(kernel, N, K):
    shape = problem(N, K)
    assert KERNELS[kernel].supports(shape) is None
    assert all(KERNELS[kernel].configs(shape, M) for M in (*BUCKETS, 65536))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_blackwell_is_refused(kernel, capability):
    assert "sm_1" in KERNELS[kernel].supports(problem(capability=capability))


def test_no_kernel_names_each_ones_reason():
    with pytest.raises(NoKernel) as caught:
        plan_for(problem(N=100, K=1000))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"no 2:4 kernel for N=100 K=1000 bfloat16 on {GPU} (sm_90)"
    assert [line.strip().split(":")[0] for line in lines[1:]] == list(KERNELS)
    assert all("N=100 is not a multiple" in line or "K=1000" in line for line in lines[1:])


def test_forced_kernel(monkeypatch):
    monkeypatch.setenv("CAST_SERVE_KERNEL", "mma_sp")
    plan = plan_for(problem())
    assert {row.kernel for row in plan.rows} == {"mma_sp"}
    assert plan.choice(64).config == KERNELS["mma_sp"].configs(problem(), 64)[0]


def test_forced_config(monkeypatch):
    config = KERNELS["mma_sp"].configs(problem(), 1)[-1]
    monkeypatch.setenv("CAST_SERVE_KERNEL", f"mma_sp:{config}")
    assert plan_for(problem()).to_json() == [[None, "mma_sp", config]]


def test_forced_kernel_that_there_is_not(monkeypatch):
    monkeypatch.setenv("CAST_SERVE_KERNEL", "marlin")
    names = ", ".join([*KERNELS, "reference"])
    with pytest.raises(ValueError, match=f"no kernel 'marlin'; NAME is one of {names}"):
        plan_for(problem())


def test_forced_config_that_there_is_not(monkeypatch):
    monkeypatch.setenv("CAST_SERVE_KERNEL", "mma_sp:huge")
    known = KERNELS["mma_sp"].configs(problem(), 1)[0]
    with pytest.raises(ValueError, match=rf"mma_sp:huge: no such config .*{known}"):
        plan_for(problem())


def test_forced_kernel_that_does_not_support_the_layer(monkeypatch):
    """It is no NoKernel, for which a layer would quietly run dense."""
    monkeypatch.setenv("CAST_SERVE_KERNEL", "mma_sp")
    with pytest.raises(ValueError, match=r"mma_sp does not run .*sm_75") as caught:
        plan_for(problem(capability=(7, 5)))
    assert not isinstance(caught.value, NoKernel)


def test_shipped_tables():
    """Every plan is one that this version can run."""
    for table in shipped.tables():
        for row in table["plans"]:
            plan = Plan.from_json(row["plan"])
            shape = problem(row["N"], row["K"], dtype=getattr(torch, row["dtype"]))
            for choice in plan.rows:
                M = choice.max_M or BUCKETS[-1]
                assert choice.config in KERNELS[choice.kernel].configs(shape, M)
            assert len(plan.layouts) <= tune.MAX_LAYOUTS


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
@pytest.mark.parametrize(("N", "K"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plans_ship_for_the_layers_of_real_models(gpu, N, K, dtype):
    here = problem(N, K, dtype=dtype, gpu=gpu)
    assert plan_for(here) == shipped.find(here)


def test_libraries_are_not_tried_where_a_plan_ships(monkeypatch):
    """Loading and trying cuSPARSELt takes time and GPU memory."""

    def tried(problem: Problem) -> None:
        raise AssertionError("cusparselt was asked")

    spec = dataclasses.replace(KERNELS["cusparselt"], supports=tried)
    monkeypatch.setitem(KERNELS, "cusparselt", spec)
    plan = first_guess("mma_sp")
    ship(monkeypatch, shipped.row_of(problem(), plan))
    assert plan_for(problem()) == plan


def ship(monkeypatch: pytest.MonkeyPatch, *rows: dict) -> None:
    table = {"gpu": GPU, "plans": rows}
    monkeypatch.setattr(shipped, "tables", lambda: [table])


def test_shipped_plan_comes_before_measuring(monkeypatch):
    plan = first_guess("mma_sp")
    ship(monkeypatch, shipped.row_of(problem(), plan))
    assert plan_for(problem()) == plan
    assert shipped.find(problem(N=1024)) is None
    assert shipped.find(problem(gpu=f"{GPU} MIG 1g.10gb")) is None


def test_shipped_plan_in_bfloat16_serves_float16(monkeypatch):
    halves = problem(dtype=torch.float16)
    lent, own = first_guess("wgmma_sp"), first_guess("mma_sp")
    rows = [shipped.row_of(problem(), lent)]
    ship(monkeypatch, *rows)
    assert plan_for(halves) == lent
    assert shipped.find(problem(dtype=torch.float32)) is None
    ship(monkeypatch, *rows, shipped.row_of(halves, own))
    assert shipped.find(halves) == own
    assert shipped.find(problem()) == lent


def test_shipped_plan_in_float16_serves_itself_alone(monkeypatch):
    ship(monkeypatch, shipped.row_of(problem(dtype=torch.float16), first_guess("wgmma_sp")))
    assert shipped.find(problem()) is None


def test_shipped_plan_with_cusparselt_serves_its_dtype_alone(monkeypatch):
    ship(monkeypatch, shipped.row_of(problem(), Plan.of({1: ("cusparselt", "default")})))
    assert shipped.find(problem()) is not None
    assert shipped.find(problem(dtype=torch.float16)) is None


def test_shipped_plan_of_another_cusparselt(monkeypatch):
    """It may be slower there."""
    plan = Plan.of({1: ("cusparselt", "default")})
    row = shipped.row_of(problem(), plan)
    ship(monkeypatch, row)
    assert shipped.find(problem()) == plan
    ship(monkeypatch, {**row, "cusparselt": "0.6.0"})
    assert shipped.find(problem()) is None


def test_shipped_plan_of_a_kernel_that_does_not_run_here(monkeypatch, caplog):
    """The measured plan on disk is used, and the reason is said."""
    ship(monkeypatch, shipped.row_of(problem(), Plan.of({1: ("cusparselt", "default")})))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = first_guess("mma_sp")
    cache.write(problem(), plan)
    with caplog.at_level(logging.WARNING):
        assert plan_for(problem()) == plan
    assert "is not used" in caplog.text
    assert "cusparselt: torch sees no CUDA device" in caplog.text


def test_cached_plan_is_used():
    plan = first_guess("mma_sp")
    cache.write(problem(), plan)
    assert plan_for(problem()) == plan


def test_cached_plan_of_a_config_that_there_is_not(monkeypatch, caplog):
    """It is named and measured again, instead of failing at every start."""
    cache.write(problem(), Plan.of({1: ("mma_sp", "huge")}))
    plan = first_guess("mma_sp")
    monkeypatch.setattr(selection, "tune", lambda problem, device: plan)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with caplog.at_level(logging.WARNING):
        assert plan_for(problem()) == plan
    assert f"{cache.path_of(problem())} is not used" in caplog.text
    assert "mma_sp: no config 'huge'" in caplog.text
    assert cache.read(problem()) == plan


def test_warm_raises_what_stopped_the_thread_ahead_of_it(devices):
    device = torch.device("cuda", 0)
    warm_ahead(problem(capability=(7, 5)), device)
    with pytest.raises(NoKernel, match="sm_75"):
        warm(problem(capability=(7, 5)), device)


def test_a_plan_is_looked_for_on_the_layers_own_gpu(monkeypatch, devices):
    """A thread starts on GPU 0, on which a kernel that is asked would make a context."""
    asked: list[torch.device | None] = []
    monkeypatch.setattr(
        selection, "known_plan", lambda of: asked.append(devices[-1] if devices else None)
    )
    monkeypatch.setattr(selection, "_warm", lambda of, device: None)
    device = torch.device("cuda", 1)
    warm_ahead(problem(), device)
    warm(problem(), device)
    assert asked == [device]


def test_nothing_is_timed_ahead(monkeypatch, devices, empty_user_cache):
    """What the machine does meanwhile would be in the times."""
    warmed = []

    def note(of: Problem, device: torch.device) -> None:
        warmed.append((of, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(selection, "_warm", note)
    device = torch.device("cuda", 0)
    unknown, shipped_for = problem(N=768, K=1280), problem(*LAYERS[0], gpu="NVIDIA H200")
    for of in (unknown, shipped_for):
        warm_ahead(of, device)
    for of in (unknown, shipped_for):
        warm(of, device)
    assert sorted(main for _, main in warmed) == [False, True]
    assert dict(warmed) == {unknown: True, shipped_for: False}


@pytest.mark.parametrize("first_is_known", [False, True])
def test_nothing_goes_on_beside_once_a_layer_is_warm(monkeypatch, devices, first_is_known):
    """Kernels are timed next, or a library's handle is used: see `prepare.SERIAL`."""
    first, second = problem(N=768, K=1280), problem(N=1024, K=1280)
    known = {second} | ({first} if first_is_known else set())
    busy, busy_meanwhile = set(), []

    def take_a_while(of: Problem, device: torch.device) -> None:
        busy_meanwhile.append(set(busy))
        busy.add(of)
        time.sleep(0.2 if of == second else 0)
        busy.remove(of)

    monkeypatch.setattr(selection, "known_plan", lambda of: "plan" if of in known else None)
    monkeypatch.setattr(selection, "_warm", take_a_while)
    device = torch.device("cuda", 0)
    for of in (first, second):
        warm_ahead(of, device)
    warm(first, device)
    assert not busy
    assert busy_meanwhile == [set(), set()]


def test_layout_names_are_the_kernels_own():
    assert set(LAYOUT_NAMES) == {spec.metadata for spec in KERNELS.values()} | {"mask"}


@pytest.mark.gpu
def test_measured_plan(forget_plans):
    here = Problem.on(torch.device("cuda"), N=768, K=1280, dtype=torch.bfloat16)
    plan = plan_for(here)
    assert len(plan.layouts) <= tune.MAX_LAYOUTS
    written = cache.path_of(here).stat().st_mtime_ns
    forget_plans()
    assert plan_for(here) == plan
    assert cache.path_of(here).stat().st_mtime_ns == written


@pytest.mark.gpu
def test_measuring_while_capturing_is_refused():
    here = Problem.on(torch.device("cuda"), N=768, K=1344, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(tune.TuningError, match=r"call .*warm\("):
        warm(here, torch.device("cuda", torch.cuda.current_device()))
