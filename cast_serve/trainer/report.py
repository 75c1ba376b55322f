"""Plan and result as rich renderables, for the terminal."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cast_serve.trainer.capacity import Memory
from cast_serve.trainer.config import TRAVEL_ADVISED, TRAVEL_REFUSED, RunConfig
from cast_serve.trainer.layers import LayerChoice
from cast_serve.trainer.methods.baselines import AST_DECAY, SR_STE_DECAY
from cast_serve.trainer.plan import Plan

_VERDICTS = {
    "ok": "ok",
    "short": f"short: below {TRAVEL_ADVISED:g}",
    "refused": f"refused: below {TRAVEL_REFUSED:g}",
}


def render_plan(plan: Plan, config: RunConfig) -> RenderableType:
    """Layers, run, memory and the travel check."""
    mixture = (_mixture(plan),) if plan.sources else ()
    return Group(_layers(plan), _run(plan, config), *mixture, _memory(plan))


def size(count: float, unit: str = "") -> str:
    """1234567 as 1.23 M."""
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".strip()


def _layers(plan: Plan) -> Table:
    table = Table(title=f"{plan.model_name}: linear layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("N x K", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("plan")
    for (kind, rows, columns, reason), members in _by_kind(plan.layers).items():
        table.add_row(
            kind,
            str(len(members)),
            f"{rows} x {columns}",
            size(sum(member.numel for member in members)),
            f"dense: {reason}" if reason else "sparsify",
        )
    return table


def _by_kind(
    layers: Iterable[LayerChoice],
) -> dict[tuple[str, int, int, str | None], list[LayerChoice]]:
    """Layers that differ only by their block's number, which becomes *."""
    kinds: dict[tuple[str, int, int, str | None], list[LayerChoice]] = {}
    for layer in layers:
        name = ".".join("*" if part.isdecimal() else part for part in layer.name.split("."))
        kinds.setdefault((name, layer.rows, layer.columns, layer.dense_because), []).append(layer)
    return kinds


def _run(plan: Plan, config: RunConfig) -> Table:
    table = Table(title="run", title_justify="left", show_header=False)
    share = plan.sparse_parameters / plan.parameters
    batch = f"{config.batch_size} x {config.gradient_accumulation} x {plan.context}"
    if plan.processes > 1:
        batch = f"{plan.processes} processes x {batch}"
    form = config.export_form
    reason = "method dense" if config.method == "dense" else f"only 2:4 packs, not {config.pattern}"
    fallback = f" ({reason})" if form != config.export else ""
    rows = {
        "method": config.method
        + (f", pruned by {config.pruned_first} first" if config.pruned_first else ""),
        "parameters": f"{size(plan.parameters)}, of which {size(plan.sparse_parameters)} "
        f"({share:.1%}) to {config.pattern}"
        + (f", and {size(plan.scales)} scales" if plan.scales else ""),
        "tokens": f"{size(plan.tokens)} in {plan.steps:,} steps of "
        f"{plan.tokens_per_step:,} ({batch})",
        "data": f"{size(plan.train_blocks * plan.context)} tokens, {plan.epochs:.3g} epochs; "
        f"evaluation on {size(plan.eval_blocks * plan.context)} ({plan.evaluated_on})",
        "learning rate": f"{plan.lr:.3g}{'' if config.lr else ' (default)'}, "
        f"warm-up {config.warmup:.0%}, cosine to {config.lr_floor:g} x",
        "lambda": _lambda(plan, config),
        "loss": f"{config.eta:.3g} KL + {1 - config.eta:.3g} CE, "
        f"temperature {config.temperature:g}",
        "teacher": _teacher(plan, config),
        "mean |w|": f"{plan.magnitudes.masked:.3g} masked, {plan.magnitudes.kept:.3g} kept",
        "travel": "" if plan.travel is None else f"{plan.travel:.2f} ({_VERDICTS[plan.verdict]})",
        "output": f"{config.output}, {form}{fallback}",
    }
    for key, value in rows.items():
        if not value:
            continue
        table.add_row(key, value)
    return table


def _mixture(plan: Plan) -> Table:
    table = Table(title="data, drawn by weight", title_justify="left")
    table.add_column("source", overflow="fold")
    for column in ("share", "tokens", "epochs"):
        table.add_column(column, justify="right")
    for source in plan.sources:
        table.add_row(
            Text(source.name),
            f"{source.share:.1%}",
            size(source.blocks * plan.context),
            f"{plan.epochs_of(source):.3g}",
        )
    return table


def _lambda(plan: Plan, config: RunConfig) -> str:
    if plan.lambda_ is not None:
        return f"{plan.lambda_:.3g}"
    return {
        "cast": "measured on the first batches",
        "sr-ste": f"{SR_STE_DECAY:g} (default)",
        "ast": f"{AST_DECAY:g} (default)",
    }.get(config.method, "")


def _teacher(plan: Plan, config: RunConfig) -> str:
    if not config.eta:
        return "none"
    if config.teacher == "cached":
        return f"top {config.teacher_top_k} tokens cached, {size(plan.teacher_disk, 'B')} on disk"
    return "on the device" if config.teacher == "resident" else "blocks in host memory"


def _memory(plan: Plan) -> Table:
    where = "a process" if plan.processes > 1 else "the process"
    return memory_table(plan.memory, title=f"memory of {where} at the peak of a step, estimated")


def memory_table(memory: Memory, *, title: str) -> Table:
    """Bytes by part."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for part, count in memory.gpu.items():
        if count:
            table.add_row(part, size(count, "B"))
    table.add_row("total", size(sum(memory.gpu.values()), "B"), style="bold")
    if on_host := sum(memory.host.values()):
        table.add_row("in host memory", size(on_host, "B"))
    return table
