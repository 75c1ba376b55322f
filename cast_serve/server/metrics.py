"""The Prometheus families of cast-serve, beside vLLM's on /metrics.

Every API server sets the same values. "mostrecent" takes one of them where there are several, and
their files are merged; the default would show each under a label of its process.
"""

from prometheus_client import Gauge

from cast_serve.server.facts import Model, PlanRow, count_linears

ANY_NUMBER = "+Inf"


def expose(model: Model, model_name: str, versions: dict[str, str | None]) -> None:
    """Create the families and set them; once a process.

    Args:
        model_name: by which it is served, the label that vLLM's families have too.
        versions: from `info.versions`.
    """
    about = {
        "model_name": model_name,
        "architecture": model.architecture,
        "format": model.format,
        "dtype": model.dtype,
        "device": model.device,
        "version": versions["cast-serve"] or "",
        "vllm": versions["vllm"] or "",
        "torch": versions["torch"] or "",
    }
    _gauge("cast_serve_model_info", "The model being served; always 1.", *about).labels(
        **about
    ).set(1)

    sparse = _gauge(
        "cast_serve_sparse_layers",
        "Linears of the checkpoint that are 2:4, by whether the engine holds them packed or dense.",
        "held",
    )
    for held, packed in (("packed", True), ("dense", False)):
        layers = (layer for layer in model.sparse if layer.packed is packed)
        sparse.labels(held=held).set(count_linears(layers))
    _gauge("cast_serve_dense_layers", "Linears of the checkpoint that are not 2:4.").set(
        count_linears(model.dense)
    )

    weights = _gauge(
        "cast_serve_weight_bytes",
        "Bytes of weights on all ranks: of 2:4 linears, of other linears, and of all else.",
        "kind",
    )
    weights.labels(kind="sparse").set(sum(layer.bytes for layer in model.sparse))
    weights.labels(kind="dense").set(sum(layer.bytes for layer in model.dense))
    weights.labels(kind="other").set(model.other_bytes)
    _gauge(
        "cast_serve_dense_weight_bytes", "Bytes of all weights, if every linear was stored dense."
    ).set(model.dense_bytes)

    kernels = _gauge(
        "cast_serve_kernel_info",
        "The kernel that runs 2:4 layers of a shape [N, K] for up to so many tokens; always 1.",
        "layer_shape",
        "tokens",
        "kernel",
    )
    for (rows, columns), plan in model.kernels.items():
        for row in plan:
            kernels.labels(
                layer_shape=f"{rows}x{columns}",
                tokens=ANY_NUMBER if row[0] is None else str(row[0]),
                kernel=_name(row),
            ).set(1)

    if model.load_seconds is not None:
        _gauge(
            "cast_serve_load_seconds",
            "Seconds from the first 2:4 layer made to the last one ready to run.",
        ).set(model.load_seconds)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(name, meaning, labels, multiprocess_mode="mostrecent")


def _name(row: PlanRow) -> str:
    """As CAST_SERVE_KERNEL takes it."""
    _, kernel, config = row
    return f"{kernel}:{config}" if config else kernel
