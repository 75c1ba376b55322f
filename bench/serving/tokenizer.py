"""A tokenizer whose every id is one word, so that prompts have exactly the length asked for.

`vllm bench serve` makes a prompt of token ids, decodes it, and has the server encode the text
again; with byte pairs, some prompts come back longer or shorter.
"""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS = 0, 1, 2
SPECIAL = ("<unk>", "<bos>", "<eos>")


def word(token: int) -> str:
    """The text of a token id."""
    return SPECIAL[token] if token < len(SPECIAL) else f"w{token}"


def write_tokenizer(folder: Path, *, words: int) -> None:
    """Write a tokenizer of `words` ids into `folder`; it adds neither bos nor eos to a prompt."""
    vocabulary = {word(token): token for token in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNK],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
