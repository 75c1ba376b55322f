"""SparseWeight: what a 2:4 layer keeps on the GPU, one copy of the values for all kernels.

Shapes   values_NH (H = K/2), one metadata tensor a layout, each N*K/8 bytes (tiles padded)
Bytes    0.5625 of the dense weight's in 16 bits with one layout, 0.625 with two
"""

from dataclasses import dataclass

import torch

from cast_serve.kernels import cusparselt
from cast_serve.kernels.packing import check_packed_shapes
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.registry import LAYOUTS


@dataclass(frozen=True, kw_only=True)
class SparseWeight:
    """Values [N, K/2] and the metadata of `layouts`, in that order: the op's arguments."""

    values: torch.Tensor
    metadata: tuple[torch.Tensor, ...]

    @property
    def resident_bytes(self) -> int:
        """Bytes of every storage that it holds on to, each counted once."""
        storages = (tensor.untyped_storage() for tensor in (self.values, *self.metadata))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def metadata_shares(self) -> tuple[float, ...]:
        """Bytes of each metadata tensor as part of the dense weight's; values are 0.5."""
        start, kept = self.values.data_ptr(), self.values.nbytes
        # cuSPARSELt's is a buffer that starts with the values.
        sizes = (t.nbytes - (kept if t.data_ptr() == start else 0) for t in self.metadata)
        return tuple(size / (2 * kept) for size in sizes)


def build(
    values: torch.Tensor, mask: torch.Tensor, layouts: tuple[str, ...], *, reuse_mask: bool = False
) -> SparseWeight:
    """Lay out a packed weight for the kernels of a plan.

    cuSPARSELt reads values and metadata from one buffer, so with its layout `values` is copied to
    the start of one, and the metadata is the whole buffer; else `values` itself is kept.

    Args:
        values: [N, K/2], contiguous, as `pack` gives them. Kernels may read a weight before the
            kernel ahead of them has ended (`nvrtc.Function`), so what writes to it must have been
            waited for: this waits, and whoever changes a weight in place has to.
        mask: uint8 [N, K/8] on the same device.
        layouts: of LAYOUT_NAMES, as in `Plan.layouts`; "cusparselt" only on the current device.
        reuse_mask: the first metadata of the mask's size is written over it: memory that is asked
            for between large tensors may be more than what is needed.

    Raises:
        ValueError: shapes do not belong together.
        cusparselt.LayoutError: cuSPARSELt's buffer does not start with the values.
    """
    check_packed_shapes(tuple(values.shape), tuple(mask.shape))
    metadata = {layout: LAYOUTS[layout](mask) for layout in layouts if layout in LAYOUTS}
    if cusparselt.SPEC.metadata in layouts:
        N, H = values.shape
        problem = Problem.on(values.device, N=N, K=2 * H, dtype=values.dtype)
        blob = torch.empty(cusparselt.blob_bytes(problem), dtype=torch.uint8, device=values.device)
        shared = blob[: values.nbytes].view(values.dtype).view(N, H)
        shared.copy_(values)
        cusparselt.fill_metadata(blob, mask, problem)
        values = shared
        metadata[cusparselt.SPEC.metadata] = blob
    if reuse_mask and not any(tensor.data_ptr() == mask.data_ptr() for tensor in metadata.values()):
        fitting = (name for name, tensor in metadata.items() if tensor.nbytes == mask.nbytes)
        if (name := next(fitting, None)) is not None:
            found = metadata[name]
            metadata[name] = mask.view(-1).view(found.dtype).view(found.shape).copy_(found)
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()
    return SparseWeight(values=values, metadata=tuple(metadata[layout] for layout in layouts))
