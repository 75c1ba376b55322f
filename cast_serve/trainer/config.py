"""RunConfig: everything that decides a CAST run, with the defaults of docs/method.md.

Field names are the YAML keys and, with dashes, the flags; `lambda_` is `lambda` in both, because
Python reserves the word. arguments.py builds a RunConfig from flags and YAML.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from cast_serve.trainer.config_checks import check, key_of
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError

# Travel (docs/method.md, AdamS, 3): sum_t lr_t * a_t / mean |masked w|. Below the first the final
# prune destroys the model, below the second it costs some quality.
TRAVEL_REFUSED = 1.5
TRAVEL_ADVISED = 3.0
# The default rate is the one that travels far enough, but no higher than this: a budget too small
# for it must be refused, not rescued by a rate that diverges.
HIGHEST_DEFAULT_LR = 2e-3
# Of the methods that train with AdamW: AST's for GPT-2 sizes (LLaMA2-7B: 2e-5). Not the rate of
# AdamS, whose updates are about four times those of Adam at one rate (docs/method.md, AdamS, 2).
DEFAULT_ADAMW_LR = 1e-4
DEFAULT_CONTEXT = 1024


def _about(
    text: str, *, group: str, identity: bool = True, metavar: str | None = None
) -> dict[str, Any]:
    """A field's metadata; `identity` fields must be the same when a run is resumed.

    `metavar` stands for the flag's value in --help; None: what stands for the field's type.
    """
    return {"help": text, "group": group, "identity": identity, "metavar": metavar}


def _option(default: Any, text: str, **about: Any) -> Any:
    return field(default=default, metadata=_about(text, **about))


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
            found = cls(kept=int(kept), group=int(group))
            # Files say 2:4, not 02:04.
            if str(found) == text:
                return found
        raise RunError(f"pattern: {text!r} is no N:M pattern; write 2:4, 1:4, 4:8 (0 < N < M)")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One CAST run. Construction validates: an impossible value raises RunError naming its key."""

    model: Path = field(
        metadata=_about("dense Hugging Face checkpoint to sparsify; also the teacher", group="run")
    )
    data: tuple[DataSource, ...] = field(
        metadata=_about(
            "training text: .txt (documents separated by three newlines), .jsonl, .parquet, the "
            "first two also with .xz, .gz or .zst; a folder of these; hub:NAME[:CONFIG][@SPLIT] "
            "for a data set of the hub or, as hub:./FOLDER, on disk. With =WEIGHT after each, "
            "sources are drawn in these shares of the training tokens",
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

    method: Literal["cast", "dense", "fixed-mask", "sr-ste", "ast"] = _option(
        "cast",
        "cast; or what it is compared with: dense (nothing sparse), fixed-mask, sr-ste, ast",
        group="method",
    )
    initial_mask: Literal["magnitude", "wanda", "sparsegpt"] = _option(
        "magnitude", "how fixed-mask prunes before it trains", group="method"
    )
    start: Literal["dense", "magnitude", "wanda", "sparsegpt"] = _option(
        "dense",
        "how cast begins: with the dense model, or with one that is pruned in this way and whose "
        "masks still change",
        group="method",
    )
    pattern: str = _option(
        "2:4", "N:M, N weights of every M survive", group="method", metavar="N:M"
    )
    lambda_: float | None = _option(
        None,
        "strength of the decay of masked weights (Eq. 7), of the order of the gradient; default: "
        "the RMS of the first batches' gradient of (1-eta) * cross-entropy; sr-ste: 2e-4, ast: "
        "6e-5, both times the weight",
        group="method",
    )
    eta: float = _option(
        1 / 3, "weight of the KL to the teacher against cross-entropy (Eq. 13)", group="method"
    )
    temperature: float = _option(1.0, "softmax temperature of the KL", group="method")
    scaling_blocks: int = _option(2, "learned scales per row, n of Eq. 11", group="method")
    scale_baselines: bool = _option(
        False, "learn the scales in fixed-mask, sr-ste and ast too", group="method"
    )
    mask_interval: int = _option(
        10, "steps between mask refreshes of cast (T1) and ast", group="method"
    )
    decay_ramp: float = _option(
        1.0,
        "share of the steps over which the decay of masked weights fades in; it stays at its full "
        "strength for the rest",
        group="method",
    )
    masked_rate: float = _option(
        1.0,
        "learning rate of masked weights under the full decay, as a multiple of the others'; above "
        "1 they reach zero although the rate is low",
        group="method",
    )
    dense_rate: float = _option(
        1.0,
        "learning rate of all that stays dense (embeddings, norms, head, and the learned scales), "
        "as a multiple of the sparse layers'; 0 leaves it as it was",
        group="method",
    )
    second_moment: Literal["momentum", "gradient"] = _option(
        "momentum",
        "what v of AdamS is the mean square of: the momentum, as in the paper, or the gradient, as "
        "in Adam, whose updates are then about a quarter of the paper's at one rate",
        group="method",
    )
    mask_metric: Literal["magnitude", "activation"] = _option(
        "magnitude",
        "what survives in a group: the largest |w|, or the largest |w| times the norm of its input "
        "in the dense model",
        group="method",
    )

    steps: int | None = _option(None, "optimizer steps", group="budget")
    epochs: float | None = _option(
        None, "passes over the data (default 1 when no budget is given)", group="budget"
    )
    tokens: int | None = _option(None, "training tokens, rounded up to a step", group="budget")
    context: int | None = _option(
        None, "tokens per sequence; default: 1024 or the model's limit", group="budget"
    )
    # Not part of the identity, because only their product with the number of processes is.
    batch_size: int = _option(
        8, "sequences per forward pass of a process", group="budget", identity=False
    )
    gradient_accumulation: int = _option(
        1, "forward passes of a process per step", group="budget", identity=False
    )

    lr: float | None = _option(
        None,
        f"peak learning rate; default: the rate whose travel is {TRAVEL_ADVISED:g}, "
        f"at most {HIGHEST_DEFAULT_LR:g}; other methods than cast: {DEFAULT_ADAMW_LR:g}",
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
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp",
        "with several processes (torchrun): ddp, each holds the whole model, or fsdp, each holds a "
        "slice of it",
        group="run",
        identity=False,
    )
    offload: bool = _option(
        False,
        "with fsdp: keep weights, gradients and the optimizer's state in host memory, where the "
        "optimizer then runs",
        group="run",
        identity=False,
    )
    compute: Literal["fp32", "bf16"] = _option(
        "fp32", "arithmetic of the forward pass; master weights are always fp32", group="run"
    )
    compile: bool = _option(
        False, "run the models through torch.compile, for speed on a GPU", group="run"
    )
    cuda_graph: bool = _option(
        False,
        "record a step's passes as a CUDA graph, for models so small that the GPU waits for the "
        "host; on one GPU",
        group="run",
        identity=False,
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
    held_out: float | None = _option(
        None,
        "share of the data kept for evaluation, evenly spaced; 0 for none; default: 0.01, of a "
        "large corpus as much as gives 2^20 tokens",
        group="run",
    )
    eval_data: tuple[DataSource, ...] = _option(
        (), "what to evaluate on in place of a held-out share, named as in data", group="run"
    )
    text_key: str = _option(
        "text",
        "key or column of the text in .jsonl, .parquet and data sets",
        group="run",
        metavar="KEY",
    )
    document_attention: bool = _option(
        False, "attention in training stays within a document of a block", group="run"
    )
    token_cache: bool = _option(
        True,
        "keep tokenised text in the user's cache for the next run",
        group="run",
        identity=False,
    )
    loss_limit: float | None = _option(
        None,
        "mean loss that stops the run; default: one more than a model has that guesses, "
        "ln(vocabulary) + 1",
        group="run",
        identity=False,
    )
    eval_steps: float | None = _option(
        None,
        "steps between evaluations, as the model trains and as it would be pruned then; below 1 a "
        "share of the run; default: at the end only",
        group="run",
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
        check(self)

    @property
    def nm(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @property
    def pruned_first(self) -> Literal["magnitude", "wanda", "sparsegpt"] | None:
        """How the model is pruned before it trains; None: it starts dense."""
        if self.method == "fixed-mask":
            return self.initial_mask
        return None if self.start == "dense" else self.start

    @property
    def learns_scales(self) -> bool:
        return self.method == "cast" or self.scale_baselines

    @property
    def run_dir(self) -> Path:
        """Where checkpoints, logs and plots go: beside the output, which holds the model alone."""
        return self.output.with_name(self.output.name + ".run")

    @property
    def converts(self) -> bool:
        """Whether the output is made from the training form: there is a 2:4 form of it."""
        return self.pattern == "2:4" and self.method != "dense"

    @property
    def export_form(self) -> Literal["packed", "dense", "training"]:
        """What is written: only 2:4 has a packed form."""
        return "dense" if self.export == "packed" and not self.converts else self.export

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, ready for JSON."""
        return {
            key_of(f.name): _plain(getattr(self, f.name))
            for f in fields(self)
            if f.metadata["identity"]
        }

    @classmethod
    def identity_defaults(cls) -> dict[str, Any]:
        """`identity` of the fields that have a default, with it."""
        return {
            key_of(f.name): _plain(f.default)
            for f in fields(cls)
            if f.metadata["identity"] and f.default is not MISSING
        }


def _plain(value: Any) -> Any:
    """A field's value as JSON has it; paths are resolved, so ./x and x are the same run."""
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, DataSource):
        return value.identity()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
