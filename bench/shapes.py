"""The linear layers that benchmarks and GPU tests run: those of real models, as vLLM merges them.

Shapes   y[M, N] = x[M, K] @ W[N, K].T; a layer here is what one tensor-parallel rank holds.
Source   The config.json of each model: hidden_size, num_attention_heads, num_key_value_heads,
         head_dim, intermediate_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

# Least acceptable dense time / sparse time by M, summed over a model's four layers. The limits are
# 1.78 where bytes bind (36 bits are stored for 64) and 2.0 where arithmetic does.
FLOORS = {
    1: 1.65,
    8: 1.6,
    16: 1.6,
    32: 1.55,
    64: 1.5,
    128: 1.35,
    256: 1.25,
    512: 1.2,
    1024: 1.3,
    4096: 1.4,
    16384: 1.45,
}

# A layer under this many weights (8 MiB in 16 bits) takes 2 us at 4 TB/s: a launch's own time.
SMALL_LAYER = 1 << 22


class Named(Protocol):
    @property
    def name(self) -> str: ...


NamedType = TypeVar("NamedType", bound=Named)


@dataclass(frozen=True)
class Layer:
    """One linear layer: its name in the model, output features N and input features K."""

    name: str
    N: int
    K: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder's dimensions, as in its config.json, and the tensor-parallel size it is cut to."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tp: int = 1

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The four merged linears of a block, in the order in which they run."""
        heads = self.heads // self.tp
        # With fewer KV heads than ranks, every rank holds a copy of one.
        kv_heads = max(1, self.kv_heads // self.tp)
        intermediate = self.intermediate // self.tp
        return (
            Layer("qkv", (heads + 2 * kv_heads) * self.head_dim, self.hidden),
            Layer("o", self.hidden, heads * self.head_dim),
            Layer("gate_up", 2 * intermediate, self.hidden),
            Layer("down", self.hidden, intermediate),
        )

    @property
    def small(self) -> bool:
        """Whether every layer is: bound by launches, not by bytes or arithmetic."""
        return all(layer.N * layer.K < SMALL_LAYER for layer in self.layers)

    def floor(self, tokens: int) -> float | None:
        """Least dense time / sparse time of the sum at M = tokens; None where none is set.

        A model made of small layers need only not be slower.
        """
        if self.small:
            return 1.0
        return FLOORS.get(tokens)


MODELS = (
    Model(
        name="Llama-3.1-8B",
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
    ),
    Model(
        name="Llama-2-7B",
        hidden=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        intermediate=11008,
    ),
    Model(
        name="Llama-2-13B",
        hidden=5120,
        heads=40,
        kv_heads=40,
        head_dim=128,
        intermediate=13824,
    ),
    Model(
        name="Qwen3-14B",
        hidden=5120,
        heads=40,
        kv_heads=8,
        head_dim=128,
        intermediate=17408,
    ),
    Model(
        name="Llama-3.1-70B-TP8",
        hidden=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        intermediate=28672,
        tp=8,
    ),
    Model(
        name="SmolLM2-135M",
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        intermediate=1536,
    ),
)

# By model name: what benchmarks loop over.
SHAPES = {model.name: model.layers for model in MODELS}


def find_model(name: str) -> Model:
    """The model of that name, in any case.

    Raises:
        ValueError: there is none; lists those there are.
    """
    return find_named(name, MODELS)


def find_named(name: str, models: Sequence[NamedType]) -> NamedType:
    """As `find_model`, among `models`."""
    for model in models:
        if model.name.lower() == name.lower():
            return model
    raise ValueError(f"no model {name!r}; there is {', '.join(model.name for model in models)}")
