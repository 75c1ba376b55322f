"""serve-GPU.json to Markdown and PNG, and the table of README.md."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from cast_serve.bench.markdown import replace_between, table
from cast_serve.bench.serving import breakdown, loading_results, offline_results
from cast_serve.bench.serving.engines import BASELINE, ENGINES
from cast_serve.bench.serving.floors import MODEL, WEIGHTS, floor_of, judge
from cast_serve.bench.serving.report import HEADER, cells
from cast_serve.bench.serving.results import Ratios, Results, Row, baseline_of, load
from cast_serve.bench.serving.workloads import SMOKE, WORKLOADS

BEGIN = "<!-- serve results: written by `python -m bench.render` -->"
END = "<!-- end of serve results -->"
NOTHING = "No results yet: `make bench-serve` on a GPU writes them."

# The columns of README.md: workload, metric of Ratios, field of Row, title.
HEADLINES = (
    ("c1", "tpot", "tpot_ms", "TPOT ms, 1 request"),
    ("c16", "tpot", "tpot_ms", "16"),
    ("c64", "tpot", "tpot_ms", "64"),
    ("prefill-2048", "ttft", "ttft_ms", "TTFT ms, 2048 in"),
    ("c128", "output_tokens_per_s", "output_tokens_per_s", "tokens/s, 128 requests"),
    ("c1", WEIGHTS, "weights_gib", "weights GiB"),
)


def can_plot(console: Console) -> bool:
    """Whether there is matplotlib; says so if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        console.print("no matplotlib here: `python -m bench.render` elsewhere makes .md and .png")
    return found


def render(file: Path) -> list[Path]:
    """Write FILE.md beside FILE.json, and FILE.png if there is something to plot; returns them."""
    results = load(file)
    beside = _beside(file)
    text, plot = file.with_suffix(".md"), file.with_suffix(".png")
    if not _chats(results):
        text.write_text(markdown(results, None, beside))
        return [text]
    text.write_text(markdown(results, plot.name, beside))
    write_plot(results, plot)
    return [text, plot]


def markdown(results: Results, plot: str | None, beside: Sequence[str] = ()) -> str:
    """The report of a result file: floors, a table a model, what the runs ran on.

    Args:
        beside: lines about what other benchmarks measured.
    """
    gpu = results.env["gpu"]
    lines = [
        f"# Serving on {gpu}",
        "",
        "Dense vLLM and cast-serve one after the other on the same machine with the same flags, "
        "weights random, driven by `vllm.benchmarks.serve`: greedy, eos ignored, no prefix "
        "caching. cast-serve has torch.compile's kernels launched early (`triton.enable_pdl`) in "
        "runs from commit 6f29aa8 of 2026-11-22T15:20Z on, stock vLLM runs as it comes. A cell is "
        "the median of the repeats ± largest less least, in brackets how much better than dense "
        "bf16 (✗: below a floor). cN: N requests at a time, 512 tokens in and 256 out; prefill-N: "
        "N in and 1 out, one at a time; mixed: lengths as ShareGPT's, 64 at a time. Written by "
        "`python -m bench.render`; `make bench-serve` measures again.",
    ]
    if plot is not None:
        lines += ["", f"![throughput and time per token over concurrency]({plot})"]
    judged = judge(results.rows, gpu)
    if judged:
        lines += ["", f"## Floors, {MODEL}", ""]
        lines += table(
            ["2:4 bf16 over dense bf16", "floor", "measured", ""],
            [
                [
                    one.floor.name,
                    f"{one.floor.ratio:.3f}",
                    f"{one.ratio:.3f}",
                    "" if one.met else "✗",
                ]
                for one in judged
            ],
        )
    for model, flags in dict.fromkeys((row.model, row.flags) for row in results.rows):
        rows = in_order(row for row in results.rows if (row.model, row.flags) == (model, flags))
        lines += ["", f"## {model}{f', `{flags}`' if flags else ''}", ""]
        lines += table(list(HEADER), [cells(row, rows, gpu) for row in rows])
    lines += beside
    lines += ["", "## Runs", ""]
    lines += table(
        ["run", "driver", "CUDA", "torch", "vLLM", "triton", "CPU", "engines", "flags"],
        [
            [
                name,
                run["driver"],
                run["cuda"],
                run["torch"],
                run["vllm"],
                run["triton"],
                run["cpu"],
                _distinct(row.engine for row in results.rows if row.run == name),
                _distinct(row.flags for row in results.rows if row.run == name),
            ]
            for name, run in results.runs.items()
        ],
    )
    return "\n".join(lines) + "\n"


