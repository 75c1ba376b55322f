"""FinetuneConfig: everything that decides a fine-tune of a 2:4 checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cast_serve.trainer.errors import RunError

DEFAULT_HELD_OUT = 0.01
DEFAULT_LR = {"full": 2e-5, "lora": 2e-4}
DEFAULT_RANK = 8


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tune. Construction validates: an impossible value raises RunError naming its key.

    Attributes:
        text_key: train on the text under this key or column, whatever else rows hold; None: on
            "text" where rows have neither prompt nor messages.
        lora: train low-rank adapters in place of the weights.
        merge: mask the adapters' product in training, and write a 2:4 model in place of an adapter.
        lora_target: last parts of module names; empty: every sparse linear.
    """

    model: Path
    data: tuple[Path, ...]
    output: Path
    eval_data: tuple[Path, ...] = ()
    text_key: str | None = None
    held_out: float | None = None
    steps: int | None = None
    epochs: float | None = None
    context: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    lr: float | None = None
    warmup: float = 0.05
    lr_floor: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    lora: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_target: tuple[str, ...] = ()
    merge: bool = False
    export: Literal["packed", "dense"] = "packed"
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    compute: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    log_steps: int = 10

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise RunError("epochs: steps is given too; the budget is one of the two")
        lora_only = ("lora_rank", "lora_alpha", "lora_target", "merge")
        for key, given in ((key, getattr(self, key)) for key in lora_only):
            if given and not self.lora:
                raise RunError(f"{key}: is of LoRA; give --lora too")
        if self.export != "packed" and self.lora and not self.merge:
            raise RunError("export: an adapter is written; give --merge too for a model")
        if self.eval_data and self.held_out is not None:
            raise RunError("held_out: eval_data is evaluated on instead; give one of the two")
        at_least_one = ("steps", "batch_size", "gradient_accumulation", "lora_rank", "log_steps")
        for key in at_least_one:
            self._require(key, lambda value: value >= 1, "at least 1")
        self._require("context", lambda value: value >= 2, "at least 2")
        for key in ("epochs", "lr", "lora_alpha"):
            self._require(key, lambda value: 0 < value < float("inf"), "above 0")
        for key in ("weight_decay", "clip"):
            self._require(key, lambda value: 0 <= value < float("inf"), "0 or more")
        for key in ("warmup", "held_out"):
            self._require(key, lambda value: 0 <= value < 1, "from 0 to below 1")
        self._require("lr_floor", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._require("seed", lambda value: 0 <= value < 2**32, "from 0 to below 2^32")

    @property
    def method(self) -> str:
        """What is trained: "full", "lora" or "masked lora"."""
        if not self.lora:
            return "full"
        return "masked lora" if self.merge else "lora"

    @property
    def held_out_share(self) -> float:
        return DEFAULT_HELD_OUT if self.held_out is None else self.held_out

    @property
    def peak_lr(self) -> float:
        return self.lr or DEFAULT_LR["lora" if self.lora else "full"]

    @property
    def rank(self) -> int:
        return DEFAULT_RANK if self.lora_rank is None else self.lora_rank

    @property
    def alpha(self) -> float:
        """LoRA's alpha; the product is multiplied by alpha / rank."""
        return self.lora_alpha or 2.0 * self.rank

    def _require(self, key: str, holds, wanted: str) -> None:  # type: ignore[no-untyped-def]
        value = getattr(self, key)
        if value is not None and not holds(value):
            raise RunError(f"{key}: {value} is out of range; it must be {wanted}")
