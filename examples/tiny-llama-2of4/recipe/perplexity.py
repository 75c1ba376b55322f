"""Perplexity of a dense-stored Hugging Face checkpoint on a text file.

Weights are used as stored and computed in fp32. The documents of the file (separated by three
newlines) become one token stream with an end-of-text token before each and after the last. The
stream is cut into non-overlapping windows of `context` tokens; the first token of a window is only
context and the remainder after the last whole window is dropped, so every checkpoint with the same
tokenizer is scored on the same tokens.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

SEPARATOR = "\n\n\n"


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    eos = tokenizer.eos_token_id
    ids = [eos]
    # verbose=False: a document longer than the model's context is no mistake here.
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)
    for document_ids in encoded["input_ids"]:
        ids += document_ids
        ids.append(eos)
    return torch.tensor(ids)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, stream: torch.Tensor, *, context: int, batch_size: int = 8
) -> tuple[float, int]:
    """Returns the perplexity and the number of tokens scored."""
    if len(stream) < context:
        raise ValueError(f"the text has {len(stream)} tokens, a window needs {context}")
    windows = stream[: len(stream) // context * context].view(-1, context)
    model.eval()
    nll = 0.0
    for batch in windows.split(batch_size):
        ids = batch.to(model.device)
        logits = model(ids).logits[:, :-1].float()
        nll += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    scored = len(windows) * (context - 1)
    return math.exp(nll / scored), scored


def main() -> None:
    parser = argparse.ArgumentParser(description="perplexity of a dense-stored checkpoint")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="text, e.g. split/heldout.txt")
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = args.data.read_text(encoding="utf-8").split(SEPARATOR)
    ppl, scored = perplexity(model, token_stream(tokenizer, documents), context=args.context)
    print(f"perplexity {ppl:.3f}  tokens {scored}  context {args.context}  {args.model}")


if __name__ == "__main__":
    main()
