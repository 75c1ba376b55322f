"""RunConfig: everything that decides a CAST run, with the defaults of docs/method.md.

Field names are the YAML keys and, with dashes, the flags; `lambda_` is `lambda` in both, because
Python reserves the word. arguments.py builds a RunConfig from flags and YAML.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from cast_serve.trainer.errors import RunError

# Travel (docs/method.md, AdamS, 3): sum_t lr_t * a_t / mean |masked w|. Below the first the final
# prune destroys the model, below the second it costs some quality.
TRAVEL_REFUSED = 1.5
TRAVEL_ADVISED = 3.0
# The default rate is the one that travels far enough, but no higher than this: a budget too small
# for it must be refused, not rescued by a rate that diverges.
HIGHEST_DEFAULT_LR = 2e-3
DEFAULT_CONTEXT = 1024


def _about(text: str, *, group: str, identity: bool = True) -> dict[str, Any]:
    """A field's metadata; `identity` fields must be the same when a run is resumed."""
    return {"help": text, "group": group, "identity": identity}


def _option(default: Any, text: str, *, group: str, identity: bool = True) -> Any:
    return field(default=default, metadata=_about(text, group=group, identity=identity))


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """N:M sparsity: `kept` of every `group` consecutive inputs of a row survive."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "N:M".

        Raises:
            RunError: not two integers with 0 < N < M.
        """
        kept, colon, group = text.partition(":")
        if colon and kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group):
            return cls(kept=int(kept), group=int(group))
        raise RunError(f"pattern: {text!r} is no N:M pattern; write 2:4, 1:4, 4:8 (0 < N < M)")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One CAST run. Construction validates: an impossible value raises RunError naming its key."""

    model: Path = field(
        metadata=_about("dense Hugging Face checkpoint to sparsify; also the teacher", group="run")
    )
    data: tuple[Path, ...] = field(
        metadata=_about(
            "training text: .txt (documents separated by three newlines) or .jsonl with a "
            '"text" key, also with .xz',
            group="run",
        )
    )
    # Not part of the identity: a run folder that was moved with its output may be resumed there.
    output: Path = field(
        metadata=_about(
            "folder to write; training checkpoints, logs and plots go to OUTPUT.run beside it",
            group="run",
            identity=False,
        )
    )

    pattern: str = _option("2:4", "N:M, N weights of every M survive", group="method")
    lambda_: float | None = _option(
        None,
        "strength of the decay of masked weights (Eq. 7), of the order of the gradient; default: "
        "the RMS of the first batches' gradient",
        group="method",
    )
    eta: float = _option(
        1 / 3, "weight of the KL to the teacher against cross-entropy (Eq. 13)", group="method"
    )
    temperature: float = _option(1.0, "softmax temperature of the KL", group="method")
    scaling_blocks: int = _option(2, "learned scales per row, n of Eq. 11", group="method")
    mask_interval: int = _option(10, "steps between mask refreshes, T1", group="method")

    steps: int | None = _option(None, "optimizer steps", group="budget")
    epochs: float | None = _option(
        None, "passes over the data (default 1 when no budget is given)", group="budget"
    )
    tokens: int | None = _option(None, "training tokens, rounded up to a step", group="budget")
    context: int | None = _option(
        None, "tokens per sequence; default: 1024 or the model's limit", group="budget"
    )
    batch_size: int = _option(8, "sequences per forward pass", group="budget")
    gradient_accumulation: int = _option(1, "forward passes per step", group="budget")

    lr: float | None = _option(
        None,
        f"peak learning rate; default: the rate whose travel is {TRAVEL_ADVISED:g}, "
        f"at most {HIGHEST_DEFAULT_LR:g}",
        group="optimizer",
    )
    warmup: float = _option(0.05, "share of the steps that warm the rate up", group="optimizer")
    lr_floor: float = _option(
        0.1, "final rate as a share of the peak; cosine in between", group="optimizer"
    )
    beta1: float = _option(0.9, "momentum of the gradient", group="optimizer")
    beta2: float = _option(0.95, "momentum of the second moment", group="optimizer")
    eps: float = _option(1e-8, "added to sqrt(v)", group="optimizer")
    clip: float = _option(1.0, "gradient norm to clip at, 0 for none", group="optimizer")

    seed: int = _option(0, "seeds the data order and dropout", group="run")
    device: Literal["auto", "cpu"] = _option(
        "auto", "auto takes a GPU if there is one", group="run"
    )
    compute: Literal["fp32", "bf16"] = _option(
        "fp32", "arithmetic of the forward pass; master weights are always fp32", group="run"
    )
    compile: bool = _option(
        False, "run the models through torch.compile, for speed on a GPU", group="run"
    )
    loss: Literal["auto", "chunked", "liger", "logits"] = _option(
        "auto",
        "chunked: from hidden states, without the logits; liger: the same by Liger-Kernel; logits: "
        "keeps them whole; auto: chunked where the model has a plain head, else logits",
        group="run",
    )
    teacher: Literal["resident", "offload", "cached"] = _option(
        "resident",
        "where the teacher lives: on the device, its blocks in host memory, or its top tokens on "
        "disk in OUTPUT.run/teacher, computed once",
        group="run",
    )
    teacher_top_k: int = _option(64, "tokens of the vocabulary a cached teacher keeps", group="run")
    gradient_checkpointing: bool = _option(
        False, "recompute activations in the backward pass to save memory", group="run"
    )
    held_out: float = _option(
        0.01, "share of the data kept for evaluation, evenly spaced; 0 for none", group="run"
    )
    eval_data: tuple[Path, ...] = _option(
        (), "files to evaluate on in place of a held-out share", group="run"
    )
    save_steps: int = _option(500, "steps between checkpoints", group="run", identity=False)
    save_limit: int = _option(2, "checkpoints to keep", group="run", identity=False)
    log_steps: int = _option(10, "steps between log entries", group="run", identity=False)

    export: Literal["packed", "dense", "training"] = _option(
        "packed",
        "form of the output: packed 2:4 values, dense with zeros, or unpruned with its scales",
        group="output",
        identity=False,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "of the packed or dense output; auto: the model's own",
        group="output",
        identity=False,
    )

    resume: bool = _option(
        False, "continue OUTPUT.run from its last checkpoint", group="action", identity=False
    )
    dry_run: bool = _option(
        False, "print the plan and check it, train nothing", group="action", identity=False
    )
    allow_short_travel: bool = _option(
        False, "start although the travel check refuses", group="action", identity=False
    )

    def __post_init__(self) -> None:
        self.nm  # noqa: B018  parsing is the check
        self._check_budget()
        self._check_ranges()
        if not self.data:
            raise RunError("data: no file given")
        if self.output.name in ("", ".."):
            raise RunError(f"output: {self.output} names no new folder; give one, such as ./sparse")
        if self.eval_data and self.held_out != type(self).held_out and self.held_out > 0:
            raise RunError("held_out: eval_data is evaluated on instead; give one of the two")

    @property
    def nm(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @property
    def run_dir(self) -> Path:
        """Where checkpoints, logs and plots go: beside the output, which holds the model alone."""
        return self.output.with_name(self.output.name + ".run")

    @property
    def export_form(self) -> Literal["packed", "dense", "training"]:
        """What is written: only 2:4 has a packed form."""
        return "dense" if self.export == "packed" and self.pattern != "2:4" else self.export

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, ready for JSON."""
        return {
            key_of(f.name): _plain(getattr(self, f.name))
            for f in fields(self)
            if f.metadata["identity"]
        }

    def _check_budget(self) -> None:
        given = [key for key in ("steps", "epochs", "tokens") if getattr(self, key) is not None]
        if len(given) > 1:
            raise RunError(f"{given[1]}: {given[0]} is given too; the budget is one of the two")

    def _check_ranges(self) -> None:
        at_least_one = "steps tokens batch_size gradient_accumulation scaling_blocks mask_interval"
        at_least_one += " teacher_top_k"
        for key in (*at_least_one.split(), "save_steps", "save_limit", "log_steps"):
            _require(key, getattr(self, key), lambda v: v >= 1, "at least 1")
        _require("context", self.context, lambda v: v >= 2, "at least 2")
        for key in ("epochs", "lr", "lambda_", "temperature", "eps"):
            _require(key, getattr(self, key), lambda v: 0 < v < float("inf"), "above 0")
        for key in ("eta", "lr_floor"):
            _require(key, getattr(self, key), lambda v: 0 <= v <= 1, "from 0 to 1")
        for key in ("warmup", "beta1", "beta2", "held_out"):
            _require(key, getattr(self, key), lambda v: 0 <= v < 1, "from 0 to below 1")
        _require("clip", self.clip, lambda v: 0 <= v < float("inf"), "0 or more")
        _require("seed", self.seed, lambda v: 0 <= v < 2**32, "from 0 to below 2^32")
        if self.loss == "liger" and self.teacher == "cached":
            raise RunError(
                "loss: liger needs the teacher's hidden states and teacher is cached; "
                "use chunked, or teacher: resident"
            )
        if self.eta == 1 and self.lambda_ is None:
            raise RunError(
                "lambda: must be given with eta=1, because a student that equals its teacher "
                "has no gradient to measure it by"
            )


def key_of(name: str) -> str:
    """YAML key of a field: `lambda_` is written `lambda`."""
    return name.rstrip("_")


def _require(name: str, value: Any, holds: Any, wanted: str) -> None:
    if value is not None and not holds(value):
        raise RunError(f"{key_of(name)}: {value} is out of range; it must be {wanted}")


def _plain(value: Any) -> Any:
    """A field's value as JSON has it; paths are resolved, so ./x and x are the same run."""
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
