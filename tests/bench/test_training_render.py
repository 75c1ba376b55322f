"""train-GPU.json and optim-GPU.json to Markdown: what stands in the tables is what was measured."""

from pathlib import Path

import pytest

from cast_serve.bench import bench_optim, bench_train
from cast_serve.bench.paths import RESULTS, ROOT
from cast_serve.bench.result_file import ResultFile
from cast_serve.bench.training_render import BEGIN, END, NOTHING, headline, render, update_readme

ENV = {
    "run": "2026-01-01T00:00:00Z abc",
    "gpu": "NVIDIA H200",
    **dict.fromkeys(("driver", "cuda", "torch", "triton", "cpu"), "1"),
}


def step(method: str, step_ms: float, peak_gib: float | None) -> bench_train.Row:
    return bench_train.Row(
        model="SmolLM2-135M",
        method=method,
        batch_size=16,
        context=1024,
        step_ms=step_ms,
        gradient_ms=40.0,
        teacher_ms=10.0 if method == "cast" else 0.0,
        clip_ms=1.0,
        optimizer_ms=2.0,
        tokens_per_s=16 * 1024 / step_ms * 1e3,
        mfu=0.25,
        peak_gib=peak_gib,
        estimated_gib=12.0,
        kernels={"a_kernel": 3.0, "all others": 4.0},
        run=ENV["run"],
    )


def update(optimizer: str, mean_us: float) -> bench_optim.Row:
    return bench_optim.Row(
        model="SmolLM2-135M",
        optimizer=optimizer,
        parameters=1,
        tensors=1,
        step_us=900.0,
        step_iqr_us=1.0,
        refresh_us=1900.0,
        refresh_iqr_us=1.0,
        mean_us=mean_us,
        adamw_us=1250.0,
        gbps=3000.0,
        copy_gbps=4000.0,
        run=ENV["run"],
    )


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    folder = tmp_path / "bench" / "results"
    rows = [step("plain", 50.0, 10.0), step("cast", 64.0, None)]
    ResultFile[bench_train.Row]().merge(ENV, rows).save(folder / "train-h200.json")
    optimizers = [update("AdamW fused", 1250.0), update("AdamS triton", 1000.0)]
    ResultFile[bench_optim.Row]().merge(ENV, optimizers).save(folder / "optim-h200.json")
    return folder / "train-h200.json"


def test_report(train_file):
    (text,) = render(train_file)
    lines = text.read_text().splitlines()
    assert lines[0] == "# Training on NVIDIA H200"
    plain, cast = (line for line in lines if line.startswith("| SmolLM2-135M | 16 x 1024 |"))
    assert plain.startswith("| SmolLM2-135M | 16 x 1024 | plain | 50.0 | 1.000 | 40.0 |  | 1.0 |")
    assert plain.endswith("| 25.0% | 10.0 | 12.0 |")
    assert "| cast | 64.0 | 1.280 | 40.0 | 10.0 |" in cast and cast.endswith("|  | 12.0 |")
    assert "| SmolLM2-135M | AdamS triton | 900 | 1900 | 1000 | 0.800 | 3000 | 75% |" in lines
    assert "| `a_kernel` | 3.00 |" in lines


def test_headline(train_file):
    *_, line = headline([train_file])
    link = "[NVIDIA H200](bench/results/train-h200.md)"
    assert line == f"| {link} | SmolLM2-135M | 256,000 | 25% | 1.28 | 0.80 |"


def test_without_the_optimizers(train_file):
    train_file.with_name("optim-h200.json").unlink()
    *_, line = headline([train_file])
    assert line.endswith("| 1.28 |  |")
    assert "## Optimizers" not in render(train_file)[0].read_text()


def test_readme(tmp_path, train_file):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter")
    update_readme(readme, [])
    assert NOTHING in readme.read_text()
    update_readme(readme, [train_file])
    assert NOTHING not in readme.read_text() and "256,000" in readme.read_text()


def test_ours_is_up_to_date():
    files = sorted(RESULTS.glob("train-*.json"))
    table = "\n".join([BEGIN, *headline(files), END])
    assert table in (ROOT / "README.md").read_text()
