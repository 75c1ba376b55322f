"""cast-train evaluate: flags to a Request, and its results to the terminal and a file."""

import json
from collections.abc import Sequence
from pathlib import Path

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.errors import RunError


def build_parser() -> Parser:
    """The parser of `cast-train evaluate`."""
    parser = Parser(
        prog="cast-train evaluate",
        description="Perplexity and zero-shot accuracy of a checkpoint, dense or sparse, in any "
        "form that cast-serve reads. The last line on stdout is one JSON object.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="checkpoint folder; only read")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="each file is a result"
    )
    text.add_argument(
        "--join",
        choices=["raw", "documents"],
        default="raw",
        help="raw: the file is one text, as in published WikiText-2 numbers; documents: EOS "
        "after each document, as in training (default raw)",
    )
    text.add_argument(
        "--text-key",
        metavar="KEY",
        help="key or column of the text in .jsonl and .parquet (default text)",
    )
    text.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens per window (default 1024 or the model's limit)",
    )
    text.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between sliding windows (default half the context)",
    )
    choice = parser.add_argument_group("zero-shot")
    choice.add_argument(
        "--zero-shot",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help='.jsonl of objects with "query", "choices" and "gold"',
    )
    choice.add_argument(
        "--between",
        default="\nAnswer:",
        metavar="TEXT",
        help="put between query and choice, before a space (default a line break and 'Answer:')",
    )
    choice.add_argument(
        "--tasks",
        type=lambda names: tuple(filter(None, names.split(","))),
        default=(),
        metavar="A,B",
        help="tasks of lm-eval (pip install 'cast-serve[eval]')",
    )
    choice.add_argument(
        "--include-path", type=Path, metavar="DIR", help="folder of further lm-eval task files"
    )
    choice.add_argument(
        "--limit", type=int, metavar="N", help="first N items of each zero-shot file and task"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--device", choices=["auto", "cpu"], default="auto", help="auto takes a GPU if there is one"
    )
    run.add_argument(
        "--compute",
        choices=["fp32", "bf16"],
        default="fp32",
        help="arithmetic of the forward pass, whatever is stored (default fp32)",
    )
    run.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the JSON here too")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `cast-train evaluate`; returns its exit status."""
    given = vars(build_parser().parse_args(arguments))
    target: Path | None = given.pop("json")
    if target is not None and not target.parent.is_dir():
        raise RunError(f"json: {target.parent} is no folder")
    # Here, because transformers takes seconds to import and --help must not wait for it.
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from cast_serve.trainer.evaluation.evaluate import Request, evaluate
    from cast_serve.trainer.evaluation.report import render_evaluation

    disable_progress_bar()
    given |= {key: tuple(given[key]) for key in ("text", "zero_shot")}
    result = evaluate(Request(**given))
    line = json.dumps(result, allow_nan=False)
    if target is not None:
        try:
            target.write_text(line + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"json: cannot write {target}: {error.strerror}") from error
    console = Console(highlight=False)
    console.print(render_evaluation(result))
    # Not through rich, which would break the line at the terminal's width.
    console.file.write(line + "\n")
    return 0
