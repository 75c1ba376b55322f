import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cast_serve.model_loaders.check import check
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.convert import convert
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.prune import prune
from cast_serve.model_loaders.summary import summarise

FORMATS = ["packed", "dense", "training", "ct-bitmask", "ct-dense", "plain"]
Q0 = "model.layers.0.self_attn.q_proj"
Make = Callable[[str], Any]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("stored", FORMATS)
def test_convert_to_packed_and_back(make: Make, tmp_path: Path, stored: str) -> None:
    folder = make(stored).save()
    before = hashes(folder.path)
    convert(folder.path, tmp_path / "packed", to="packed")
    convert(tmp_path / "packed", tmp_path / "dense", to="dense")
    assert hashes(folder.path) == before
    packed, dense = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "dense")
    for name, weight in folder.expected.items():
        assert torch.equal(dense[name + ".weight"], weight)
        assert packed[name + ".compressed"].shape == (weight.shape[0], weight.shape[1] // 2)
        assert packed[name + ".bitmask"].shape == (weight.shape[0], weight.shape[1] // 8)
        assert packed[name + ".shape"].tolist() == [[size] for size in weight.shape]
    assert dense.keys() == {name + ".weight" for name in folder.expected} | {
        name for name in folder.tensors if not name.startswith(tuple(folder.expected))
    } | {name for name in folder.tensors if name.endswith(".bias")}


@pytest.mark.parametrize("to", ["packed", "dense"])
def test_convert_writes_config(make: Make, tmp_path: Path, to: str) -> None:
    folder = make("ct-bitmask").save()
    convert(folder.path, tmp_path / "out", to=to)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "cast",
        "format": to,
        "sparsity": "2:4",
        "ignore": ["lm_head"],
        "version": 1,
    }
    assert config["model_type"] == "llama"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_convert_drops_other_declarations(make: Make, tmp_path: Path) -> None:
    folder = make("ct-bitmask")
    declared = folder.config.pop("quantization_config")
    folder.config |= {"compression_config": declared, "text_config": {"hidden_size": 32}}
    convert(folder.save().path, tmp_path / "out", to="packed")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "compression_config" not in config
    assert config["text_config"] == {"hidden_size": 32}


def test_convert_matches_compressed_tensors_bytes(make: Make, tmp_path: Path) -> None:
    """What is written packed is what compressed-tensors would have written, -0.0 aside."""
    ct = make("ct-bitmask")
    dense = make("ct-dense").save()
    convert(dense.path, tmp_path / "out", to="packed")
    written = tensors_of(tmp_path / "out")
    for name in ct.expected:
        for part in ("compressed", "bitmask", "shape"):
            assert torch.equal(written[f"{name}.{part}"], ct.tensors[f"{name}.{part}"])


@pytest.mark.parametrize(
    ("dtype", "keys"),
    [(torch.float16, ["torch_dtype"]), (torch.float32, ["dtype"]), (torch.bfloat16, [])],
)
def test_convert_casts(make: Make, tmp_path: Path, dtype: torch.dtype, keys: list[str]) -> None:
    folder = make("training")
    folder.config.pop("torch_dtype")
    folder.config.update(dict.fromkeys(keys, "bfloat16"))
    convert(folder.save().path, tmp_path / "out", to="dense", dtype=dtype)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in keys or ["dtype"]:
        assert config[key] == str(dtype).removeprefix("torch.")


def test_convert_refuses_overflow(make: Make, tmp_path: Path) -> None:
    folder = make("dense")
    folder.tensors[Q0 + ".weight"][0, 7] = 1e6
    with pytest.raises(CheckpointError, match=f"{Q0}.weight: overflows float16"):
        convert(folder.save().path, tmp_path / "out", to="packed", dtype=torch.float16)


def test_convert_sharded(make: Make, tmp_path: Path) -> None:
    folder = make("dense").save(shards=3)
    convert(folder.path, tmp_path / "out", to="packed", max_shard_bytes=6000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    total = len(shards)
    assert total > 1
    assert shards == [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    loaded = tensors_of(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded.values())
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 6000
        assert {name for name, where in index["weight_map"].items() if where == shard} == set(
            tensors
        )
    convert(tmp_path / "out", tmp_path / "back", to="dense")
    back = tensors_of(tmp_path / "back")
    assert all(torch.equal(back[n + ".weight"], w) for n, w in folder.expected.items())


def test_convert_copies_other_files(make: Make, tmp_path: Path) -> None:
    folder = make("dense").save()
    for name in ("tokenizer.json", "README.md", "cast.json", "chat/template.jinja"):
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text(f"{name}!")
    for name in ("training_args.bin", "optimizer.pt", ".cache", "old/model.safetensors"):
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_text("no")
    convert(folder.path, tmp_path / "out", to="packed")
    assert hashes(tmp_path / "out").keys() == {
        *("config.json", "model.safetensors", "tokenizer.json", "README.md", "cast.json"),
        "chat/template.jinja",
    }
    assert (tmp_path / "out" / "cast.json").read_text() == "cast.json!"


def test_convert_writes_provenance(make: Make, tmp_path: Path) -> None:
    folder = make("dense").save()
    (folder.path / "cast.json").write_text("{}")
    convert(folder.path, tmp_path / "out", to="packed", provenance={"tokens": 7})
    assert json.loads((tmp_path / "out" / "cast.json").read_text()) == {"tokens": 7}


def test_convert_reports_progress(make: Make, tmp_path: Path) -> None:
    folder = make("training").save()
    seen: list[tuple[int, int]] = []
    convert(folder.path, tmp_path / "o", to="packed", progress=lambda *now: seen.append(now))
    total = sum(tensor.nbytes for tensor in folder.tensors.values())
    assert seen == sorted(seen) and seen[-1] == (total, total)
    assert {whole for _, whole in seen} == {total}


def test_convert_files_are_readable_by_others(make: Make, tmp_path: Path) -> None:
    convert(make("dense").save().path, tmp_path / "out", to="packed")
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == expected


def test_convert_keeps_partly_sparse(make: Make, tmp_path: Path) -> None:
    folder = make("plain")
    folder.tensors[Q0 + ".weight"] = torch.randn(32, 32)
    convert(folder.save().path, tmp_path / "out", to="packed")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["quantization_config"]["ignore"]) == ["lm_head", Q0]
    written = tensors_of(tmp_path / "out")
    assert torch.equal(written[Q0 + ".weight"], folder.tensors[Q0 + ".weight"])
    assert all(finding.problem is None for finding in check(Checkpoint.open(tmp_path / "out")))


def test_convert_refuses_dense_model(make: Make, tmp_path: Path) -> None:
    folder = make("plain")
    for name in folder.expected:
        folder.tensors[name + ".weight"] = torch.randn(folder.expected[name].shape)
    with pytest.raises(CheckpointError) as raised:
        convert(folder.save().path, tmp_path / "out", to="packed")
    message = str(raised.value)
    assert "model.layers.0.mlp.down_proj.weight: not 2:4: 512 of 512 groups" in message
    assert "none of 8 linears is 2:4, prune first" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"to": "training"}, "to='training' is not one of packed, dense", id="to"),
        pytest.param(
            {"to": "packed", "dtype": torch.float64}, "dtype=float64 is not one of", id="dtype"
        ),
    ],
)
def test_convert_refuses_options(
    make: Make, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        convert(make("dense").save().path, tmp_path / "out", **options)


def test_convert_gpt2(make: Make, tmp_path: Path) -> None:
    folder = make("plain")
    folder.config["model_type"] = "gpt2"
    weight = folder.expected["model.layers.0.mlp.up_proj"]
    name = "transformer.h.0.mlp.c_fc"
    folder.tensors[name + ".weight"] = weight.t().contiguous()
    for embedding in ("wte", "wpe"):
        folder.tensors[f"transformer.{embedding}.weight"] = torch.ones(4, 32)
    for norm in ("weight", "bias"):
        folder.tensors[f"transformer.ln_f.{norm}"] = torch.ones(32)
    convert(folder.save().path, tmp_path / "packed", to="packed")
    convert(tmp_path / "packed", tmp_path / "dense", to="dense")
    packed = tensors_of(tmp_path / "packed")
    # [N = out, K = in], as every other packed linear.
    assert packed[name + ".shape"].flatten().tolist() == list(weight.shape)
    assert torch.equal(tensors_of(tmp_path / "dense")[name + ".weight"], weight.t())


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "model")


