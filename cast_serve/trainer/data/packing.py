"""Attention that stays within a document, in blocks that hold several.

Positions start again at 0 with each document. transformers reads such position_ids, given without
an attention mask and without a cache, as several sequences in a row, and masks attention between
them (masking_utils.find_packed_sequence_indices). A block's first document is seen from where the
block cuts it.

EOS still predicts the next document's first token: that trains how documents start, which models
with BOS = EOS are asked for in use.
"""

import torch
from transformers import PreTrainedModel

from cast_serve.trainer.errors import RunError


def document_positions(tokens: torch.Tensor, *, eos: int) -> torch.Tensor:
    """int64 [..., context] positions that start again after each EOS of `tokens`."""
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    starts = torch.zeros_like(place)
    starts[..., 1:] = torch.where(tokens[..., :-1] == eos, place[..., 1:], 0)
    return place - starts.cummax(dim=-1).values


@torch.no_grad()
def require_document_attention(model: PreTrainedModel) -> None:
    """Try it: whether two documents in a block see nothing of each other.

    Not every model passes position_ids on to its mask (OPT), or has any (BLOOM, Mamba).

    Raises:
        RunError: the model mixes them.
    """
    first, other, second = ([1] * 4, [2] * 4, [3] * 4)
    # Two rows: with one, some attention implementations take another path.
    tokens = torch.tensor([first + second, other + second], device=model.device)
    positions = torch.tensor([[0, 1, 2, 3] * 2] * 2, device=model.device)
    training = model.training
    model.eval()
    try:
        seen = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 4:]
    except (TypeError, ValueError) as error:
        raise RunError(
            f"document_attention: {type(model).__name__} takes no position_ids; leave it out"
        ) from error
    finally:
        model.train(training)
    if not torch.equal(seen[0], seen[1]):
        raise RunError(
            f"document_attention: {type(model).__name__} attends across documents whatever its "
            "position_ids are; leave it out"
        )
