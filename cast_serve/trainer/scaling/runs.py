"""Finished runs to points of the law: OUTPUT folders of cast-train, or a table.

    OUTPUT      cast.json: tokens, perplexities; parameters are counted from the headers
    .csv        columns parameters, tokens, loss, and if known dense_loss
    .json       a list of objects with these keys

Only finished runs are points: in the middle of a run the learning rate is still high and masked
weights are still there, so its loss is not that of a run of as many tokens.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.scaling.law import Run

_TABLES = (".csv", ".json")
# The dense model's perplexity on one text is a constant, up to the order of floating-point sums.
_SAME_TEXT = 1e-3


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs that `paths` hold, in order.

    Raises:
        RunError: names the file, and row or key, that is missing or no number; or two runs of one
            model that were evaluated on different text.
    """
    runs: list[Run] = []
    for path in paths:
        runs += _table(path) if path.suffix in _TABLES else [_output(path)]
    _require_one_text(runs)
    return runs


def _output(folder: Path) -> Run:
    from cast_serve.model_loaders.checkpoint import Checkpoint

    path = folder / "cast.json"
    if not path.is_file():
        known = ", ".join(_TABLES)
        raise RunError(
            f"{folder}: holds no cast.json; give the OUTPUT folder of a finished run, or a table "
            f"({known})"
        )
    record = _read_json(path)
    for made_later in ("finetune", "quantization"):
        if made_later in record:
            raise RunError(f"{path}: has {made_later!r}: its loss is not that of the training run")
    method = record.get("method", "cast")
    if method != "cast":
        raise RunError(f"{path}: is of method {method}; the law is of CAST runs")
    if record.get("start", "dense") != "dense":
        raise RunError(
            f"{path}: starts from {record['start']}; the law is of runs that start dense"
        )
    try:
        evaluation = record["evaluation"]
        tokens, sparse, dense = (
            record["tokens"],
            evaluation["perplexity_after_prune"],
            evaluation["perplexity_dense"],
        )
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: has no {error}; it is not of a cast-train run") from error
    return Run(
        name=folder.resolve().name,
        parameters=_count_parameters(Checkpoint.open(folder)),
        tokens=_positive(tokens, f"{path}: tokens", whole=True),
        loss=_log_perplexity(sparse, f"{path}: perplexity_after_prune"),
        dense_loss=_log_perplexity(dense, f"{path}: perplexity_dense"),
    )


def _count_parameters(checkpoint: Any) -> int:
    """Parameters of the model, pruned ones included, from the headers alone."""
    from cast_serve.model_loaders.layers import find_layers

    layers = find_layers(checkpoint)
    linears = sum(math.prod(linear.shape) for linear in layers.linears)
    return linears + sum(math.prod(checkpoint.entries[name].shape) for name in layers.others)


def _table(path: Path) -> list[Run]:
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                rows: Any = list(csv.DictReader(file))
        else:
            rows = _read_json(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path}: is not a CSV table: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise RunError(f"{path}: holds no rows of parameters, tokens, loss")
    return [_row(path, number, row) for number, row in enumerate(rows, start=1)]


def _row(path: Path, number: int, row: Any) -> Run:
    where = f"{path}: row {number}"
    for key in ("parameters", "tokens", "loss"):
        if not isinstance(row, dict) or row.get(key) in (None, ""):
            raise RunError(f"{where}: has no {key}")
    dense = row.get("dense_loss")
    return Run(
        name=str(row.get("name") or f"{path.stem} {number}"),
        parameters=_positive(row["parameters"], f"{where}: parameters", whole=True),
        tokens=_positive(row["tokens"], f"{where}: tokens", whole=True),
        loss=_positive(row["loss"], f"{where}: loss"),
        dense_loss=None if dense in (None, "") else _positive(dense, f"{where}: dense_loss"),
    )


def _require_one_text(runs: list[Run]) -> None:
    seen: dict[int, Run] = {}
    for run in runs:
        first = seen.setdefault(run.parameters, run)
        if run.dense_loss is None or first.dense_loss is None:
            continue
        if abs(run.dense_loss - first.dense_loss) > _SAME_TEXT:
            raise RunError(
                f"{first.name} and {run.name}: their dense models' losses are "
                f"{first.dense_loss:.4f} and {run.dense_loss:.4f}, so model or evaluation text "
                "differ; give runs of one model with the same eval_data"
            )


def _positive(value: Any, what: str, *, whole: bool = False) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf or (whole and number % 1):
        wanted = "a whole number above 0" if whole else "a finite number above 0"
        raise RunError(f"{what}: expected {wanted}, got {value!r}")
    return int(number) if whole else number


def _log_perplexity(value: Any, what: str) -> float:
    return _positive(math.log(max(1.0, _positive(value, what))), f"{what}: its logarithm")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path}: is not JSON: {error}") from error
