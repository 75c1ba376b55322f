"""Every bad input is one line that names file and tensor, and `cast-model check` exits with 1."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cast_serve.cli.model import app
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.model_loaders.stream import stream

Q0 = "model.layers.0.self_attn.q_proj"
# Unlike q_proj it has no bias.
UP0 = "model.layers.0.mlp.up_proj"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@dataclass(frozen=True)
class Bad:
    """A way to break a good checkpoint, and what the error must say.

    `tensors` and `config` edit what is saved, `files` what lies on disk after that.
    """

    id: str
    says: str
    file: str = SINGLE
    tensor: str = ""
    stored: str = "packed"
    shards: int = 1
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None
    config: Callable[[dict[str, Any]], object] | None = None
    files: Callable[[Path], object] | None = None


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep(len(data))])

    return apply


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Rewrite the header of model.safetensors as `edit` changes or replaces it."""

    def apply(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        parsed = json.loads(data[8 : 8 + length])
        replaced = edit(parsed)
        text = replaced if isinstance(replaced, bytes) else json.dumps(parsed).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        parsed = json.loads((folder / INDEX).read_text())
        edit(parsed["weight_map"])
        (folder / INDEX).write_text(json.dumps(parsed))

    return apply


def only(name: str) -> Callable[[Path], object]:
    """Leave a folder whose only weights are the file `name`."""
    return lambda folder: (folder / SINGLE).rename(folder / name)


def set_at(name: str, place: object, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors[name].__setitem__(place, value)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensor})


