"""What CastConfig checks of a checkpoint on the engine's side, as vLLM itself does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from vllm.model_executor.models.utils import WeightsMapper

from cast_serve.config import CastConfig
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError

NORM = "model.layers.0.input_layernorm.weight"
REVISION = "0" * 40


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A checkpoint in CAST's training form."""
    tiny_models.write_stored("llama", tmp_path / "stored")
    tiny_models.write_training(tmp_path / "stored", tmp_path / "training")
    return tmp_path / "training"


def without(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def of(
    folder: Path,
    name: str | None = None,
    revision: str | None = None,
    model_type: str = "llama",
) -> CastConfig:
    """The config of the checkpoint in `folder`, served under `name`."""
    declared = Checkpoint.open(folder).config["quantization_config"]
    config = CastConfig.from_config(declared)
    hf_config = SimpleNamespace(model_type=model_type)
    config.maybe_update_config(name or str(folder), hf_config=hf_config, revision=revision)
    return config


def in_hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`folder` as the snapshot of owner/name that vLLM has downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (model / "snapshots").mkdir()
    return folder.rename(model / "snapshots" / REVISION)


@pytest.mark.parametrize("name", [NORM, "model.layers.1.self_attn.o_proj.cast_scale"])
def test_what_is_missing_is_named(training, name):
    """Without its scale a weight would be served as if that was 1."""
    without(training, name)
    with pytest.raises(CheckpointError, match=name.removesuffix(".cast_scale")):
        of(training).read_headers()


def test_what_is_missing_of_a_plain_checkpoint(tmp_path):
    """Served with --quantization cast, under which vLLM does not look either."""
    tiny_models.write_stored("llama", tmp_path)
    served = CastConfig()
    served.maybe_update_config(str(tmp_path))
    without(tmp_path, NORM)
    with pytest.raises(CheckpointError, match=NORM):
        served.read_headers()


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_model_of_the_hub(training, tmp_path, monkeypatch, revision):
    served = in_hub_cache(training, tmp_path, monkeypatch)
    of(served, "owner/name", revision).read_headers()
    without(served, NORM)
    with pytest.raises(CheckpointError, match=NORM):
        of(served, "owner/name", revision).read_headers()


def test_weights_elsewhere_are_left_to_vllm(training):
    """In a bucket, and of a folder with config.json alone."""
    of(training, "s3://bucket/owner/name").read_headers()
    served = of(training)
    (training / "model.safetensors").unlink()
    served.read_headers()
    assert served.checkpoint() is None


def test_download_dir(training, tmp_path, monkeypatch):
    """Weights are there; what the hub's cache has of them may be half of an older download."""
    served = in_hub_cache(training, tmp_path, monkeypatch)
    without(served, NORM)
    config = of(served, "owner/name")
    config.download_dir = str(tmp_path / "elsewhere")
    config.read_headers()
    # Of a folder it says nothing.
    config = of(served)
    config.download_dir = str(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=NORM):
        config.read_headers()


def test_head_that_drafts_takes_its_embedding_from_the_model(training):
    """vLLM makes a Llama into an EAGLE head, whose checkpoint rightly lacks some of it."""
    without(training, "model.embed_tokens.weight")
    of(training, model_type="eagle").read_headers()
    with pytest.raises(CheckpointError, match="embed_tokens"):
        of(training, model_type="llama").read_headers()


def test_another_declaration_than_in_the_folder(training):
    """By --hf-overrides: the headers are not of its format."""
    served = CastConfig()
    served.maybe_update_config(str(training))
    served.read_headers()
    assert served.dense_by_headers == frozenset()


def test_dense_linears_by_the_names_of_vllm(tmp_path):
    tiny_models.write_stored("llama", tmp_path / "stored")
    ignored = tiny_models.cast_config("dense", [r"re:model\.layers\.0\..*o_proj"])
    tiny_models.copy_with_config(tmp_path / "stored", tmp_path / "dense", ignored)
    config = of(tmp_path / "dense")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language."}))
    config.read_headers()
    assert "language.layers.0.self_attn.o_proj" in config.dense_by_headers
    assert "language.layers.1.self_attn.o_proj" not in config.dense_by_headers
