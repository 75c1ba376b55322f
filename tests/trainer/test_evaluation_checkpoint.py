"""Every form a checkpoint is stored in, loaded as the model that would be served."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cast_serve.kernels.pattern import nm_mask
from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.prune import prune
from cast_serve.trainer.config import Pattern
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.checkpoint import load_checkpoint
from cast_serve.trainer.export import write_training_form
from cast_serve.trainer.layers import add_scales, choose_layers, scaled_layers
from cast_serve.trainer.source import load_source

CT_BITMASK = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "sparsity_config": {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    },
}


def load(folder, dtype=torch.float32):
    return load_checkpoint(folder, dtype=dtype)


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module", params=["llama", "tied", "gpt2"])
def stored(request, tmp_path_factory, llama_dir, gpt2_dir, tokenizer):
    """Folders of one 2:4 model by form; "pruned" and "training" are one model, not the same."""
    base = tmp_path_factory.mktemp(request.param)
    dense = {"llama": llama_dir, "gpt2": gpt2_dir}.get(request.param, base / "tied")
    if request.param == "tied":
        source = load_source(llama_dir)
        source.model.config.tie_word_embeddings = True
        source.model.tie_weights()
        source.model.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        assert "lm_head.weight" not in load_file(dense / "model.safetensors")
    prune(dense, base / "pruned")
    convert(base / "pruned", base / "packed", to="packed")
    shutil.copytree(base / "packed", base / "ct")
    edit_config(base / "ct", quantization_config=CT_BITMASK)

    model = load_source(dense).model
    choices = choose_layers(model, Pattern.parse("2:4"), scaling_blocks=2)
    add_scales(model, choices, scaling_blocks=2)
    with torch.no_grad():
        for _, layer in scaled_layers(model):
            layer.cast_scale.uniform_(0.5, 1.5)
    write_training_form(
        model,
        model.state_dict(),
        dense,
        base / "training",
        pattern="2:4",
        ignore=[choice.name for choice in choices if choice.dense_because],
    )
    return {"plain": dense} | {n: base / n for n in ("pruned", "packed", "ct", "training")}


def test_plain(stored):
    loaded = load(stored["plain"])
    expected = AutoModelForCausalLM.from_pretrained(stored["plain"], dtype=torch.float32)
    assert loaded.form is Format.PLAIN
    assert_equal(loaded.model, expected)


@pytest.mark.parametrize(
    ("name", "form"),
    [("pruned", Format.DENSE), ("packed", Format.PACKED), ("ct", Format.CT_BITMASK)],
)
def test_sparse_forms(stored, name, form):
    before = digest(stored[name])
    loaded = load(stored[name])
    # transformers knows nothing of the form and loads the weights as they are stored.
    expected = AutoModelForCausalLM.from_pretrained(stored["pruned"], dtype=torch.float32)
    assert loaded.form is form
    assert_equal(loaded.model, expected)
    assert loaded.tokenizer.eos_token_id == 0
    assert digest(stored[name]) == before


def test_training_form_is_pruned_and_folded(stored):
    weights = load_file(stored["training"] / "model.safetensors")
    loaded = load(stored["training"])
    assert loaded.form is Format.TRAINING
    names = [name.removesuffix(".cast_scale") for name in weights if name.endswith(".cast_scale")]
    assert len(names) in (8, 14)
    transposed = loaded.model.config.model_type == "gpt2"
    for name in names:
        weight, scale = weights[f"{name}.weight"], weights[f"{name}.cast_scale"]
        weight = weight.t() if transposed else weight
        folded = weight * nm_mask(weight) * scale.repeat_interleave(weight.shape[1] // 2, dim=1)
        found = loaded.model.get_submodule(name).weight
        assert torch.equal(found.t() if transposed else found, folded)


def assert_equal(model, expected):
    assert not model.training
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected.eval()(ids).logits)


def test_bf16_is_as_transformers_loads_it(llama_dir):
    """Weights in bf16, rotary frequencies in fp32: model.to(bf16) would round them."""
    model = load(llama_dir, torch.bfloat16).model
    expected = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_equal(model, expected)


def test_missing_weight_is_refused(stored, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(stored["pruned"], folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("norm.weight", "ln_f.weight")))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RunError, CheckpointError), match=r"is missing|incomplete"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, CheckpointError, "'gptq' is not read"),
        ({"model_type": "unheard-of"}, RunError, "cannot load"),
    ],
)
def test_what_is_not_read(stored, tmp_path, changes, error, message):
    folder = tmp_path / "other"
    shutil.copytree(stored["packed"], folder)
    edit_config(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
