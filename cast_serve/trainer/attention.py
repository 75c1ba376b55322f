"""Attention over whole blocks: transformers' SDPA, which does not look for documents in a batch.

transformers finds packed documents by a look at the positions of every batch, on the host. While a
CUDA graph is recorded it cannot look, takes all batches for packed and makes a mask of all pairs of
tokens: a slower attention, and not the one that torch.compile has seen before. Up to 5.17 it makes
one of every batch then.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa_of_whole_blocks"


def attend_to_whole_blocks(model: PreTrainedModel) -> None:
    """Make a model that attends by SDPA do so without a look at its batches, in place.

    Its batches must be blocks of tokens that all see what is before them. What the model itself
    asks for, as sliding windows, it gets.
    """
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(_NAME, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(_NAME, _mask)
    model.set_attn_implementation(_NAME)


def _mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """None where a block needs no more than causality, which SDPA has of its own."""
    needs = options.get("use_vmap") or options.get("attention_mask") is not None
    length, window = options["kv_length"], options.get("local_size")
    if not needs and options["q_length"] == length and (window is None or length < window):
        return None
    return sdpa_mask(*args, **options)
