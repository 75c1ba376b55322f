"""/v1/cast/info: the model, its layers and kernels, and versions, as JSON."""

import platform
from importlib.metadata import version
from typing import Any

import torch
import transformers
import vllm

from cast_serve.server.facts import Layer, Model, PlanRow, count_linears


def info(model: Model, model_name: str) -> dict[str, Any]:
    """What /v1/cast/info answers."""
    return {
        "model": {
            "name": model_name,
            "architecture": model.architecture,
            "format": model.format,
            "dtype": model.dtype,
        },
        "device": model.device,
        "ranks": model.ranks,
        "load_seconds": model.load_seconds,
        "weights": {
            "bytes": model.bytes,
            "sparse_bytes": sum(layer.bytes for layer in model.sparse),
            "dense_linear_bytes": sum(layer.bytes for layer in model.dense),
            "other_bytes": model.other_bytes,
            "bytes_if_dense": model.dense_bytes,
        },
        "linears": {"sparse": count_linears(model.sparse), "dense": count_linears(model.dense)},
        "layers": [_layer(layer) for layer in model.layers],
        "kernels": [
            {"shape": list(shape), "plan": [_row(row) for row in plan]}
            for shape, plan in model.kernels.items()
        ],
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of what decides how a model is served; "cuda" is None without it."""
    return {
        "cast-serve": version("cast-serve"),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "linears": list(layer.linears),
        "shape": list(layer.shape),
        "ranks": layer.ranks,
        "sparse": layer.sparse,
        "packed": layer.packed,
        "sparsity": layer.sparsity,
        "bytes": layer.bytes,
        "bytes_if_dense": layer.dense_bytes,
    }


def _row(row: PlanRow) -> dict[str, Any]:
    tokens, kernel, config = row
    return {"tokens": tokens, "kernel": kernel, "config": config}
