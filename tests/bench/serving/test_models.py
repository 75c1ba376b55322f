"""Model folders: the shapes are the models', and no token is lost between text and ids."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cast_serve.bench.serving.engines import ENGINES
from cast_serve.bench.serving.models import MODELS, find_served_model, write_model
from cast_serve.model_loaders.formats import Format, recognise


# As the models' cards count them.
@pytest.mark.parametrize(
    ("name", "parameters"), [("Llama-3.1-8B", 8_030_261_248), ("Llama-3.2-1B", 1_235_814_400)]
)
def test_parameters(name: str, parameters: int, tmp_path: Path) -> None:
    write_model(find_served_model(name), tmp_path / "model", sparse=False)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters
    assert model.dtype is torch.bfloat16
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_id_is_a_word(model, tmp_path: Path) -> None:
    write_model(model, tmp_path / "model", sparse=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == tokenizer.vocab_size == model.vocabulary
    assert tokenizer.num_special_tokens_to_add() == 0
    ids = list(range(model.vocabulary))
    assert tokenizer(tokenizer.decode(ids)).input_ids == ids


def test_every_id_streams(tmp_path: Path) -> None:
    """vLLM's detokenizer takes one id after the other, by this class."""
    model = find_served_model("tiny")
    write_model(model, tmp_path / "model", sparse=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    stream = DecodeStream(ids=[5, 6], skip_special_tokens=True)
    ids = range(3, model.vocabulary)
    texts = [stream.step(tokenizer.backend_tokenizer, token) for token in ids]
    assert texts == [f" w{token}" for token in ids]


def test_special_ids(tmp_path: Path) -> None:
    write_model(find_served_model("tiny"), tmp_path / "model", sparse=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == config[name] == generation[name]


def test_sparse_differs_in_what_it_declares(tmp_path: Path) -> None:
    model = find_served_model("tiny")
    configs = {}
    for engine in ENGINES:
        folder = engine.write_model(model, tmp_path)
        configs[engine.sparse] = json.loads((folder / "config.json").read_text())
    declared = configs[True].pop("quantization_config")
    assert configs[True] == configs[False]
    scheme = recognise({"quantization_config": declared}, Path("config.json"))
    assert scheme.format is Format.PACKED
    assert scheme.why_left_out("lm_head") is not None
    assert scheme.why_left_out("model.layers.0.mlp.up_proj") is None


def test_no_such_model() -> None:
    with pytest.raises(ValueError, match=r"no model 'gpt-5'; there is Llama-3\.1-8B, "):
        find_served_model("gpt-5")