def _beside(file: Path) -> list[str]:
    """Of the result files of the same GPU beside a serve-GPU.json: a section each."""
    lines: list[str] = []
    profiled, loading = breakdown.beside(file), loading_results.beside(file)
    if profiled.exists():
        note = (
            "Medians over the steps, with the profiler running, which slows the host: GPU idle is "
            "more than without it. lm_head, dense in every engine, is apart from the linears."
        )
        lines += ["", "## Milliseconds of a step", "", note, "", *breakdown.lines(profiled)]
    if loading.exists():
        note = (
            "Real files in the page cache. load: what vLLM logs as loading; start: until the "
            "server answers, without graphs; host: largest resident set of a process, pages of "
            "the files included. In brackets what part of dense bf16's."
        )
        title = "## Loading: `cast-bench load`"
        lines += ["", title, "", note, "", *loading_results.lines(loading)]
    for benchmark, measured in offline_results.beside(file).items():
        title = f"## Without a server: `cast-bench {benchmark}`"
        lines += ["", title, "", *offline_results.lines(measured)]
    return lines


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows by workload and then engine, as those are listed."""
    workloads = [workload.name for workload in (*WORKLOADS, SMOKE)]
    engines = [engine.name for engine in ENGINES]
    return sorted(rows, key=lambda row: (workloads.index(row.workload), engines.index(row.engine)))


def update_readme(readme: Path, files: Iterable[Path]) -> None:
    """Put the table of `files` between the markers of `readme`.

    Raises:
        ValueError: the markers are not there.
    """
    replace_between(readme, BEGIN, END, headline_table(files))


def headline_table(files: Iterable[Path]) -> list[str]:
    """A row a GPU and engine: what floors are set for, with `MODEL`."""
    lines = []
    for file in files:
        results = load(file)
        gpu = results.env["gpu"]
        rows = [row for row in results.rows if row.model == MODEL and not row.flags]
        for engine in ENGINES:
            own = {row.workload: row for row in rows if row.engine == engine.name}
            if own:
                sizes = next(iter(own.values()))
                lines.append(
                    [
                        f"[{gpu}](bench/results/{file.stem}.md)",
                        engine.name,
                        *(
                            _headline(own.get(name), metric, field, rows, gpu)
                            for name, metric, field, _ in HEADLINES
                        ),
                        f"{sizes.kv_tokens:,}",
                    ]
                )
    titles = [title for *_, title in HEADLINES]
    header = ["GPU", "engine", *titles, "KV tokens"]
    return table(header, lines) if lines else [NOTHING]


def _headline(row: Row | None, metric: str, field: str, rows: list[Row], gpu: str) -> str:
    value = None if row is None else getattr(row, field)
    if row is None or value is None:
        return ""
    shown = f"{value:.0f}" if value >= 1000 else f"{value:.2f}"
    ratio = getattr(Ratios.of(row, baseline_of(row, rows)), metric)
    if ratio is None or row.engine == BASELINE:
        return shown
    floor = floor_of(row, metric, gpu)
    missed = floor is not None and ratio < floor.ratio
    return f"{shown} ({ratio:.2f}x{' ✗' if missed else ''})"


def write_plot(results: Results, path: Path) -> None:
    """Two panels over concurrency, 512 tokens in and 256 out: tokens/s, and TPOT."""
    # An optional package (the extra `train`), and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    throughput, latency = figure.subplots(1, 2)
    chats = _chats(results)
    models = list(dict.fromkeys(row.model for row in chats))
    for index, engine in enumerate(ENGINES):
        for model, style in zip(models, ("o-", "s--", "^:"), strict=False):
            line = sorted(
                (row for row in chats if (row.engine, row.model) == (engine.name, model)),
                key=lambda row: row.concurrency,
            )
            if not line:
                continue
            batch = [row.concurrency for row in line]
            for axes, shown in (
                (throughput, [row.output_tokens_per_s for row in line]),
                (latency, [row.tpot_ms for row in line]),
            ):
                axes.plot(
                    batch, shown, style, color=f"C{index}", ms=4, label=f"{engine.name}, {model}"
                )
    gpu = results.env["gpu"]
    throughput.set(ylabel="output tokens/s", title=f"Throughput, {gpu}", yscale="log")
    latency.set(ylabel="TPOT, ms", title="Time per output token")
    ticks = sorted({row.concurrency for row in chats})
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("requests at a time (batch), 512 tokens in, 256 out")
        axes.grid(alpha=0.3)
    latency.set_ylim(bottom=0)
    throughput.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _chats(results: Results) -> list[Row]:
    """The rows whose workloads differ in concurrency only."""
    return [
        row
        for row in results.rows
        if (row.input_len, row.output_len) == (512, 256) and not row.flags
    ]


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(filter(None, dict.fromkeys(values)))
