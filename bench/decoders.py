"""Models that training is measured on: dimensions as in their config.json, embeddings tied."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A Llama; `kv` is the width of its keys, heads are `head` wide."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int
    head: int
    vocab: int

    def linears(self) -> list[tuple[int, int]]:
        """[N, K] of the weights that are sparsified."""
        h, f = self.hidden, self.intermediate
        return [(h, h), (self.kv, h), (self.kv, h), (h, h), (f, h), (f, h), (h, f)] * self.layers

    def rest(self) -> list[tuple[int, ...]]:
        """Shapes of what stays dense: embedding, norms, two scales a row."""
        norms = [(self.hidden,)] * (2 * self.layers + 1)
        return [(self.vocab, self.hidden), *norms, *((rows, 2) for rows, _ in self.linears())]


DECODERS = (
    Decoder(
        name="SmolLM2-135M",
        layers=30,
        hidden=576,
        intermediate=1536,
        kv=192,
        head=64,
        vocab=49152,
    ),
    Decoder(
        name="Llama-3.2-1B",
        layers=16,
        hidden=2048,
        intermediate=8192,
        kv=512,
        head=64,
        vocab=128256,
    ),
)
SMALL = Decoder(name="small", layers=1, hidden=64, intermediate=128, kv=32, head=32, vocab=256)
