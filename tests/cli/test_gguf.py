"""`cast-model import` on a GGUF file that the gguf package writes."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from cast_serve.cli.model import app

gguf = pytest.importorskip("gguf", reason="gguf is of the extra `train`")

HIDDEN, FFN, LAYERS, HEADS = 32, 64, 2, 4
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]


def write_gguf(file: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A Llama with Q8_0 linears; returns the values that they hold once dequantized."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(rank) for rank in range(len(PIECES))])
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * 4
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    held: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        quantized = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, quantized, raw_dtype=kind)
        held[name] = gguf.quants.dequantize(quantized, kind)

    add("token_embd.weight", len(PIECES), HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("output.weight", len(PIECES), HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", FFN, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def cast_model(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.mark.parametrize("by_folder", [False, True], ids=["file", "folder"])
def test_import(tmp_path: Path, by_folder: bool) -> None:
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "tiny.Q8_0.gguf"
    held = write_gguf(file)
    source = file.parent if by_folder else file
    result = cast_model("import", source, "-o", tmp_path / "hf", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "dequantized to float32" in result.stdout

    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for here, there in [("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")]:
        expected = torch.from_numpy(held[f"blk.1.{there}.weight"])
        assert torch.equal(tensors[f"model.layers.1.{here}.weight"], expected)

    # The same logits as transformers has from the GGUF itself: q and k are permuted in it.
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(direct(tokens).logits, imported(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("a b").input_ids, skip_special_tokens=True).strip() == "a b"


def test_import_then_prune_and_pack(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    for command, source, output in [
        ("import", "tiny.gguf", "hf"),
        ("prune", "hf", "pruned"),
        ("pack", "pruned", "packed"),
    ]:
        result = cast_model(command, tmp_path / source, "-o", tmp_path / output)
        assert result.exit_code == 0, result.output
    assert "14 sparse linears in order" in cast_model("check", tmp_path / "packed").stdout
    assert (tmp_path / "packed" / "tokenizer.json").is_file()


def refused(source: Path, output: Path) -> str:
    result = cast_model("import", source, "-o", output)
    assert result.exit_code == 1 and not output.exists()
    (line,) = result.stderr.splitlines()
    assert str(source) in line
    return line


def test_import_refuses_other_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    assert "is not a GGUF file" in refused(tmp_path / "model.gguf", tmp_path / "out")


def test_import_refuses_missing_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.gguf", tmp_path / "out")


def test_import_refuses_two_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "in" / name).write_bytes(b"GGUF")
    assert "holds 2 .gguf files; name one" in refused(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("length", [5, 20, 100, 5000, -5000])
def test_import_refuses_truncated(tmp_path: Path, length: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:length])
    says = "is cut off or damaged" if length > 0 else "transformers cannot read it"
    assert says in refused(file, tmp_path / "out")


@pytest.mark.parametrize("place", [8, 16, 30, 2000])
def test_import_refuses_damaged_lengths(tmp_path: Path, place: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
    assert re.search("is cut off|cannot read it", refused(file, tmp_path / "out"))


def test_import_refuses_unknown_architecture(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "rwkv6")
    assert "transformers cannot read it" in refused(file, tmp_path / "out")


def test_import_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'cast-serve[train]'" in refused(file, tmp_path / "out")
