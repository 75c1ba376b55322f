"""A frozen model whose decoder blocks stay in host memory and visit the device one after another.

Two blocks have room on the device: while one computes, the next is copied in on a stream of its
own, from pinned memory. The last one of a forward pass brings the first one in again, so that it is
there when the next pass starts. accelerate's hooks would copy tensor by tensor, waiting for each,
and empty CUDA's cache after each.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

# Of a tensor's place in a block's memory, in bytes: what vector loads and cuBLAS want.
_ALIGNMENT = 256


class OffloadedBlocks:
    """Keeps the parameters and buffers of `blocks` on the host; forward hooks bring them in.

    For frozen blocks that run in order, once a forward pass. The blocks' tensors belong to this
    object from now on: their contents are only there while the block runs.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self._tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        self._host = [_packed(tensors, pinned=device.type == "cuda") for tensors in self._tensors]
        room = max(len(memory) for memory in self._host)
        self._rooms = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        # The block that is in, or on its way into, the room that was filled last.
        self._coming = -1
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(number))

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if self._coming != number:
                self._fetch(number)
            if self._copies is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._copies)
            _place(self._tensors[number], self._rooms[0])
            self._fetch((number + 1) % len(self._host))

        return enter

    def _fetch(self, number: int) -> None:
        """Copy a block into the other room, which is free once all work so far is done."""
        self._rooms.reverse()
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with self._on_copies():
            memory = self._host[number]
            self._rooms[0][: len(memory)].copy_(memory, non_blocking=True)
        self._coming = number

    def _on_copies(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._copies) if self._copies is not None else nullcontext()


def _offsets(tensors: list[torch.Tensor]) -> list[int]:
    """Where each tensor starts, and at the end their total, in bytes."""
    places = [0]
    for tensor in tensors:
        places.append(places[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return places


def _packed(tensors: list[torch.Tensor], *, pinned: bool) -> torch.Tensor:
    """The contents of all tensors in one block of host memory, which they become views of."""
    memory = torch.empty(_offsets(tensors)[-1], dtype=torch.uint8, pin_memory=pinned)
    contents = [tensor.detach().clone() for tensor in tensors]
    _place(tensors, memory)
    for tensor, content in zip(tensors, contents, strict=True):
        tensor.detach().copy_(content)
    return memory


def _place(tensors: list[torch.Tensor], memory: torch.Tensor) -> None:
    for tensor, start in zip(tensors, _offsets(tensors), strict=False):
        place = memory[start : start + tensor.nbytes]
        tensor.data = place.view(tensor.dtype).view(tensor.shape)
