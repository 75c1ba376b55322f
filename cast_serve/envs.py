"""The environment variables of cast-serve. They are for debugging: the checkpoint decides.

CAST_SERVE_KERNEL   NAME or NAME:CONFIG runs every 2:4 layer with this kernel at any number of
                    tokens, instead of the fastest. NAME is a key of `kernels.registry.NAMED`,
                    CONFIG one of the kernel's own; without it the kernel's first guess is taken.
                    `reference` unpacks the weights at every call, in fp32, on a CPU too.
"""

import os
from dataclasses import dataclass

from cast_serve.kernels.registry import NAMED

KERNEL = "CAST_SERVE_KERNEL"


@dataclass(frozen=True, kw_only=True)
class ForcedKernel:
    name: str
    config: str | None

    def __str__(self) -> str:
        return f"{KERNEL}={self.name}" + (f":{self.config}" if self.config else "")


def forced_kernel() -> ForcedKernel | None:
    """CAST_SERVE_KERNEL, or None where it is unset or empty.

    Raises:
        ValueError: no kernel has this name.
    """
    value = os.environ.get(KERNEL, "")
    if not value:
        return None
    name, _, config = value.partition(":")
    if name not in NAMED:
        raise ValueError(f"{KERNEL}={value}: no kernel {name!r}; NAME is one of {', '.join(NAMED)}")
    return ForcedKernel(name=name, config=config or None)
