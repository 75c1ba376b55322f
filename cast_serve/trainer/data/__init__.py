"""Training data: sources of text to blocks of tokens, and the order in which a run reads them.

files, hub   a source's documents, in pieces
tokens       documents to a token stream on disk: the model's tokenizer, EOS after each document
cache        token streams kept for the next run
blocks       streams cut in blocks of `context` tokens; the rest shorter than one is dropped
corpus       all of this for a run's sources: training blocks, evaluation blocks, identity
mixture      which source each sequence of the run comes from
packing      attention that stays within a document
stream       sequence i of the run
"""

from cast_serve.trainer.data.blocks import to_blocks
from cast_serve.trainer.data.corpus import Corpus, load_corpus, read_tokens, require_keys
from cast_serve.trainer.data.hub import hub_commits
from cast_serve.trainer.data.stream import BlockStream, collate

__all__ = [
    "BlockStream",
    "Corpus",
    "collate",
    "hub_commits",
    "load_corpus",
    "read_tokens",
    "require_keys",
    "to_blocks",
]