def drop(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def declare(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(changes)


def sparsity(**changes: object) -> Callable[[dict[str, Any]], object]:
    def apply(config: dict[str, Any]) -> None:
        declared = config["quantization_config"]
        declared["sparsity_config"] = {**declared["sparsity_config"], **changes}

    return apply


def duplicate_shard(folder: Path) -> None:
    """Without an index: the last shard again, as a file of another name."""
    (folder / INDEX).unlink()
    shutil.copy(folder / SHARDS[2], folder / "extra.safetensors")


INT8_GROUP = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
FP8_KV = {"num_bits": 8, "type": "float"}
NOT_24 = "is not a multiple of 8, so it cannot be packed"

# fmt: off
# One case in one to three lines; the formatter would make ten of each.
FILES = [
    Bad("config-missing", "no such file", "config.json",
        files=lambda f: (f / "config.json").unlink()),
    Bad("config-json", "is not valid JSON", "config.json",
        files=cut("config.json", lambda n: n - 3)),
    Bad("config-list", "holds a JSON list, not an object", "config.json",
        files=lambda f: (f / "config.json").write_text("[1]")),
    Bad("config-utf8", "is not valid JSON", "config.json",
        files=lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}')),
    Bad("no-weights", "holds no .safetensors file", "", files=lambda f: (f / SINGLE).unlink()),
    Bad("pickle", "only safetensors is read", "pytorch_model.bin", files=only("pytorch_model.bin")),
    Bad("pickle-pt", "save_pretrained(NEW_DIR)", "consolidated.00.pth",
        files=only("consolidated.00.pth")),
    Bad("gguf", "run `cast-model import`", "", files=only("model.gguf")),
    Bad("weights-are-folder", "no such file",
        files=lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir())),
    Bad("truncated", "truncated: ", tensor=".bitmask",
        files=cut(SINGLE, lambda n: n - 1)),
    Bad("truncated-in-header", "cannot hold a header of", files=cut(SINGLE, lambda n: 100)),
    Bad("truncated-to-nothing", "0 bytes are no safetensors file", files=cut(SINGLE, lambda n: 0)),
    Bad("truncated-shard", "truncated: ", SHARDS[1], shards=3,
        files=cut(SHARDS[1], lambda n: n // 2)),
    Bad("missing-shard", "but model.safetensors.index.json names it", SHARDS[1], shards=3,
        files=lambda f: (f / SHARDS[1]).unlink()),
    Bad("missing-numbered-shard", f"no such file, but {SHARDS[0]} is", SHARDS[1], shards=3,
        files=lambda f: ((f / SHARDS[1]).unlink(), (f / INDEX).unlink())),
    Bad("lfs-pointer", "run `git lfs pull`",
        files=lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n")),
    Bad("header-length", "is over the limit",
        files=lambda f: (f / SINGLE).write_bytes(b"\xff" * 64)),
    Bad("header-json", "header is not valid JSON", files=header(lambda h: b'{"a": ')),
    Bad("header-deep", "header is not valid JSON", files=header(lambda h: b"[" * 200_000)),
    Bad("header-list", "header is not a JSON object", files=header(lambda h: b"[]")),
    Bad("header-twice", "'lm_head.weight' appears twice",
        files=header(lambda h: b'{"lm_head.weight": {}, "lm_head.weight": {}}')),
    Bad("header-entry", "needs dtype, shape and data_offsets", tensor="lm_head.weight",
        files=header(lambda h: h["lm_head.weight"].pop("dtype"))),
    Bad("header-dtype", "dtype 'F4' is not one of BOOL", tensor="lm_head.weight",
        files=header(lambda h: h["lm_head.weight"].update(dtype="F4"))),
    Bad("header-shape", "takes 2560 bytes, not 5120", tensor="lm_head.weight",
        files=header(lambda h: h["lm_head.weight"].update(shape=[20, 32]))),
    Bad("header-negative", "is not a list of sizes", tensor="lm_head.weight",
        files=header(lambda h: h["lm_head.weight"].update(shape=[-40, -32]))),
    Bad("header-offsets", "are not [start, end]", tensor="lm_head.weight",
        files=header(lambda h: h["lm_head.weight"].update(data_offsets=[8, 0]))),
    Bad("header-overlap", "overlaps the tensor before it",
        files=header(lambda h: h.update({"model.embed_tokens.weight": h["lm_head.weight"]}))),
    Bad("header-hole", "leaves a hole", files=header(lambda h: h.pop("lm_head.weight"))),
    Bad("header-empty", "holds no tensors",
        files=lambda f: (f / SINGLE).write_bytes(struct.pack("<Q", 2) + b"{}")),
    Bad("trailing", "4 bytes follow the last tensor",
        files=lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"\0" * 4)),
    Bad("index-json", "is not valid JSON", INDEX, shards=3, files=cut(INDEX, lambda n: n // 2)),
    Bad("index-map", "has no weight_map", INDEX, shards=3,
        files=lambda f: (f / INDEX).write_text("{}")),
    Bad("index-absent-tensor", "is in no shard", INDEX, "ghost.weight", shards=3,
        files=index(lambda m: m.update({"ghost.weight": SHARDS[0]}))),
    Bad("index-wrong-shard", "the index says", INDEX, "lm_head.weight", shards=3,
        files=index(lambda m: m.update({"lm_head.weight": SHARDS[2]}))),
    Bad("index-absent-file", "names it", "gone.safetensors", "lm_head.weight", shards=3,
        files=index(lambda m: m.update({"lm_head.weight": "gone.safetensors"}))),
    Bad("index-traversal", "a shard is a plain name", INDEX, "lm_head.weight", shards=3,
        files=index(lambda m: m.update({"lm_head.weight": "../model.safetensors"}))),
    Bad("index-absolute", "a shard is a plain name", INDEX, "lm_head.weight", shards=3,
        files=index(lambda m: m.update({"lm_head.weight": "/etc/model.safetensors"}))),
    Bad("index-not-safetensors", "which is no .safetensors file", INDEX, "lm_head.weight", shards=3,
        files=index(lambda m: m.update({"lm_head.weight": "model.bin"}))),
    Bad("index-number", "which is no .safetensors file", INDEX, "lm_head.weight", shards=3,
        files=index(lambda m: m.update({"lm_head.weight": 3}))),
    Bad("two-shards", "is also in extra.safetensors; keep one of the two", SHARDS[2], shards=3,
        files=duplicate_shard),
]

CONFIGS = [
    Bad("version", "version 2 is not 1", "config.json", config=declare(version=2)),
    Bad("no-version", "version None is not 1", "config.json", config=declare(version=None)),
    Bad("format", "format 'zip' is not one of packed, dense, training", "config.json",
        config=declare(format="zip")),
    Bad("sparsity", "sparsity '4:8' cannot be served", "config.json",
        config=declare(sparsity="4:8")),
    Bad("method", "quant_method 'gptq' is not read", "config.json",
        config=declare(quant_method="gptq")),
    Bad("no-method", "quant_method None is not read", "config.json",
        config=lambda c: c["quantization_config"].pop("quant_method")),
    Bad("not-an-object", "quantization_config is not a JSON object", "config.json",
        config=lambda c: c.update(quantization_config="cast")),
    Bad("ignore-type", "is not a list of module names", "config.json",
        config=declare(ignore="lm_head")),
    Bad("ignore-pattern", "which is no regular expression", "config.json",
        config=declare(ignore=["re:("])),
    Bad("ct-no-sparsity", "without a sparsity_config is not 2:4", "config.json",
        stored="ct-bitmask", config=declare(sparsity_config=None)),
    Bad("ct-unstructured", "sparsity_structure 'unstructured' cannot be served", "config.json",
        stored="ct-bitmask", config=sparsity(sparsity_structure="unstructured")),
    Bad("ct-format", "format 'marlin-24' is not one of", "config.json", stored="ct-bitmask",
        config=sparsity(format="marlin-24")),
    Bad("ct-int8", "config_groups.group_0.weights: 8-bit int", "config.json", stored="ct-bitmask",
        config=declare(config_groups=INT8_GROUP)),
    Bad("ct-fp8-cache", "quantized as well (kv_cache_scheme)", "config.json", stored="ct-dense",
        config=declare(kv_cache_scheme=FP8_KV)),
]

LAYOUT = [
    Bad("no-bias", "is missing, though other blocks have it", tensor=f"{Q0}.bias",
        tensors=drop(f"{Q0}.bias")),
    Bad("no-norm", "is missing, though other blocks have it",
        tensor="model.layers.1.input_layernorm.weight",
        tensors=drop("model.layers.1.input_layernorm.weight")),
    Bad("no-embedding", "is missing; the checkpoint is incomplete", tensor="embed_tokens.weight",
        tensors=drop("model.embed_tokens.weight")),
    Bad("no-final-norm", "is missing; the checkpoint is incomplete", tensor="norm.weight",
        tensors=drop("model.norm.weight")),
    Bad("no-head", "is missing; the checkpoint is incomplete", tensor="lm_head.weight",
        tensors=drop("lm_head.weight"), config=lambda c: c.update(tie_word_embeddings=False)),
    Bad("one-block-differs", "in other blocks it is [",
        tensor="input_layernorm.weight",
        tensors=put("model.layers.0.input_layernorm.weight", torch.ones(16))),
    Bad("no-linear", "is missing, though other blocks have it", tensor=UP0,
        tensors=drop(f"{UP0}.compressed", f"{UP0}.bitmask", f"{UP0}.shape")),
    Bad("no-block", "is missing, though other blocks have it", tensor="model.layers.2.",
        config=lambda c: c.update(num_hidden_layers=3)),
    Bad("no-linear-sharded", "is missing, though other blocks have it", INDEX, tensor=UP0, shards=3,
        tensors=drop(f"{UP0}.compressed", f"{UP0}.bitmask", f"{UP0}.shape")),
    Bad("no-bitmask", f"has no {Q0}.bitmask beside it", tensor=f"{Q0}.compressed",
        tensors=drop(f"{Q0}.bitmask")),
    Bad("no-bitmask-ct", f"has no {Q0}.bitmask beside it", tensor=f"{Q0}.compressed",
        stored="ct-bitmask", tensors=drop(f"{Q0}.bitmask")),
    Bad("no-shape", f"has no {Q0}.shape beside it", tensor=f"{Q0}.compressed",
        tensors=drop(f"{Q0}.shape")),
    Bad("no-values", f"has no {UP0}.compressed", tensor=f"{UP0}.bitmask",
        tensors=drop(f"{UP0}.compressed", f"{UP0}.shape")),
    Bad("shape-alone", f"has no {Q0}.compressed", tensor=f"{Q0}.shape",
        tensors=drop(f"{Q0}.compressed", f"{Q0}.bitmask")),
    Bad("linear-gone", f"has neither {Q0}.weight nor {Q0}.compressed", tensor=f"{Q0}.bias",
        tensors=drop(f"{Q0}.compressed", f"{Q0}.bitmask", f"{Q0}.shape")),
    Bad("both", "is stored dense and as", tensor=f"{Q0}.weight",
        tensors=put(f"{Q0}.weight", torch.zeros(32, 32))),
    Bad("bitmask-dtype", "dtype int8 is not uint8", tensor=f"{Q0}.bitmask",
        tensors=put(f"{Q0}.bitmask", torch.zeros(32, 4, dtype=torch.int8))),
    Bad("bitmask-shape", "expected [32, 4]", tensor=f"{Q0}.bitmask",
        tensors=put(f"{Q0}.bitmask", torch.zeros(32, 8, dtype=torch.uint8))),
    Bad("values-dtype", "dtype int8 of a 2:4 linear is not one of bfloat16",
        tensor=f"{Q0}.compressed",
        tensors=put(f"{Q0}.compressed", torch.zeros(32, 16, dtype=torch.int8))),
    Bad("values-rank", "shape [512] is not [N, K/2]", tensor=f"{Q0}.compressed",
        tensors=put(f"{Q0}.compressed", torch.zeros(512))),
    Bad("values-K", f"K=36 {NOT_24}", tensor=f"{Q0}.compressed",
        tensors=put(f"{Q0}.compressed", torch.zeros(32, 18))),
    Bad("values-shape", "does not fit", tensor=f"{Q0}.bitmask",
        tensors=put(f"{Q0}.compressed", torch.zeros(16, 16))),
    Bad("shape-dtype", "dtype int32 is not int64", tensor=f"{Q0}.shape",
        tensors=put(f"{Q0}.shape", torch.tensor([32, 32], dtype=torch.int32))),
    Bad("shape-shape", "expected [2] or [2, 1]", tensor=f"{Q0}.shape",
        tensors=put(f"{Q0}.shape", torch.tensor([32, 32, 1]))),
    Bad("dense-not-ignored", "is stored dense, but config.json does not ignore it",
        tensor="model.layers.0.mlp.extra.weight",
        tensors=put("model.layers.0.mlp.extra.weight", torch.zeros(8, 8))),
    Bad("packed-but-ignored", f"config.json leaves {Q0} dense (in ignore)",
        tensor=f"{Q0}.compressed", config=declare(ignore=[Q0])),
    Bad("packed-undeclared", "is packed, but config.json says plain",
        tensor="model.layers.0.mlp.down_proj.compressed",
        config=lambda c: c.pop("quantization_config")),
    Bad("dense-K", f"K=12 {NOT_24}", tensor=f"{Q0}.weight", stored="dense",
        tensors=put(f"{Q0}.weight", torch.zeros(32, 12))),
    Bad("dense-dtype", "dtype float8_e4m3fn of a 2:4 linear", tensor=f"{Q0}.weight", stored="dense",
        tensors=put(f"{Q0}.weight", torch.zeros(32, 32).to(torch.float8_e4m3fn))),
    Bad("ct-dense-K", f"K=12 {NOT_24}", tensor=f"{Q0}.weight", stored="ct-dense",
        tensors=put(f"{Q0}.weight", torch.zeros(32, 12))),
    Bad("scale-undeclared", "belongs to a training checkpoint", tensor=f"{Q0}.cast_scale",
        stored="dense", tensors=put(f"{Q0}.cast_scale", torch.ones(32, 2))),
    Bad("scale-shape", "n a divisor of K=32", tensor=f"{Q0}.cast_scale", stored="training",
        tensors=put(f"{Q0}.cast_scale", torch.ones(32, 3))),
    Bad("scale-rows", "is not [N, n] with N=32", tensor=f"{Q0}.cast_scale", stored="training",
        tensors=put(f"{Q0}.cast_scale", torch.ones(16, 2))),
    Bad("scale-dtype", "is not a floating dtype", tensor=f"{Q0}.cast_scale", stored="training",
        tensors=put(f"{Q0}.cast_scale", torch.ones(32, 2, dtype=torch.int32))),
    Bad("scale-alone", f"has no {Q0}.weight", tensor=f"{Q0}.cast_scale", stored="training",
        tensors=drop(f"{Q0}.weight")),
    Bad("scale-missing", f"has no {Q0}.cast_scale, though other linears have",
        tensor=f"{Q0}.weight", stored="training", tensors=drop(f"{Q0}.cast_scale")),
    Bad("scale-ignored", "is on a linear that stays dense: in ignore", tensor=f"{Q0}.cast_scale",
        stored="training", config=declare(ignore=[Q0])),
]

DATA = [
    Bad("three-of-four", "the first at row 5, columns 8-11: [1, 1, 1, 0]", tensor=f"{Q0}.weight",
        stored="dense",
        tensors=set_at(f"{Q0}.weight", (5, slice(8, 12)), torch.tensor([1.0, 1.0, 1.0, 0.0]))),
    Bad("three-of-four-ct", "the first at row 5, columns 8-11: [1, 1, 1, 0]", tensor=f"{Q0}.weight",
        stored="ct-dense",
        tensors=set_at(f"{Q0}.weight", (5, slice(8, 12)), torch.tensor([1.0, 1.0, 1.0, 0.0]))),
    Bad("three-bits", "the first at row 3, columns 16-19: [1, 1, 1, 0]", tensor=f"{Q0}.bitmask",
        tensors=set_at(f"{Q0}.bitmask", (3, 2), 0b0011_0111)),
    Bad("one-bit", "the first at row 3, columns 20-23: [0, 0, 0, 1]", tensor=f"{Q0}.bitmask",
        stored="ct-bitmask", tensors=set_at(f"{Q0}.bitmask", (3, 2), 0b1000_0011)),
    Bad("shape-values", "says [32, 64], but the values make [32, 32]", tensor=f"{Q0}.shape",
        tensors=put(f"{Q0}.shape", torch.tensor([[32], [64]]))),
    Bad("nan-dense", "nan at row 7, column 30; weights must be finite", tensor=f"{Q0}.weight",
        stored="dense", tensors=set_at(f"{Q0}.weight", (7, 30), float("nan"))),
    Bad("inf-plain", "-inf at row 7, column 30", tensor=f"{Q0}.weight", stored="plain",
        tensors=set_at(f"{Q0}.weight", (7, 30), float("-inf"))),
    Bad("nan-training", "nan at row 7, column 30", tensor=f"{Q0}.weight", stored="training",
        tensors=set_at(f"{Q0}.weight", (7, 30), float("nan"))),
    Bad("nan-scale", "nan at row 7, column 1", tensor=f"{Q0}.cast_scale", stored="training",
        tensors=set_at(f"{Q0}.cast_scale", (7, 1), float("nan"))),
    Bad("scale-overflow", "overflows float32 with its scale folded in", tensor=f"{Q0}.weight",
        stored="training",
        tensors=lambda t: (t[f"{Q0}.cast_scale"].fill_(1e38), t[f"{Q0}.weight"].mul_(100.0))),
    Bad("nan-norm", "nan at index 3", tensor="model.norm.weight",
        tensors=set_at("model.norm.weight", 3, float("nan"))),
    Bad("inf-embedding", "inf at row 2, column 1", tensor="model.embed_tokens.weight",
        stored="ct-bitmask", tensors=set_at("model.embed_tokens.weight", (2, 1), float("inf"))),
    Bad("nan-bias", "nan at index 0", tensor=f"{Q0}.bias", stored="dense",
        tensors=set_at(f"{Q0}.bias", 0, float("nan"))),
    Bad("nan-head", "nan at row 39, column 31", tensor="lm_head.weight", stored="plain",
        tensors=set_at("lm_head.weight", (39, 31), float("nan"))),
]

# fmt: on
CASES = [*FILES, *CONFIGS, *LAYOUT, *DATA]


def save(make: Callable[[str], Any], bad: Bad) -> Path:
    folder = make(bad.stored)
    folder.config = json.loads(json.dumps(folder.config))
    if bad.tensors:
        bad.tensors(folder.tensors)
    if bad.config:
        bad.config(folder.config)
    folder.save(shards=bad.shards)
    if bad.files:
        bad.files(folder.path)
    return folder.path


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in CASES])
def test_bad_checkpoint(make: Callable[[str], Any], bad: Bad) -> None:
    path = save(make, bad)
    with pytest.raises(CheckpointError) as raised:
        list(stream(Checkpoint.open(path)))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    for text in (str(raised.value), line):
        assert "\n" not in text
        assert str(path / bad.file) in text
        assert bad.tensor in text
        assert bad.says in text
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.id) for bad in (*CONFIGS, *LAYOUT)])
def test_inspect_bad_checkpoint(make: Callable[[str], Any], bad: Bad) -> None:
    """What headers can tell, `inspect` tells without reading any weights."""
    path = save(make, bad)
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 1 and bad.says in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def test_bad_values_names_dense_column(make: Callable[[str], Any]) -> None:
    folder = make("packed")
    folder.tensors[f"{Q0}.compressed"][6, 9] = float("nan")
    column = folder.expected[Q0].shape[1]
    mask = folder.tensors[f"{Q0}.bitmask"][6].tolist()
    kept = [c for c in range(column) if mask[c // 8] >> c % 8 & 1]
    folder.save()
    with pytest.raises(CheckpointError, match=f"nan at row 6, column {kept[9]};"):
        list(stream(Checkpoint.open(folder.path)))


def test_no_such_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.stderr == f"cast-model: {tmp_path / 'none'}: no such folder\n"


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"")
    result = CliRunner().invoke(app, ["check", str(tmp_path / SINGLE)])
    assert result.exit_code == 1
    assert "is a file; give the folder that holds config.json" in result.stderr


def test_name_with_line_break_is_one_line() -> None:
    error = CheckpointError(Path("model.safetensors"), "is bad", "a\nb")
    assert str(error) == "model.safetensors: a b: is bad"
