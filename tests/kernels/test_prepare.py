"""Preparing in threads: what fails is told apart from what was not begun, and from the end."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from layers import problem
from triton.compiler.errors import CompileTimeAssertionFailure

from cast_serve.kernels.prepare import Candidate, prepare_all
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import REFERENCE
from cast_serve.kernels.spec import KernelSpec

CPU = torch.device("cpu")


def kernel(name: str, prepare: Callable[[Problem, str, int], None]) -> dict[str, KernelSpec]:
    return {
        name: KernelSpec(
            name=name,
            metadata="mask",
            supports=REFERENCE.supports,
            configs=REFERENCE.configs,
            prepare=prepare,
            run=REFERENCE.run,
        )
    }


def test_every_M_of_every_candidate():
    done: list[tuple[str, int]] = []
    specs = kernel("a", lambda problem, config, M: done.append((config, M)))
    jobs: dict[Candidate, list[int]] = {("a", "y"): [1, 8], ("a", "x"): [8]}
    assert list(prepare_all(problem(), specs, jobs, CPU)) == list(jobs)
    assert sorted(done) == [("x", 8), ("y", 1), ("y", 8)]


def test_failures_are_returned():
    errors = {
        "nvrtc": RuntimeError("no such option"),
        "triton": CompileTimeAssertionFailure("src", None, "x"),
    }

    def prepare(problem: Problem, config: str, M: int) -> None:
        if config in errors:
            raise errors[config]

    jobs = {("a", config): [1] for config in ("nvrtc", "fine", "triton")}
    ends = prepare_all(problem(), kernel("a", prepare), jobs, CPU)
    assert ends == {("a", config): errors.get(config) for _, config in jobs}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), TypeError("a bug")])
@pytest.mark.parametrize("name", ["a", "cusparselt"])
def test_what_nothing_survives_is_raised(error, name):
    def prepare(problem: Problem, config: str, M: int) -> None:
        raise error

    with pytest.raises(type(error)):
        prepare_all(problem(), kernel(name, prepare), {(name, "x"): [1]}, CPU)


def test_nothing_is_begun_late():
    specs = kernel("a", lambda problem, config, M: time.sleep(0.2))
    jobs = {("a", str(index)): [1] for index in range(200)}
    ends = prepare_all(problem(), specs, jobs, CPU, until=time.monotonic() + 0.1)
    assert 0 < len(ends) < len(jobs)
    assert prepare_all(problem(), specs, jobs, CPU, until=time.monotonic() - 1) == {}


def test_libraries_stay_in_this_thread():
    threads = set()
    specs = kernel("cusparselt", lambda *_: threads.add(threading.current_thread()))
    specs |= kernel("a", lambda *_: threads.add(threading.current_thread()))
    prepare_all(problem(), specs, {("cusparselt", "default"): [1, 8]}, CPU)
    assert threads == {threading.current_thread()}
    prepare_all(problem(), specs, {("a", "x"): [1]}, CPU)
    assert len(threads) == 2
