"""What the start-up report says of sparse layers, by device, and of models that are elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from layers import random_packed
from safetensors.torch import save_file
from vllm.platforms import current_platform

from cast_serve.envs import ForcedKernel
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.server.report import PACKED, UNPACKED, outlook_of_sparse, report

FORCED = ForcedKernel(name="reference", config=None)


@pytest.mark.parametrize(
    ("forced", "on_gpu", "expected"),
    [
        (None, False, UNPACKED),
        (None, True, PACKED),
        (FORCED, False, "packed, all run by one kernel: CAST_SERVE_KERNEL=reference"),
        (FORCED, True, "packed, all run by one kernel: CAST_SERVE_KERNEL=reference"),
    ],
)
def test_outlook_of_sparse(forced, on_gpu, expected):
    assert outlook_of_sparse(forced, on_gpu=on_gpu) == expected


EXAMPLE = "examples/tiny-llama-2of4"


def test_report_on_this_device(monkeypatch, capsys, request):
    monkeypatch.delenv("CAST_SERVE_KERNEL", raising=False)
    report(str(request.config.rootpath / EXAMPLE), None, None)
    said = capsys.readouterr().err
    assert "56 sparse, 0 dense" in said
    assert (PACKED if current_platform.is_cuda() else UNPACKED) in " ".join(said.split())


@pytest.mark.parametrize("model", ["s3://bucket/models/llama", "gs://bucket/a/b/c", "owner/name"])
def test_model_elsewhere_is_left_to_vllm(model, capsys):
    report(model, None, None)
    assert "vLLM looks it up" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "models/of/mine"])
def test_folder_that_there_is_not(model):
    with pytest.raises(CheckpointError, match="no such folder"):
        report(model, None, None)


def test_names_are_no_markup(capsys):
    report("owner/[name]", None, None)
    assert "owner/[name] is no folder here" in capsys.readouterr().err


def test_folder_that_may_not_be_read(monkeypatch, tmp_path):
    """As that of another user's home: systemd runs the server as a user of its own."""

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CheckpointError, match="sparse: cannot be read: Permission denied"):
        report(str(tmp_path / "sparse"), None, None)


@pytest.mark.parametrize(
    ("linear", "kind"),
    [
        ("model.layers.0.block_sparse_moe.experts.1.w1", "MoE expert"),
        ("model.layers.0.block_sparse_moe.gate", "MoE router"),
        ("lm_head", "lm_head"),
        ("model.layers.0.self_attn.q_proj", None),
        ("multi_modal_projector.linear_1", None),
    ],
)
def test_packed_linears_that_vllm_has_no_layer_for(tmp_path, linear, kind):
    """compressed-tensors packs them; vLLM's own kernels for them are dense."""
    values, mask = random_packed(16, 32, torch.bfloat16, "cpu")
    tensors = {"compressed": values, "bitmask": mask, "shape": torch.tensor([16, 32])}
    save_file(
        {f"{linear}.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}
    declared = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    config = {"model_type": "another", "quantization_config": declared}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind is None:
        report(str(tmp_path), None, None)
        return
    with pytest.raises(CheckpointError, match=f"{linear}.compressed: .*runs no packed {kind}"):
        report(str(tmp_path), None, None)
