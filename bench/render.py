"""Result files to Markdown and PNG, and the tables of README.md and kernels/README.md. No GPU.

python -m bench.render                       the result files of bench/results
python -m bench.render FILE.json ...         these

What serve-*.json becomes is in bench/serving/render.py, train-*.json in bench/training_render.py,
*-sweep.json in bench/sweep_render.py.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from cast_serve.bench import recovery, sweep_render, training_render
from cast_serve.bench.linear_results import Results, Row, load, totals
from cast_serve.bench.markdown import replace_between, table
from cast_serve.bench.paths import RESULTS, ROOT
from cast_serve.bench.serving import render as serving
from cast_serve.bench.shapes import FLOORS, MODELS, TOKENS

README = ROOT / "README.md"
KERNELS_README = ROOT / "kernels" / "README.md"
PRACTICE = ROOT / "docs" / "cast-in-practice.md"
RECOVERY = RESULTS / f"{recovery.NAME}.json"
HEADLINE = "Llama-3.1-8B"

BEGIN = "<!-- results: written by `python -m bench.render` -->"
END = "<!-- end of results -->"
NOTHING = "No results yet: `make bench` on a GPU writes them."

# Limits of 2:4 in 16 bits: 64 bits stored as 36, and half of the products.
BYTES_LIMIT, FLOPS_LIMIT = 64 / 36, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.render",
        description="Render result files to Markdown and PNG, and update both READMEs.",
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: those of bench/results")
    linear, served, trained = (
        sorted(RESULTS.glob(f"{name}-*.json")) for name in ("linear", "serve", "train")
    )
    swept = sorted(RESULTS.glob("*-sweep.json"))
    files = parser.parse_args().files or [*linear, *served, *trained, *swept]
    if not files:
        parser.error(f"no result file in {RESULTS}; `make bench` on a GPU writes one")
    for file in files:
        print(*_renderer(file)(file), sep="\n")
    update_readme(README, headline_table(linear))
    serving.update_readme(README, served)
    training_render.update_readme(README, trained)
    update_readme(KERNELS_README, kernel_table(linear))
    for file in swept:
        sweep_render.update_page(PRACTICE, file)
    if RECOVERY.exists():
        recovery.update_page(PRACTICE, RECOVERY)
        recovery.update_readme(README, RECOVERY)
    print(README, KERNELS_README, PRACTICE, sep="\n")


def _renderer(file: Path) -> Callable[[Path], list[Path]]:
    if file.name.startswith("serve-"):
        return serving.render
    if file.name.endswith("-sweep.json"):
        return sweep_render.render
    return training_render.render if file.name.startswith("train-") else render


def render(file: Path) -> list[Path]:
    """Write FILE.md and FILE.png beside FILE.json; returns them."""
    results = load(file)
    text, plot = file.with_suffix(".md"), file.with_suffix(".png")
    text.write_text(markdown(results, plot.name))
    write_plot(results, plot)
    return [text, plot]


def markdown(results: Results, plot: str) -> str:
    """The report of a result file: environment, sums a model, every layer, other kernels."""
    env = results.env
    lines = [
        f"# 2:4 linear layers on {env['gpu']}",
        "",
        f"Dense is cuBLAS through `torch.nn.functional.linear` on the same weights, in the same "
        f"run; a cell is dense time / sparse time. The roof is the copy bandwidth of the run or "
        f"twice cuBLAS's measured peak. Written by `python -m bench.render`; `make bench` "
        f"measures again. Limits: {BYTES_LIMIT:.2f} where bytes bind, {FLOPS_LIMIT:.2f} where "
        f"arithmetic does.",
        "",
        f"![speed-up and share of the roof over M]({plot})",
        "",
        "## Runs",
        "",
        *table(
            ["run", "driver", "CUDA", "torch", "triton", "cuSPARSELt", "copy GB/s", "dense TFLOPS"],
            [
                [
                    name,
                    run["driver"],
                    run["cuda"],
                    run["torch"],
                    run["triton"],
                    run["cusparselt"],
                    f"{run['copy_gbps']:.0f}",
                    f"{run['dense_tflops']:.0f}",
                ]
                for name, run in results.runs.items()
            ],
        ),
    ]
    for dtype in sorted({row.dtype for row in results.rows}):
        lines += ["", f"## Sum over qkv, o, gate_up and down, {dtype}", ""]
        lines += _sums(results, dtype)
        lines += ["", f"## Layers, {dtype}", ""]
        lines += _layers(results, dtype)
    others = [row for row in results.rows if not row.selected]
    if others:
        lines += ["", "## Kernels that were forced", ""]
        lines += table(
            ["model", "layer", "M", "dtype", "kernel", "config", "us", "x dense"],
            [
                [
                    row.model,
                    row.layer,
                    str(row.M),
                    row.dtype,
                    row.kernel,
                    f"`{row.config}`",
                    f"{row.sparse_us:.1f}",
                    f"{row.speedup:.2f}",
                ]
                for row in sorted(others, key=lambda row: (row.model, row.layer, row.dtype, row.M))
            ],
        )
    return "\n".join(lines) + "\n"


def _sums(results: Results, dtype: str) -> list[str]:
    rows = [["*floor*", *(f"*{FLOORS[M]:.2f}*" for M in TOKENS)]]
    for model in MODELS:
        by_tokens = {total.M: total for total in totals(results.selected(model.name, dtype))}
        if not by_tokens:
            continue
        cells = []
        for M in TOKENS:
            total, floor = by_tokens.get(M), model.floor(M)
            if total is None:
                cells.append("")
                continue
            missed = floor is not None and total.speedup < floor
            cells.append(f"{total.speedup:.2f}{' ✗' if missed else ''}")
        rows.append([model.name, *cells])
    note = "✗: below the floor of that M; SmolLM2's layers take microseconds, its floor is 1."
    return [*table(["tokens M", *(str(M) for M in TOKENS)], rows), "", note]


def _layers(results: Results, dtype: str) -> list[str]:
    rows = []
    for model in MODELS:
        order = [layer.name for layer in model.layers]
        chosen = results.selected(model.name, dtype)
        for row in sorted(chosen, key=lambda row: (order.index(row.layer), row.M)):
            rows.append(
                [
                    row.model,
                    f"{row.layer} {row.N}x{row.K}",
                    str(row.M),
                    f"{row.dense_us:.1f} ± {row.dense_iqr_us:.1f}",
                    f"{row.sparse_us:.1f} ± {row.sparse_iqr_us:.1f}",
                    f"{row.speedup:.2f}",
                    row.kernel,
                    f"{row.gbps:.0f} ({row.copy_share:.0%})",
                    f"{row.tflops:.0f}",
                    f"{row.roof_share:.0%}",
                    f"{row.resident:.4f}",
                ]
            )
    return table(
        [
            "model",
            "layer NxK",
            "M",
            "dense us ± IQR",
            "sparse us ± IQR",
            "x dense",
            "kernel",
            "GB/s (of copy)",
            "TFLOPS",
            "of roof",
            "resident",
        ],
        rows,
    )


def write_plot(results: Results, path: Path) -> None:
    """Two panels over M: dense / sparse of each model's sum, and its share of the roof."""
    # An optional package (the extra `train`), and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    speed, share = figure.subplots(1, 2)
    for index, model in enumerate(MODELS):
        for dtype, style in (("bfloat16", "o-"), ("float16", "s--")):
            line = totals(results.selected(model.name, dtype))
            if not line:
                continue
            label = model.name if dtype == "bfloat16" else f"{model.name}, {dtype}"
            tokens = [total.M for total in line]
            for axes, shown in (
                (speed, [total.speedup for total in line]),
                (share, [100 * total.roof_share for total in line]),
            ):
                axes.plot(tokens, shown, style, color=f"C{index}", ms=3, label=label)
    speed.plot(list(FLOORS), list(FLOORS.values()), "k_", ms=14, mew=2, label="floor")
    speed.axhline(BYTES_LIMIT, color="gray", lw=0.8)
    speed.axhline(FLOPS_LIMIT, color="gray", lw=0.8)
    speed.axhline(1, color="black", lw=0.8)
    speed.text(1, BYTES_LIMIT + 0.01, "1.78: bytes", color="gray", va="bottom")
    speed.text(1, FLOPS_LIMIT + 0.01, "2.0: arithmetic", color="gray", va="bottom")
    share.axhline(100, color="gray", lw=0.8)
    speed.set(ylabel="dense time / sparse time", title=f"Speed-up, {results.env['gpu']}")
    share.set(ylabel="% of the roof", title="Roof: copy bandwidth, or twice cuBLAS's peak")
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(TOKENS, [str(M) for M in TOKENS], rotation=45)
        axes.set_xlabel("tokens M")
        axes.grid(alpha=0.3)
    speed.set_ylim(0, 2.25)
    share.set_ylim(0, 110)
    # Below the panels: inside, it would cover a curve.
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def update_readme(readme: Path, lines: list[str]) -> None:
    """Put the lines of a table between the markers of `readme`.

    Raises:
        ValueError: the markers are not there.
    """
    replace_between(readme, BEGIN, END, lines)


