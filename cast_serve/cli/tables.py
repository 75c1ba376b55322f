"""What cast-model prints: tables for people, JSON for programs."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cast_serve.kernels.packing import Offender
from cast_serve.model_loaders.check import Finding
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import LinearEntry, dtype_name
from cast_serve.model_loaders.summary import Summary

SERVE_PLAIN = "config.json declares nothing, so serve it with `--quantization cast`"


# A checkpoint that was never pruned has every layer at fault.
SHOWN_LAYERS = 12
# Longer module names are folded, so that 80 columns have room for the rest.
NAME_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a check in one line."""

    ok: bool
    line: str


def show_summary(summary: Summary) -> None:
    """Print the headers' story: a few facts, then the linears by kind."""
    console = Console()
    facts = Table.grid(padding=(0, 2))
    sparse, dense = len(summary.sparse), len(summary.dense)
    candidates = " (if their weights are 2:4: `cast-model check`)" if summary.needs_flag else ""
    facts.add_row("checkpoint", escape(str(summary.path)))
    facts.add_row("format", f"{summary.format}, {', '.join(summary.dtypes) or 'no linears'}")
    facts.add_row("model", escape(summary.model_type))
    facts.add_row("linears", f"{sparse} sparse{candidates}, {dense} dense")
    for label, count in (
        ("on disk", summary.stored_bytes),
        ("in memory", summary.loaded_bytes),
    ):
        share = f"{count / summary.dense_bytes:.1%} of dense" if summary.dense_bytes else ""
        facts.add_row(label, f"{size(count)}, {share}")
    table = Table()
    kinds = _by_kind(summary.linears)
    table.add_column("linear", overflow="fold", min_width=_name_width(kinds))
    for header in ("N x K", "layers", "on disk"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("2:4", max_width=_rest(console, NAME_WIDTH, 13, 6, 9))
    certain = {Format.PLAIN: "unknown", Format.DENSE: "declared", Format.CT_DENSE: "declared"}.get(
        summary.format, "yes"
    )
    for kind, linears in kinds.items():
        first = linears[0]
        table.add_row(
            escape(kind),
            f"{first.shape[0]} x {first.shape[1]}",
            str(len(linears)),
            size(sum(linear.stored_bytes for linear in linears)),
            escape(f"no: {first.why_dense}") if first.why_dense else certain,
        )
    console.print(facts)
    console.print(table)


def summary_json(summary: Summary) -> str:
    """The summary with every linear, as indented JSON."""
    return json.dumps(
        {
            "path": str(summary.path),
            "format": str(summary.format),
            "model_type": summary.model_type,
            "needs_quantization_flag": summary.needs_flag,
            "files": summary.files,
            "dtypes": summary.dtypes,
            "sparse_linears": len(summary.sparse),
            "dense_linears": len(summary.dense),
            "stored_bytes": summary.stored_bytes,
            "dense_bytes": summary.dense_bytes,
            "loaded_bytes": summary.loaded_bytes,
            "linears": [
                {
                    "name": linear.name,
                    "sparse": linear.sparse,
                    "why_dense": linear.why_dense,
                    "shape": linear.shape,
                    "dtype": dtype_name(linear.dtype),
                    "stored_bytes": linear.stored_bytes,
                    "dense_bytes": linear.dense_bytes,
                }
                for linear in summary.linears
            ],
        },
        indent=2,
    )


def show_findings(findings: Iterable[Finding]) -> None:
    """Print the first layers that are at fault or not 2:4, with the first groups of each."""
    shown = [finding for finding in findings if finding.problem or finding.faulty]
    table = Table()
    names = [finding.name for finding in shown[:SHOWN_LAYERS]]
    table.add_column("layer", overflow="fold", min_width=_name_width(names))
    table.add_column("groups at fault", justify="right")
    console = Console()
    table.add_column("first", max_width=_rest(console, NAME_WIDTH, 24))
    for finding in shown[:SHOWN_LAYERS]:
        first = "\n".join(map(_group, finding.first)) or finding.problem or ""
        faulty = f"{finding.faulty} of {finding.groups}" if finding.faulty else ""
        table.add_row(escape(finding.name), faulty, escape(first))
    if shown:
        console.print(table)
    if more := shown[SHOWN_LAYERS:]:
        console.print(f"and {len(more)} more layers, the last {escape(more[-1].name)}")


def verdict(path: Path, stored: Format, findings: list[Finding]) -> Verdict:
    """Sum up the findings on the checkpoint at `path`."""
    problems = [finding.problem for finding in findings if finding.problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        return Verdict(ok=False, line=problems[0] + more)
    sparse = [finding for finding in findings if finding.why_dense is None]
    broken = [finding for finding in findings if finding.faulty]
    if not sparse:
        where = f"{broken[0].file}: {broken[0].name}.weight" if broken else str(path)
        why = broken[0].why_dense if broken else "has no linear that could be 2:4"
        return Verdict(
            ok=False,
            line=f"{where}: {why}; no linear is 2:4, prune with `cast-model prune` or cast-train",
        )
    groups = sum(finding.groups for finding in sparse)
    line = f"{len(sparse)} sparse linears in order, {groups} groups checked ({stored})."
    if broken:
        line += f" {len(broken)} linears are not 2:4 and stay dense."
    return Verdict(ok=True, line=f"{line} {SERVE_PLAIN}." if stored is Format.PLAIN else line)


def conversion_line(before: Summary, after: Summary) -> str:
    return (
        f"{after.path}: {after.format}, {len(after.sparse)} sparse and {len(after.dense)} dense "
        f"linears, {size(before.stored_bytes)} -> {size(after.stored_bytes)}"
    )


def size(count: int) -> str:
    """Bytes for people, in powers of ten as disks and model hubs count."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _name_width(names: Iterable[str]) -> int:
    return min(NAME_WIDTH, max(map(len, names), default=0))


def _rest(console: Console, *taken: int) -> int:
    """Width left for the last column: rich would take it from the names."""
    borders = 4 + 3 * len(taken)
    return max(12, console.width - sum(taken) - borders)


def _group(offender: Offender) -> str:
    values = ", ".join(f"{value:.3g}" for value in offender.values)
    return f"row {offender.row}, column {offender.column}: {values}"


def _by_kind(linears: Iterable[LinearEntry]) -> dict[str, list[LinearEntry]]:
    """Linears that differ in their layer number only, under their name with a * for it."""
    kinds: dict[tuple[object, ...], list[LinearEntry]] = {}
    for linear in linears:
        kind = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", linear.name)
        kinds.setdefault((kind, linear.shape, linear.why_dense), []).append(linear)
    names = Counter(str(kind) for kind, *_ in kinds)
    return {
        # One kind may come in several shapes or be dense in some layers: then layers are named.
        str(key[0]) if names[str(key[0])] == 1 else f"{key[0]} ({group[0].name}...)": group
        for key, group in kinds.items()
    }
