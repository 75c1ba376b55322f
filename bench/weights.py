"""Random 2:4 weights on the GPU: the same layer dense and packed, as often as rotation needs.

Shapes   dense_NK, values_NH (H = K/2), mask_NB uint8 (B = K/8)
"""

from dataclasses import dataclass

import torch

from cast_serve.bench.shapes import Layer
from cast_serve.bench.timing import limit_copies
from cast_serve.kernels.measure import copies_past_l2
from cast_serve.kernels.packing import unpack
from cast_serve.kernels.pattern import random_mask
from cast_serve.kernels.weight import SparseWeight, build

# Left for x, y, the fp32 reference and cuBLAS: 16384 tokens of 28672 features are 1.9 GB in fp32.
_KEPT_FREE = 16 << 30


@dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy of a layer: dense [N, K], and packed for `layouts`."""

    dense: torch.Tensor
    sparse: SparseWeight
    layouts: tuple[str, ...]

    def metadata(self, layout: str) -> torch.Tensor:
        return self.sparse.metadata[self.layouts.index(layout)]


def random_packed(
    layer: Layer, *, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random values [N, K/2], of which y is about 1 for x about 1, and mask uint8 [N, K/8]."""
    device = generator.device
    values = torch.randn(layer.N, layer.K // 2, generator=generator, device=device, dtype=dtype)
    values *= (layer.K / 2) ** -0.5
    return values, random_mask(layer.N, layer.K, generator)


def make_copies(
    layer: Layer, *, dtype: torch.dtype, layouts: tuple[str, ...], device: torch.device
) -> list[Copy]:
    """Copies with random data of their own, whose packed forms together exceed L2.

    Raises:
        ValueError: the GPU's memory does not hold two.
    """
    dense_bytes = layer.N * layer.K * dtype.itemsize
    free, _ = torch.cuda.mem_get_info(device)
    # Dense and sparse rotate over as many copies, so the smaller must leave L2.
    count = limit_copies(
        copies_past_l2(dense_bytes * 9 // 16, device),
        # dense, values, and N*K/8 bytes a layout
        copy_bytes=dense_bytes * 3 // 2 + len(layouts) * layer.N * layer.K // 8,
        most_bytes=free - _KEPT_FREE,
    )
    generator = torch.Generator(device).manual_seed(0)
    copies = []
    for _ in range(count):
        values, mask = random_packed(layer, dtype=dtype, generator=generator)
        copies.append(
            Copy(
                dense=unpack(values, mask),
                sparse=build(values, mask, layouts),
                layouts=layouts,
            )
        )
    return copies


def resident_share(layer: Layer, *, dtype: torch.dtype, layouts: tuple[str, ...]) -> float:
    """Bytes that a layer keeps with `layouts`, over those of the dense weight.

    Taken from a weight of its own: the copies of a benchmark may hold more layouts than a plan.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    weight = build(*random_packed(layer, dtype=dtype, generator=generator), layouts)
    return weight.resident_bytes / (layer.N * layer.K * dtype.itemsize)
