"""Facts of the model as it was loaded: its layers, what they hold, and what runs them.

Each rank describes what it holds (worker.py) and the API server puts the ranks together. The facts
travel as plain dicts, as vLLM's calls between processes allow nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

# The class that adds to vLLM's workers, for --worker-extension-cls, and its method.
EXTENSION = "cast_serve.server.worker.CastWorker"
FACTS = "cast_serve_facts"

# A plan's row: up to so many tokens (None: any number), kernel, config; see kernels/plan.py.
PlanRow = tuple[int | None, str, str]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer as the engine runs it, which fuses linears of the checkpoint.

    Attributes:
        name: the engine's, such as "model.layers.0.self_attn.qkv_proj".
        linears: names in the checkpoint of what it fuses.
        shape: [N, K] on one rank.
        ranks: how many ranks hold a piece of it.
        sparse: its weights are 2:4.
        packed: they stay packed, and `plan` runs them; else vLLM's dense linear does.
        zeros: among the weights of all ranks; None where that was not counted.
        bytes: of weights and metadata on all ranks.
        dense_bytes: the same, if it was stored dense.
    """

    name: str
    linears: tuple[str, ...]
    shape: tuple[int, int]
    ranks: int
    sparse: bool
    packed: bool
    zeros: int | None
    bytes: int
    dense_bytes: int
    plan: tuple[PlanRow, ...]

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "Layer":
        rows, columns = facts["shape"]
        plan = tuple((max_M, kernel, config) for max_M, kernel, config in facts["plan"])
        linears = tuple(facts["linears"])
        return cls(**{**facts, "linears": linears, "shape": (rows, columns), "plan": plan})

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the weights."""
        rows, columns = self.shape
        return None if self.zeros is None else self.zeros / (rows * columns * self.ranks)

    def with_rank(self, other: "Layer") -> "Layer":
        """This layer with another rank's piece of it."""
        zeros = None
        if self.zeros is not None and other.zeros is not None:
            zeros = self.zeros + other.zeros
        return replace(
            self,
            ranks=self.ranks + other.ranks,
            zeros=zeros,
            bytes=self.bytes + other.bytes,
            dense_bytes=self.dense_bytes + other.dense_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model over all ranks of one engine.

    Attributes:
        architecture: transformers' name, such as "LlamaForCausalLM".
        format: how the checkpoint stores it, a `Format`; else vLLM's name of its quantization, or
            "dense".
        ranks: tensor-parallel ranks times pipeline stages.
        other_bytes: weights that belong to no linear layer: embeddings, norms, biases, experts.
        load_seconds: from the first 2:4 layer made to the last one ready to run, with reading,
            packing, and timing or compiling kernels; of the slowest rank. None without such layers.
    """

    architecture: str
    format: str
    dtype: str
    device: str
    ranks: int
    layers: tuple[Layer, ...]
    other_bytes: int
    load_seconds: float | None

    @classmethod
    def of_ranks(cls, ranks: Iterable[dict[str, Any]]) -> "Model":
        """Put together what `describe` said on every rank."""
        described = list(ranks)
        layers: dict[str, Layer] = {}
        for facts in described:
            for layer in map(Layer.from_dict, facts["layers"]):
                known = layers.get(layer.name)
                layers[layer.name] = known.with_rank(layer) if known else layer
        seconds = [facts["load_seconds"] for facts in described if facts["load_seconds"]]
        first = described[0]
        return cls(
            architecture=first["architecture"],
            format=first["format"],
            dtype=first["dtype"],
            device=first["device"],
            ranks=len(described),
            layers=tuple(layers.values()),
            other_bytes=sum(facts["other_bytes"] for facts in described),
            load_seconds=max(seconds, default=None),
        )

    @property
    def sparse(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.sparse)

    @property
    def dense(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if not layer.sparse)

    @property
    def bytes(self) -> int:
        """Of all weights that the ranks hold."""
        return self.other_bytes + sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Of all weights, if every layer was stored dense."""
        return self.other_bytes + sum(layer.dense_bytes for layer in self.layers)

    @property
    def kernels(self) -> dict[tuple[int, int], tuple[PlanRow, ...]]:
        """By the shape of 2:4 layers: the plan that runs it; one row named "dense" where none."""
        return {layer.shape: layer.plan or ((None, "dense", ""),) for layer in self.sparse}


def count_linears(layers: Iterable[Layer]) -> int:
    """How many linears of the checkpoint the layers fuse, as the start-up report counts them."""
    return sum(len(layer.linears) for layer in layers)
