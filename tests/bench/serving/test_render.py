import io
from pathlib import Path

import pytest
from rich.console import Console

from cast_serve.bench.paths import RESULTS, ROOT
from cast_serve.bench.serving import breakdown, offline_results
from cast_serve.bench.serving.render import (
    BEGIN,
    END,
    NOTHING,
    headline_table,
    markdown,
    render,
    update_readme,
)
from cast_serve.bench.serving.report import print_rows
from cast_serve.bench.serving.results import Results


def test_render(result_file: Path) -> None:
    text, plot = render(result_file)
    assert text.name == "serve-h200.md" and "(serve-h200.png)" in text.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_render_without_anything_to_plot(tmp_path: Path, env, row) -> None:
    path = tmp_path / "serve-h200.json"
    Results().merge(env(), [row(workload="prefill-2048")]).save(path)
    (text,) = render(path)
    assert ".png" not in text.read_text()


def test_render_with_what_was_measured_without_a_server(result_file: Path, env) -> None:
    row = offline_results.Row(
        engine="dense-bf16",
        model="Llama-3.1-8B",
        requests=64,
        input_len=512,
        output_len=128,
        iterations=5,
        seconds=1.25,
        spread_s=0.01,
        output_tokens_per_s=6553.6,
        weights_gib=15.0,
        kv_tokens=900000,
        flags="",
        run=env()["run"],
    )
    offline_results.load_or_empty(result_file.with_name("latency-h200.json")).merge(
        env(), [row]
    ).save(result_file.with_name("latency-h200.json"))
    found = render(result_file)[0].read_text()
    assert "## Without a server: `cast-bench latency`" in found
    assert "| 64 | 512 | 128 | dense-bf16 | 1.250 ± 0.010 | 6554 | 15.00 | 900,000 |" in found
    assert "cast-bench throughput" not in found


def test_markdown(results: Results, row, env) -> None:
    eager = row("sparse-bf16", "c1", flags=("--enforce-eager",))
    lines = markdown(results.merge(env(), [eager]), "plot.png").splitlines()
    assert "| tpot of c1 | 1.400 | 1.333 | ✗ |" in lines
    assert "| tpot of c64 | 1.250 | 1.333 |  |" in lines
    cells = "| c1 | sparse-bf16 | 15.0 (1.33) | 30.0 | 3.75 (1.33 ✗) | 4.50 |"
    assert f"{cells} 1333 (1.33) | 9.34 (1.60 ✗) | 480,000 |" in lines
    assert lines.index("## Llama-3.1-8B") < lines.index("## Llama-3.1-8B, `--enforce-eager`")
    engines = [line.split(" | ")[1] for line in lines if line.startswith("| c16 |")]
    assert engines == ["dense-bf16", "dense-fp8", "sparse-bf16"]


def test_markdown_breakdown(results: Results, result_file: Path, env) -> None:
    """From the file beside it."""
    assert "## Milliseconds of a step" not in markdown(results, None)
    profiled = breakdown.Row(
        engine="sparse-bf16",
        model="Llama-3.1-8B",
        workload="c1",
        steps=254,
        step_ms=3.5,
        parts_ms={"2:4 linear": 2.0, "GPU idle": 1.5},
        flags="",
        run=env()["run"],
    )
    path = result_file.with_name("breakdown-h200.json")
    breakdown.load_or_empty(path).merge(env(), [profiled]).save(path)
    text, _ = render(result_file)
    lines = text.read_text().splitlines()
    assert "| model | workload | engine | 2:4 linear | GPU idle | step | steps |" in lines
    assert "| Llama-3.1-8B | c1 | sparse-bf16 | 2.000 | 1.500 | 3.500 | 254 |" in lines
    assert f"Runs: {env()['run']}: driver " in text.read_text()


def test_headline_table(result_file: Path) -> None:
    header, _, dense, fp8, sparse = headline_table([result_file])
    assert header.startswith("| GPU | engine | TPOT ms, 1 request | 16 | 64 |")
    gpu = "[NVIDIA H200](bench/results/serve-h200.md)"
    assert dense == (
        f"| {gpu} | dense-bf16 | 5.00 | 5.00 | 5.00 | 20.00 | 1000 | 14.99 | 440,000 |"
    )
    assert fp8.startswith(f"| {gpu} | dense-fp8 | 3.00 (1.67x) |")
    assert sparse.startswith(f"| {gpu} | sparse-bf16 | 3.75 (1.33x ✗) | 3.75 (1.33x ✗) |")


def test_headline_leaves_other_models_out(tmp_path: Path, env, row) -> None:
    path = tmp_path / "serve-h200.json"
    Results().merge(env(), [row(model="tiny")]).save(path)
    assert headline_table([path]) == [NOTHING]


def test_update_readme(result_file: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_readme(readme, [result_file])
    written = readme.read_text()
    assert "old" not in written and "| sparse-bf16 |" in written
    assert written.startswith(f"before\n{BEGIN}\n") and written.endswith(f"{END}\nafter\n")
    readme.write_text("before\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        update_readme(readme, [result_file])


def test_readme_is_up_to_date(tmp_path: Path) -> None:
    """It holds what the results in the checkout say."""
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    update_readme(copy, sorted(RESULTS.glob("serve-*.json")))
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_print_rows(results: Results) -> None:
    console = Console(file=io.StringIO(), width=160)
    print_rows(results.rows, "NVIDIA H200", console)
    printed = console.file.getvalue()
    assert "MISS  tpot of c1: 1.333 < 1.400" in printed
    assert "pass  output_tokens_per_s of c128: 1.333 >= 1.200" in printed
    assert printed.count("dense-fp8") == 8