def headline_table(files: Iterable[Path]) -> list[str]:
    """Speed-up of the linears of `HEADLINE` together, one row a GPU and dtype."""
    rows = []
    for file in files:
        results = load(file)
        for dtype in sorted({row.dtype for row in results.rows}):
            sums = {total.M: total for total in totals(results.selected(HEADLINE, dtype))}
            if sums:
                cells = (f"{sums[M].speedup:.2f}" if M in sums else "" for M in TOKENS)
                name = f"[{results.env['gpu']}](bench/results/{file.stem}.md), {dtype}"
                rows.append([name, *cells])
    return table(["tokens M", *map(str, TOKENS)], rows) if rows else [NOTHING]


def kernel_table(files: Iterable[Path]) -> list[str]:
    """One row a kernel x GPU x range of M in which selection chose it for some layer."""
    rows = []
    for file in files:
        results = load(file)
        chosen = [row for row in results.rows if row.selected]
        for kernel in sorted({row.kernel for row in chosen}):
            for low, high in _ranges(chosen, kernel):
                group = [row for row in chosen if row.kernel == kernel and low <= row.M <= high]
                points = sum(low <= row.M <= high for row in chosen)
                speedups = sorted(row.speedup for row in group)
                rows.append(
                    [
                        kernel,
                        results.env["gpu"],
                        str(low) if low == high else f"{low}-{high}",
                        f"{len(group)} of {points}",
                        f"{speedups[0]:.2f} / {speedups[len(speedups) // 2]:.2f} / "
                        f"{speedups[-1]:.2f}",
                        f"[{file.stem}](../bench/results/{file.stem}.md)",
                    ]
                )
    header = ["kernel", "GPU", "M", "layers x M", "x dense: least / median / most", "result"]
    return table(header, rows) if rows else [NOTHING]


def _ranges(rows: list[Row], kernel: str) -> list[tuple[int, int]]:
    """The runs of neighbouring measured M at which `kernel` was chosen at least once."""
    used = {row.M for row in rows if row.kernel == kernel}
    ranges: list[tuple[int, int]] = []
    running = False
    for M in sorted({row.M for row in rows}):
        if M in used:
            ranges.append((ranges.pop()[0], M) if running else (M, M))
        running = M in used
    return ranges


if __name__ == "__main__":
    main()
