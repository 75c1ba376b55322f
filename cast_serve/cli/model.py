"""cast-model: look into, verify and convert checkpoints.

PyTorch takes a second to import, so commands import what they need themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="cast-model",
    help="Look into, verify and convert 2:4 sparse checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Not checked by typer: the loader's own refusal says more than "does not exist".
Source = Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="New folder; must not exist.")
]


class Dtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Pattern(StrEnum):
    TWO_OF_FOUR = "2:4"


class Method(StrEnum):
    MAGNITUDE = "magnitude"


OutputDtype = Annotated[
    Dtype | None, typer.Option(help="Cast weights to this; default: as they are stored.")
]


@app.command()
def inspect(
    source: Source,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show format, layers and sizes, from the headers alone."""
    with _one_line_errors():
        from cast_serve.cli import tables
        from cast_serve.model_loaders.checkpoint import Checkpoint
        from cast_serve.model_loaders.summary import summarise

        summary = summarise(Checkpoint.open(source))
    if as_json:
        typer.echo(tables.summary_json(summary))
    else:
        tables.show_summary(summary)


@app.command()
def check(
    source: Source,
    limit: Annotated[int, typer.Option(min=1, help="Offending groups shown of a layer.")] = 3,
) -> None:
    """Scan every group of four, every bitmask and every weight; exit 1 if any is at fault."""
    with _one_line_errors():
        from cast_serve.cli import tables
        from cast_serve.model_loaders.check import check as scan
        from cast_serve.model_loaders.checkpoint import Checkpoint
        from cast_serve.model_loaders.layers import find_layers

        checkpoint = Checkpoint.open(source)
        layers = find_layers(checkpoint)
        findings = []
        with _progress("Checking") as report:
            for finding in scan(checkpoint, layers=layers, limit=limit):
                findings.append(finding)
                report(min(len(findings), len(layers.linears)), len(layers.linears))
        tables.show_findings(findings)
        verdict = tables.verdict(checkpoint.path, layers.scheme.format, findings)
    if not verdict.ok:
        typer.echo(f"cast-model: {verdict.line}", err=True)
        raise typer.Exit(1)
    typer.echo(verdict.line)


@app.command()
def pack(source: Source, output: Output, dtype: OutputDtype = None) -> None:
    """Write the packed form: 9/16 of the bytes of the sparse layers."""
    _convert(source, output, "packed", dtype)


@app.command()
def unpack(source: Source, output: Output, dtype: OutputDtype = None) -> None:
    """Write the dense-stored form, which plain transformers loads too."""
    _convert(source, output, "dense", dtype)


@app.command()
def prune(
    source: Source,
    output: Output,
    method: Annotated[Method, typer.Option(help="What survives: largest |w|.")] = Method.MAGNITUDE,
    pattern: Annotated[Pattern, typer.Option(help="Sparsity pattern.")] = Pattern.TWO_OF_FOUR,
) -> None:
    """Prune a dense checkpoint in one shot; its quality needs training after that."""
    with _one_line_errors():
        from cast_serve.model_loaders.prune import prune as prune_checkpoint

        with _progress("Pruning") as report:
            prune_checkpoint(source, output, method=method.value, progress=report)
    typer.echo(f"Pruned to {pattern.value} by {method.value}: {output}")


@app.command()
def quantize(
    source: Source,
    output: Output,
    fp8: Annotated[bool, typer.Option("--fp8", help="Values as float8 e4m3.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Values as int8.")] = False,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Measure the perplexity of this text before and after; repeatable."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window; default: 1024 or the model's.")
    ] = None,
    text_key: Annotated[
        str | None,
        typer.Option(help="Key or column of --text in .jsonl and .parquet; default: text."),
    ] = None,
) -> None:
    """Write 8-bit values with a scale per output channel: 5/16 of the bytes of sparse layers.

    Sparse layers only; there is no kernel for 8-bit values yet, so they are dequantized on loading.
    """
    if fp8 == int8:
        raise typer.BadParameter("give one of --fp8 and --int8")
    if (context is not None or text_key is not None) and not text:
        raise typer.BadParameter("--context and --text-key are of --text; give that too")
    with _one_line_errors():
        from cast_serve.cli import tables
        from cast_serve.cli.perplexity import measure_on
        from cast_serve.model_loaders.checkpoint import Checkpoint
        from cast_serve.model_loaders.quantize import quantize as quantize_checkpoint
        from cast_serve.model_loaders.summary import summarise

        measure = measure_on(tuple(text), context, text_key=text_key) if text else None
        with _progress("Quantizing") as report:
            record = quantize_checkpoint(
                source, output, to="fp8" if fp8 else "int8", measure=measure, progress=report
            )
        before, after = (summarise(Checkpoint.open(folder)) for folder in (source, output))
    typer.echo(tables.conversion_line(before, after))
    if text:
        typer.echo(
            f"perplexity {record['before']['perplexity']:.3f} -> "
            f"{record['after']['perplexity']:.3f} ({record['before']['tokens']} tokens)"
        )


@app.command(name="import")
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="GGUF_OR_DIR", help="A GGUF file, or a folder with one.")
    ],
    output: Output,
    dtype: Annotated[Dtype, typer.Option(help="Weights are dequantized to this.")] = Dtype.BFLOAT16,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint of dequantized weights."""
    with _one_line_errors():
        from cast_serve.cli.gguf import import_gguf

        import_gguf(source, output, dtype=dtype.value)
    typer.echo(f"Imported with weights dequantized to {dtype.value}: {output}")


def main() -> None:
    app()


def _convert(source: Path, output: Path, to: str, dtype: Dtype | None) -> None:
    with _one_line_errors():
        import torch

        from cast_serve.cli import tables
        from cast_serve.model_loaders.checkpoint import Checkpoint
        from cast_serve.model_loaders.convert import convert
        from cast_serve.model_loaders.summary import summarise

        wanted = getattr(torch, dtype.value) if dtype else None
        with _progress("Converting") as report:
            convert(source, output, to=to, dtype=wanted, progress=report)
        before, after = (summarise(Checkpoint.open(folder)) for folder in (source, output))
    typer.echo(tables.conversion_line(before, after))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A refusal is one line on stderr and exit status 1; anything else keeps its traceback."""
    from cast_serve.model_loaders.errors import CheckpointError

    try:
        yield
    except CheckpointError as error:
        typer.echo(f"cast-model: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"cast-model: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
