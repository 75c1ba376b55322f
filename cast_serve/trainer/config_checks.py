"""What a RunConfig must hold: each value in its range, and no two that contradict each other.

A value that a run would ignore is refused, too: who gave it expects something of it.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cast_serve.trainer.data_source import shares
from cast_serve.trainer.errors import RunError

if TYPE_CHECKING:
    from cast_serve.trainer.config import RunConfig

# Keys that some methods alone look at, and which those are.
METHODS_OF = {
    "initial_mask": ("fixed-mask",),
    "start": ("cast",),
    "decay_ramp": ("cast",),
    "masked_rate": ("cast",),
    "dense_rate": ("cast", "fixed-mask", "sr-ste", "ast"),
    "second_moment": ("cast",),
    "scale_baselines": ("fixed-mask", "sr-ste", "ast"),
    "mask_metric": ("cast", "sr-ste", "ast"),
    "mask_interval": ("cast", "ast"),
    "pattern": ("cast", "fixed-mask", "sr-ste", "ast"),
}
# Of them those that are the same in every row of a comparison, or that its methods are named after.
_OF_NO_ROW = ("initial_mask", "start", "pattern")


def check(config: "RunConfig") -> None:
    """Refuse what cannot be.

    Raises:
        RunError: names the key, what it is, and what it may be.
    """
    config.nm  # noqa: B018  parsing is the check
    _check_budget(config)
    _check_ranges(config)
    _check_teacher(config)
    _check_method(config)
    _check_files(config)
    _check_graph(config)
    if config.offload and config.parallel != "fsdp":
        raise RunError("offload: needs parallel=fsdp, which moves weights to the GPU in turn")


def unread_defaults(method: str, config: "RunConfig") -> dict[str, Any]:
    """The keys that `method` does not look at, each with its default."""
    return {
        key: default for key, default in _defaults(config).items() if method not in METHODS_OF[key]
    }


def given_in_vain(method: str, config: "RunConfig") -> list[str]:
    """The keys that `method` does not look at and that are not at their defaults."""
    unread = unread_defaults(method, config)
    return [key for key, default in unread.items() if getattr(config, key) != default]


def own_settings(config: "RunConfig") -> dict[str, Any]:
    """What tells a row of a comparison from others: keys of some methods, not at their defaults."""
    return {
        key: getattr(config, key)
        for key, default in _defaults(config).items()
        if key not in _OF_NO_ROW and getattr(config, key) != default
    }


def _defaults(config: "RunConfig") -> dict[str, Any]:
    """Of the keys that some methods alone look at."""
    defaults = {option.name: option.default for option in fields(config)}
    return {key: defaults[key] for key in METHODS_OF}


def key_of(name: str) -> str:
    """YAML key of a field: `lambda_` is written `lambda`."""
    return name.rstrip("_")


def _check_budget(config: "RunConfig") -> None:
    given = [key for key in ("steps", "epochs", "tokens") if getattr(config, key) is not None]
    if len(given) > 1:
        raise RunError(f"{given[1]}: {given[0]} is given too; the budget is one of the two")


def _check_ranges(config: "RunConfig") -> None:
    def require(keys: str, holds: Any, wanted: str) -> None:
        for key in keys.split():
            value = getattr(config, key)
            if value is not None and not holds(value):
                raise RunError(f"{key_of(key)}: {value} is out of range; it must be {wanted}")

    counts = "steps tokens batch_size gradient_accumulation scaling_blocks mask_interval"
    require(f"{counts} teacher_top_k", lambda v: v >= 1, "at least 1")
    require("save_steps save_limit log_steps", lambda v: v >= 1, "at least 1")
    require("context", lambda v: v >= 2, "at least 2")
    above_zero = "epochs lr lambda_ temperature eps loss_limit eval_steps"
    require(above_zero, lambda v: 0 < v < float("inf"), "finite and above 0")
    require("eta lr_floor", lambda v: 0 <= v <= 1, "from 0 to 1")
    require("warmup beta1 beta2 held_out", lambda v: 0 <= v < 1, "from 0 to below 1")
    require("decay_ramp", lambda v: 0 < v <= 1, "above 0 and at most 1")
    require("masked_rate", lambda v: 1 <= v < float("inf"), "1 or more")
    whole_or_share = "a whole number or a share below 1"
    require("eval_steps", lambda v: v < 1 or v % 1 == 0, whole_or_share)
    require("clip dense_rate", lambda v: 0 <= v < float("inf"), "0 or more")
    require("seed", lambda v: 0 <= v < 2**32, "from 0 to below 2^32")


def _check_teacher(config: "RunConfig") -> None:
    defaults = type(config)
    for key in ("teacher", "temperature"):
        if config.eta == 0 and getattr(config, key) != getattr(defaults, key):
            raise RunError(f"{key}: with eta 0 no teacher is asked; leave it out")
    if config.eta == 0 and config.loss == "liger":
        raise RunError("loss: with eta 0 there is no KL for liger to compute; use chunked")
    if config.teacher != "cached":
        if config.teacher_top_k != defaults.teacher_top_k:
            raise RunError("teacher_top_k: is of teacher=cached; leave it out")
        return
    if config.loss == "liger":
        raise RunError(
            "loss: liger needs the teacher's hidden states and teacher is cached; "
            "use chunked, or teacher: resident"
        )
    if config.document_attention:
        raise RunError(
            "teacher: cached sees blocks as a whole; with document_attention use another"
        )
    if config.parallel == "fsdp":
        raise RunError("teacher: cached needs parallel=ddp; use offload with fsdp")


def _check_method(config: "RunConfig") -> None:
    method = config.method
    for key in given_in_vain(method, config):
        of = ", ".join(METHODS_OF[key])
        raise RunError(f"{key}: is of method {of}, not {method}; leave it out")
    if config.mask_metric != "magnitude" and config.parallel == "fsdp":
        raise RunError(
            "mask_metric: activation runs the whole dense model on one device before training, "
            "and parallel=fsdp is for models without room there; use magnitude"
        )
    if config.parallel == "fsdp" and method != "cast":
        raise RunError(f"parallel: method {method} runs with ddp alone")
    if config.lambda_ is not None and method in ("dense", "fixed-mask"):
        raise RunError(f"lambda: method {method} has no decay; leave it out")
    if config.start != "dense" and config.parallel == "fsdp":
        raise RunError(
            f"start: {config.start} prunes the whole model on one device before training, and "
            "parallel=fsdp is for models without room there; use dense"
        )
    if config.start != "dense" and config.lr is None:
        raise RunError(
            f"lr: must be given with start={config.start}: the default is the rate that brings "
            "masked weights to zero, and here they are there already"
        )
    if config.export == "training" and method != "cast":
        raise RunError(
            f"export: the training form is of method cast, not {method}; use packed, dense"
        )
    if config.export == "training" and config.dtype != type(config).dtype:
        raise RunError("dtype: the training form keeps fp32 weights; leave it out")


def _check_files(config: "RunConfig") -> None:
    if not config.data:
        raise RunError("data: no file given")
    shares(config.data)
    weighted = [source.place for source in config.eval_data if source.weight is not None]
    if weighted:
        raise RunError(f"eval_data: {weighted[0]} has a weight; evaluation reads all of it")
    if config.output.name in ("", ".."):
        raise RunError(f"output: {config.output} names no new folder; give one, such as ./sparse")
    if config.eval_data and config.held_out:
        raise RunError("held_out: eval_data is evaluated on instead; give one of the two")


def _check_graph(config: "RunConfig") -> None:
    """Refuse what cannot be recorded as a CUDA graph."""
    if not config.cuda_graph:
        return
    if config.device == "cpu":
        raise RunError("cuda_graph: needs an NVIDIA GPU, and device is cpu")
    if config.gradient_checkpointing:
        raise RunError(
            "cuda_graph: gradient_checkpointing reads the GPU's random state in every pass, "
            "which a graph cannot; use one of the two"
        )
    if config.document_attention:
        raise RunError(
            "cuda_graph: document_attention looks at every batch on the host; use one of the two"
        )
    if config.loss == "liger":
        raise RunError(
            "cuda_graph: Liger-Kernel's backward pass reads a number of the GPU's on the host, "
            "which a graph cannot; use loss: chunked"
        )
    if config.teacher == "offload":
        raise RunError("cuda_graph: a teacher in host memory cannot be recorded; use resident")
