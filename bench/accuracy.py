"""Whether a kernel is right at a point, judged before it is timed.

Right: its error against fp32 is at most twice that of torch's linear in the same dtype, both over
the whole output (relative Frobenius norm) and at the worst entry. The norm finds what is wrong
everywhere, the worst entry a single wrong tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

SLACK = 1e-6


class WrongResult(RuntimeError):
    """A kernel's error is more than twice torch's."""


@dataclass(frozen=True)
class Error:
    """|y - exact| relative to |exact|: Frobenius norm, and largest entry over largest entry."""

    norm: float
    worst: float

    @classmethod
    def of(cls, y: torch.Tensor, exact: torch.Tensor) -> "Error":
        difference = y.float() - exact
        return cls(
            norm=(difference.norm() / exact.norm()).item(),
            worst=(difference.abs().max() / exact.abs().max()).item(),
        )

    def allows(self, other: "Error") -> bool:
        """Whether `other` is at most twice this; NaN never is."""
        return other.norm <= 2 * self.norm + SLACK and other.worst <= 2 * self.worst + SLACK


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The exact result of x [M, K] and weight [N, K], and torch's error for them."""

    exact: torch.Tensor
    torchs: Error
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor) -> "Judge":
        exact = x.float() @ weight.float().t()
        y = torch.nn.functional.linear(x, weight)
        return cls(exact=exact, torchs=Error.of(y, exact), dtype=x.dtype)

    def check(self, name: str, call: Callable[[], torch.Tensor]) -> None:
        """Run `call`, into memory that holds NaN before.

        Raises:
            WrongResult: with both errors.
        """
        # Freed at once: the allocator hands the same memory to the next tensor of this size.
        torch.full_like(self.exact, float("nan"), dtype=self.dtype)
        ours = Error.of(call(), self.exact)
        if not self.torchs.allows(ours):
            M, N = self.exact.shape
            raise WrongResult(
                f"{name} is wrong at M={M} N={N}: error {ours.norm:.2e}, worst entry "
                f"{ours.worst:.2e}; torch has {self.torchs.norm:.2e} and {self.torchs.worst:.2e}"
            )
