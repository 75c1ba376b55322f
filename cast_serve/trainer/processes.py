"""The processes of a run, as torchrun or accelerate launch start them: one a GPU, or gloo on CPUs.

Everything that one process does for all, such as reading the model or writing a file, goes through
`on_first`: an error there is raised in every process, so none is left waiting for the others.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from cast_serve.trainer.errors import RunError

T = TypeVar("T")

# The first process may tokenise a corpus while others wait; where one dies, torchrun ends them all.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among `count` of them; `rank` 0 is the first, which prints and writes."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process; it must be picklable where there are several.

        Raises:
            RunError: raised by `work`, in every process.
        """
        if self.count == 1:
            return work()
        outcome: list[object] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except RunError as error:
                outcome[1] = str(error)
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise RunError(str(outcome[1]))
        return outcome[0]  # type: ignore[return-value]

    def first_to_last(self, work: Callable[[], T]) -> T:
        """`work` in every process, in the first one before all others, which find its cache.

        Raises:
            RunError: raised by `work` in the first process, in every process.
        """
        done: list[T] = []
        self.on_first(lambda: done.append(work()))
        return done[0] if done else work()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of every process' `values`, in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values


ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


def takes_gpu(device: str) -> bool:
    """Whether `device`, "auto" or "cpu", means a GPU on this machine."""
    return device == "auto" and torch.cuda.is_available()


def _use_own_cores() -> None:
    """This process' part of the host's cores, in place of torchrun's one.

    An optimizer step in host memory, and the plan's look at all weights, take minutes on one.
    """
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """This process among those that were started with it, until the end of the block.

    Args:
        device: "cpu", or "auto" for the GPU of this process' number on its host, if there is one.

    Raises:
        RunError: more processes than GPUs on this host.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    on_gpu = takes_gpu(device)
    place = torch.device("cpu")
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise RunError(
                f"process {local} of this host has no GPU: there are {torch.cuda.device_count()}; "
                f"start {torch.cuda.device_count()} processes"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if count == 1:
        yield Processes(rank=0, count=1, device=place)
        return
    _use_own_cores()
    if "MASTER_ADDR" not in os.environ:
        raise RunError(f"WORLD_SIZE is {count} without MASTER_ADDR; start with torchrun")
    # gloo on GPU machines, too: for what is offloaded to host memory, and for objects.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    yield Processes(rank=rank, count=count, device=place)
    # Not where the block failed: it would wait for the others, which wait for this process. It is
    # to say why and exit, upon which torchrun ends them.
    # DDP's reducer is in a reference cycle and holds the group. Freed after the group's end, it
    # would join gloo's thread with Python's lock held, which that thread may be waiting for.
    # Together, so that no thread has something left to do.
    gc.collect()
    distributed.all_reduce(torch.zeros(1))
    distributed.destroy_process_group()
