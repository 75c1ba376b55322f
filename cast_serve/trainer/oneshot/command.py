"""cast-train prune: one-shot pruning of a dense checkpoint, the baseline of a training run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.data_source import DataSource


def build_parser() -> Parser:
    """The parser of `cast-train prune`."""
    parser = Parser(
        prog="cast-train prune",
        description="Prune a dense checkpoint to N:M in one shot, without training: magnitude, "
        "Wanda (arXiv 2306.11695) or SparseGPT (arXiv 2301.00774).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="dense checkpoint; only read"
    )
    parser.add_argument("--method", required=True, choices=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="new folder to write"
    )
    parser.add_argument("--pattern", default="2:4", metavar="N:M", help="default 2:4")
    text = parser.add_argument_group("calibration text, for wanda and sparsegpt")
    text.add_argument(
        "--data",
        type=DataSource.parse,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files as for training",
    )
    text.add_argument(
        "--text-key",
        metavar="KEY",
        help="key or column of the text in .jsonl, .parquet and data sets (default text)",
    )
    text.add_argument(
        "--samples", type=int, default=128, metavar="N", help="sequences drawn (default 128)"
    )
    text.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens per sequence (default 1024 or the model's limit)",
    )
    text.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default 0)")
    run = parser.add_argument_group("run and output")
    run.add_argument(
        "--device", choices=["auto", "cpu"], default="auto", help="auto takes a GPU if there is one"
    )
    run.add_argument(
        "--export",
        choices=["packed", "dense"],
        default="packed",
        help="packed 2:4 values, or dense with zeros, as any other N:M (default packed)",
    )
    run.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the output; auto: the model's own",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `cast-train prune`; returns its exit status."""
    given = vars(build_parser().parse_args(arguments))
    # Here, because transformers takes seconds to import and --help must not wait for it.
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from cast_serve.trainer.oneshot.run import Request, run

    disable_progress_bar()
    request = Request(**given | {"data": tuple(given["data"])})
    with _progress() as report:
        done = run(request, progress=report)
    Console(highlight=False, soft_wrap=True).print(done, markup=False)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of the blocks on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pruning", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
