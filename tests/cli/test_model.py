import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from cast_serve.cli.model import app


def cast_model(*arguments: object) -> Result:
    # 100 columns, so that no module name is folded.
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(each) for each in arguments])


def succeed(*arguments: object) -> str:
    result = cast_model(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


@pytest.fixture
def pruned(dense_model: Path, tmp_path: Path) -> Path:
    succeed("prune", dense_model, "-o", tmp_path / "pruned", "--method", "magnitude")
    return tmp_path / "pruned"


def test_prune_pack_unpack(pruned: Path, tmp_path: Path) -> None:
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    said = succeed("pack", pruned, "-o", packed)
    assert said.startswith(f"{packed}: packed, 14 sparse and 1 dense linears, ")
    assert succeed("unpack", packed, "-o", unpacked).startswith(f"{unpacked}: dense, 14 sparse")
    before = load_file(pruned / "model.safetensors")
    after = load_file(unpacked / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pack_casts(pruned: Path, tmp_path: Path) -> None:
    succeed("pack", pruned, "-o", tmp_path / "out", "--dtype", "float16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.uint8, torch.int64}


def test_inspect(pruned: Path, tmp_path: Path) -> None:
    succeed("pack", pruned, "-o", tmp_path / "packed")
    shown = succeed("inspect", tmp_path / "packed")
    assert "packed, bfloat16" in shown
    assert "14 sparse, 1 dense" in shown
    row = next(line for line in shown.splitlines() if "mlp.down_proj" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "model.layers.*.mlp.down_proj",
        "32 x 64",
        "2",
        # 2 layers of 32 x 64 bf16 at 9/16, and 16 bytes of shape each.
        "4.6 kB",
        "yes",
    ]


def test_inspect_json(dense_model: Path) -> None:
    shown = json.loads(succeed("inspect", dense_model, "--json"))
    assert shown["format"] == "plain" and shown["needs_quantization_flag"] is True
    assert (shown["sparse_linears"], shown["dense_linears"]) == (14, 1)
    (head,) = [linear for linear in shown["linears"] if not linear["sparse"]]
    assert head["name"] == "lm_head" and head["why_dense"] == "outside the layers"


def test_inspect_plain_says_that_weights_decide(dense_model: Path) -> None:
    shown = succeed("inspect", dense_model)
    assert "cast-model check" in shown and "unknown" in shown


def test_check_packed(pruned: Path, tmp_path: Path) -> None:
    succeed("pack", pruned, "-o", tmp_path / "packed")
    # q, o: 32 x 32; k, v: 16 x 32; three of 32 x 64.
    groups = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) // 4
    assert succeed("check", tmp_path / "packed") == (
        f"14 sparse linears in order, {groups} groups checked (packed).\n"
    )


def test_check_plain_2of4_names_the_flag(pruned: Path) -> None:
    config = json.loads((pruned / "config.json").read_text())
    del config["quantization_config"]
    (pruned / "config.json").write_text(json.dumps(config))
    said = succeed("check", pruned)
    assert said.startswith("14 sparse linears in order")
    assert "serve it with `--quantization cast`" in said


def test_check_plain_partly_2of4(pruned: Path) -> None:
    config = json.loads((pruned / "config.json").read_text())
    del config["quantization_config"]
    (pruned / "config.json").write_text(json.dumps(config))
    file = pruned / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    said = succeed("check", pruned)
    assert "model.layers.0.mlp.up_proj" in said and "512 of 512" in said
    assert "13 sparse linears in order" in said
    assert "1 linears are not 2:4 and stay dense" in said


def test_check_dense_model(dense_model: Path) -> None:
    result = cast_model("check", dense_model)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f"{dense_model / 'model.safetensors'}: model.layers.0.mlp.down_proj.weight: not" in line
    assert "prune with `cast-model prune`" in line
    # 14 layers are at fault, 12 are shown.
    assert "and 2 more layers" in result.stdout


def test_check_shows_first_offenders_and_counts(pruned: Path) -> None:
    file = pruned / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.v_proj"
    tensors[name + ".weight"][4:8, 12:16] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    result = cast_model("check", pruned, "--limit", "2")
    assert result.exit_code == 1
    assert "row 4, column 12: 1, -2, 0.5, 0" in result.stdout
    assert "row 5, column 12" in result.stdout and "row 6" not in result.stdout
    assert "4 of 128" in result.stdout
    assert result.stderr == (
        f"cast-model: {file}: {name}.weight: 4 of 128 groups have more than two non-zeros, "
        "the first at row 4, columns 12-15: [1, -2, 0.5, 0] (and 1 more)\n"
    )


@pytest.mark.parametrize("command", ["pack", "unpack", "prune"])
def test_refuses_to_overwrite(pruned: Path, dense_model: Path, command: str) -> None:
    source = dense_model if command == "prune" else pruned
    before = (pruned / "config.json").read_bytes()
    result = cast_model(command, source, "-o", pruned)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert str(pruned) in result.stderr
    assert (pruned / "config.json").read_bytes() == before


def test_pack_dense_model(dense_model: Path, tmp_path: Path) -> None:
    result = cast_model("pack", dense_model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "none of 14 linears is 2:4, prune first" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "somewhere"],
        ["prune", "somewhere", "-o", "out", "--pattern", "1:4"],
        ["prune", "somewhere", "-o", "out", "--method", "wanda"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: list[str]) -> None:
    assert cast_model(*arguments).exit_code == 2


def test_help_is_quick_and_imports_no_torch() -> None:
    script = (
        "import sys; from cast_serve.cli.model import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_console_script_has_no_traceback(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "cast_serve.cli.model", "check", tmp_path / "none"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and not run.stdout
    assert run.stderr == f"cast-model: {tmp_path / 'none'}: no such folder\n"
