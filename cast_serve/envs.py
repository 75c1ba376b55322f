"""The environment variables of cast-serve. They are for debugging: the checkpoint decides.

CAST_SERVE_KERNEL   NAME or NAME:CONFIG runs every 2:4 layer with this kernel at any number of
                    tokens, instead of the fastest. NAME is a key of `kernels.registry.NAMED`,
                    CONFIG one of the kernel's own; without it the kernel's first guess is taken.
                    `reference` unpacks the weights at every call, in fp32, on a CPU too.

Imports nothing of ours, so that kernels may read it: who uses a value refuses a bad one.
"""

import os
from dataclasses import dataclass

KERNEL = "CAST_SERVE_KERNEL"


@dataclass(frozen=True, kw_only=True)
class ForcedKernel:
    name: str
    config: str | None

    def __str__(self) -> str:
        return f"{KERNEL}={self.name}" + (f":{self.config}" if self.config else "")


def forced_kernel() -> ForcedKernel | None:
    """CAST_SERVE_KERNEL, or None where it is unset or empty."""
    value = os.environ.get(KERNEL, "")
    if not value:
        return None
    name, _, config = value.partition(":")
    return ForcedKernel(name=name, config=config or None)