@pytest.mark.parametrize("failure", [OSError(28, os.strerror(28)), KeyboardInterrupt()], ids=repr)
def test_failed_write_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    folder = make("dense").save()
    before = hashes(folder.path)
    calls = []

    def fail_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(os, "fsync", fail_second)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        convert(folder.path, tmp_path / "out", to="packed")
    if isinstance(failure, OSError):
        assert str(raised.value) == (
            f"{tmp_path / 'out'}: the disk is full; free space or choose another output"
        )
    assert leftovers(tmp_path) == []
    assert hashes(folder.path) == before


def test_failed_read_leaves_nothing(make: Make, tmp_path: Path) -> None:
    """Several shards are on disk already when the last layer turns out to be damaged."""
    folder = make("dense")
    last = "model.layers.1.self_attn.k_proj.weight"
    folder.tensors[last][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=f"{last}: nan at row 3, column 4"):
        convert(folder.save().path, tmp_path / "out", to="packed", max_shard_bytes=2000)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        pytest.param("model", "is in the folder that is read", id="same"),
        pytest.param("model/packed", "is in the folder that is read", id="inside"),
        pytest.param("model/../model", "is in the folder that is read", id="same-by-dots"),
        pytest.param("link/packed", "is in the folder that is read", id="inside-by-link"),
        pytest.param("full", "exists and is not an empty folder", id="not-empty"),
        pytest.param("file", "exists and is not an empty folder", id="file"),
        pytest.param("file/out", "cannot be written: ", id="under-file"),
    ],
)
def test_convert_refuses_output(make: Make, tmp_path: Path, output: str, reason: str) -> None:
    folder = make("dense").save()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(folder.path)
    before = hashes(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        convert(folder.path, tmp_path / output, to="packed")
    assert hashes(tmp_path) == before


def test_convert_takes_empty_folder_and_new_parents(make: Make, tmp_path: Path) -> None:
    folder = make("dense").save()
    (tmp_path / "empty").mkdir()
    for output in ("empty", "a/b/c"):
        convert(folder.path, tmp_path / output, to="packed")
        assert (tmp_path / output / "config.json").is_file()


def test_prune_then_pack(make: Make, tmp_path: Path) -> None:
    folder = make("plain")
    generator = torch.Generator().manual_seed(3)
    for name in folder.expected:
        shape = folder.expected[name].shape
        folder.tensors[name + ".weight"] = torch.randn(shape, generator=generator)
    before = hashes(folder.save().path)
    prune(folder.path, tmp_path / "pruned")
    assert hashes(folder.path) == before
    pruned = tensors_of(tmp_path / "pruned")
    for name in folder.expected:
        dense = folder.tensors[name + ".weight"]
        kept = dense.abs().reshape(-1, 4).topk(2, dim=1).indices
        mask = torch.zeros(dense.numel() // 4, 4).scatter_(1, kept, 1.0).reshape(dense.shape)
        assert torch.equal(pruned[name + ".weight"], dense * mask)
    assert torch.equal(pruned["lm_head.weight"], folder.tensors["lm_head.weight"])
    provenance = json.loads((tmp_path / "pruned" / "cast.json").read_text())
    assert provenance == {"method": "one-shot magnitude", "sparsity": "2:4"}
    convert(tmp_path / "pruned", tmp_path / "packed", to="packed")
    assert len(summarise(Checkpoint.open(tmp_path / "packed")).sparse) == 8


def test_prune_gpt2_along_inputs(make: Make, tmp_path: Path) -> None:
    folder = make("plain")
    folder.config["model_type"] = "gpt2"
    name = "transformer.h.0.attn.c_attn.weight"
    folder.tensors[name] = torch.randn(32, 48)
    prune(folder.save().path, tmp_path / "out")
    pruned = tensors_of(tmp_path / "out")[name]
    assert pruned.shape == (32, 48)
    assert ((pruned.t().reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("stored", ["packed", "dense", "training", "ct-bitmask"])
def test_prune_refuses_sparse(make: Make, tmp_path: Path, stored: str) -> None:
    with pytest.raises(CheckpointError, match="which is 2:4 as it is; prune a dense checkpoint"):
        prune(make(stored).save().path, tmp_path / "out")


def test_prune_refuses_method(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method='wanda' is not one of magnitude"):
        prune(make("plain").save().path, tmp_path / "out", method="wanda")
