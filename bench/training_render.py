"""train-GPU.json and optim-GPU.json to train-GPU.md, and the training table of README.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cast_serve.bench import bench_optim, bench_train
from cast_serve.bench.bench_train import CAST, PLAIN
from cast_serve.bench.markdown import replace_between, table
from cast_serve.bench.result_file import ResultFile, read, sibling

BEGIN = "<!-- training results: written by `python -m bench.render` -->"
END = "<!-- end of training results -->"
NOTHING = "No results yet: `cast-bench train` and `cast-bench optim` on a GPU write them."

Steps = ResultFile[bench_train.Row]
Optimizers = ResultFile[bench_optim.Row]
ADAMS, ADAMW = "AdamS triton", "AdamW fused"


def load(file: Path) -> tuple[Steps, Optimizers]:
    """What is in train-GPU.json and in the optim-GPU.json beside it; empty where there is none.

    Raises:
        ResultError: one of them is no such file.
    """
    optim = beside(file)
    steps = read(file, bench_train.Row, bench_train.fault)
    if not optim.exists():
        return steps, Optimizers()
    return steps, read(optim, bench_optim.Row, bench_optim.fault)


def beside(file: Path) -> Path:
    """optim-GPU.json of a train-GPU.json."""
    return sibling(file, "optim")


def render(file: Path) -> list[Path]:
    """Write train-GPU.md beside train-GPU.json; returns it."""
    text = file.with_suffix(".md")
    text.write_text(markdown(*load(file)))
    return [text]


def markdown(steps: Steps, optimizers: Optimizers) -> str:
    """The report: steps, the kernels of a step, optimizers, what it was measured on."""
    lines = [
        f"# Training on {steps.env['gpu']}",
        "",
        "Random weights and tokens, bf16 autocast on fp32 weights, torch.compile, both passes "
        "recorded as a CUDA graph. *plain* is next-token loss and `torch.optim.AdamW(fused=True)` "
        "on the same model, batch and loss head; *cast* adds the teacher, scales, masks and AdamS. "
        f"Its floor is {bench_train.MOST_RATIO} of plain. MFU counts the teacher's arithmetic. "
        "Written by `python -m bench.render`; `cast-bench train` and `cast-bench optim` measure "
        "again.",
        "",
        "## Steps",
        "",
        *_steps(steps.rows),
    ]
    if optimizers.rows:
        lines += ["", "## Optimizers", "", *_optimizers(optimizers.rows)]
    lines += ["", "## Kernels of a step, ms", ""]
    for row in steps.rows:
        kernels = [[f"`{name}`", f"{ms:.2f}"] for name, ms in row.kernels.items()]
        lines += [f"### {row.model}, {row.method}", "", *table(["kernel", "ms"], kernels), ""]
    lines += ["## Runs", ""]
    runs = (steps.runs | optimizers.runs).values()
    fields = ("run", "driver", "cuda", "torch", "triton", "cpu")
    lines += table(list(fields), [[str(run[name]) for name in fields] for run in runs])
    return "\n".join(lines) + "\n"


def headline(files: Iterable[Path]) -> list[str]:
    """The table of README.md: a line a GPU and model."""
    lines = []
    for file in files:
        steps, optimizers = load(file)
        updates = {row.model: row for row in optimizers.rows if row.optimizer == ADAMS}
        for row in steps.rows:
            if row.method != CAST:
                continue
            update = updates.get(row.model)
            lines.append(
                [
                    f"[{steps.env['gpu']}]({file.with_suffix('.md').relative_to(file.parents[2])})",
                    row.model,
                    f"{row.tokens_per_s:,.0f}",
                    f"{row.mfu:.0%}",
                    f"{row.step_ms / _plain(row, steps.rows).step_ms:.2f}",
                    "" if update is None else f"{update.ratio:.2f}",
                ]
            )
    head = ["GPU", "model", "tokens/s", "MFU", "step / fine-tuning's", "AdamS / AdamW fused"]
    return table(head, lines) if lines else [NOTHING]


def update_readme(readme: Path, files: Iterable[Path]) -> None:
    """Put the table of `files` into `readme`.

    Raises:
        ValueError: the markers are not there.
    """
    replace_between(readme, BEGIN, END, headline(files))


def _plain(row: bench_train.Row, rows: Sequence[bench_train.Row]) -> bench_train.Row:
    same = (row.model, row.batch_size, row.context)
    return next(
        one
        for one in rows
        if one.method == PLAIN and (one.model, one.batch_size, one.context) == same
    )


def _steps(rows: Sequence[bench_train.Row]) -> list[str]:
    lines = [
        [
            row.model,
            f"{row.batch_size} x {row.context}",
            *bench_train.cells(row, plain=_plain(row, rows)),
        ]
        for row in rows
    ]
    return table(["model", "tokens", *bench_train.HEADER], lines)


def _optimizers(rows: Sequence[bench_optim.Row]) -> list[str]:
    return table(
        ["model", "optimizer", "step us", "with refresh", "mean", f"x {ADAMW}", "GB/s", "of copy"],
        [
            [
                row.model,
                row.optimizer,
                f"{row.step_us:.0f}",
                f"{row.refresh_us:.0f}",
                f"{row.mean_us:.0f}",
                f"{row.ratio:.3f}",
                f"{row.gbps:.0f}",
                f"{row.gbps / row.copy_gbps:.0%}" if row.copy_gbps else "",
            ]
            for row in rows
        ],
    )
