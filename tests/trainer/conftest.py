"""Tiny random models with a byte-level tokenizer, and text to train them on."""

import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data_source import DataSource

EOS = "<eos>"
VOCAB = 257


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokens of tests do not land in the cache of who runs them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, EOS is 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {EOS: 0} | {letter: place for place, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def tiny_gpt2() -> GPT2LMHeadModel:
    """Has dropout, so a run only resumes exactly if the random state does."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return _save(tiny_llama().to(torch.bfloat16), tokenizer, tmp_path_factory.mktemp("m") / "llama")


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return _save(tiny_gpt2(), tokenizer, tmp_path_factory.mktemp("m") / "gpt2")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30 kB of words in 20 documents."""
    draw = random.Random(0)
    words = ["whale", "ship", "sea", "captain", "harpoon", "the", "and", "of"]
    documents = [" ".join(draw.choices(words, k=300)) for _ in range(20)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n\n".join(documents))
    return path


@pytest.fixture
def make_config(llama_dir: Path, text_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """RunConfig of a short run of the tiny Llama, with changes."""

    def make(**changes: object) -> RunConfig:
        settings = {
            "model": llama_dir,
            "data": (DataSource(place=str(text_file)),),
            "output": tmp_path / "out",
            "steps": 12,
            "context": 32,
            "batch_size": 4,
            "lr": 2e-3,
            "lambda_": 1e-4,
            "device": "cpu",
            "export": "training",
        }
        return RunConfig(**(settings | changes))

    return make


@pytest.fixture
def tiny_models() -> dict[str, Callable[..., PreTrainedModel]]:
    """Constructors of tiny random models by name, one seed each."""
    return {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    """Twenty pairs of prompt and completion."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{n} is", "completion": " odd" if n % 2 else " even, yes"} for n in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def no_large_files() -> Callable[[], AbstractContextManager[None]]:
    """A context in which this process can write no file of 100 kB: a disk that fills."""

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        signalled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, signalled)

    return limited
