"""One-shot pruning: magnitude, Wanda, SparseGPT."""

from cast_serve.trainer.oneshot.prune import METHODS, prune_oneshot

__all__ = ["METHODS", "prune_oneshot"]
