"""cast-train finetune: fine-tune a 2:4 checkpoint and keep its pattern exactly."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.finetune.config import DEFAULT_HELD_OUT, DEFAULT_LR, FinetuneConfig


def build_parser() -> argparse.ArgumentParser:
    """Its result holds the flags that were given and no defaults."""
    parser = Parser(
        prog="cast-train finetune",
        description="Fine-tune a 2:4 checkpoint. The pattern stays exactly as it is: gradients are "
        "masked, or adapters stay separate (--lora) or are masked and merged (--lora --merge).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    files = {"nargs": "+", "type": Path, "metavar": "FILE"}
    flag("--model", type=Path, metavar="DIR", required=True, help="2:4 checkpoint of any form")
    flag(
        "--data",
        required=True,
        help="text as cast-train reads it (loss on every token), or rows with prompt and "
        "completion, or messages (loss on completions and assistant turns)",
        **files,  # type: ignore[arg-type]
    )
    flag("--output", type=Path, metavar="DIR", required=True, help="new folder")
    flag("--eval-data", help="files to evaluate on, of the kind of --data", **files)  # type: ignore[arg-type]
    flag(
        "--text-key",
        metavar="KEY",
        help="train on the text under this key or column of .jsonl and .parquet, whatever else "
        "rows hold (default text, where there is no prompt and no messages)",
    )
    flag(
        "--held-out",
        type=float,
        metavar="X",
        help=f"share kept for evaluation (default {DEFAULT_HELD_OUT:g})",
    )
    flag("--steps", type=int, metavar="N", help="optimizer steps")
    flag("--epochs", type=float, metavar="X", help="passes over the data (default 1)")
    flag("--context", type=int, metavar="N", help="longest sequence (default 1024 or the model's)")
    flag("--batch-size", type=int, metavar="N", help="sequences per forward pass (default 8)")
    flag("--gradient-accumulation", type=int, metavar="N", help="forward passes per step")
    rates = ", ".join(f"{rate:g} {kind}" for kind, rate in DEFAULT_LR.items())
    flag("--lr", type=float, metavar="X", help=f"peak learning rate (default {rates})")
    flag("--warmup", type=float, metavar="X", help="share of the steps (default 0.05)")
    flag("--lr-floor", type=float, metavar="X", help="final rate over the peak (default 0.1)")
    flag("--weight-decay", type=float, metavar="X", help="AdamW's (default 0)")
    flag("--clip", type=float, metavar="X", help="gradient norm to clip at, 0 for none (default 1)")
    flag("--lora", action="store_true", help="train adapters; OUTPUT is one for --enable-lora")
    flag("--lora-rank", type=int, metavar="N", help="(default 8)")
    flag("--lora-alpha", type=float, metavar="X", help="(default twice the rank)")
    flag("--lora-target", nargs="+", metavar="NAME", help="such as q_proj (default: all sparse)")
    flag("--merge", action="store_true", help="mask the adapters and merge them into the weights")
    flag("--export", choices=("packed", "dense"), help="form of the output (default packed)")
    flag("--seed", type=int, metavar="N", help="of data order and adapters")
    flag("--device", choices=("auto", "cpu"), help="auto takes a GPU if there is one")
    flag("--compute", choices=("fp32", "bf16"), help="of the forward pass; masters are fp32")
    flag("--gradient-checkpointing", action="store_true", help="recompute activations")
    flag("--log-steps", type=int, metavar="N", help="steps between figures (default 10)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `cast-train finetune`.

    Raises:
        RunError: anything a user can put right, said in one line.
    """
    given = vars(build_parser().parse_args(arguments))
    for key in ("data", "eval_data", "lora_target"):
        if key in given:
            given[key] = tuple(given[key])
    config = FinetuneConfig(**given)
    missing = [name for name in ("accelerate", "peft") if find_spec(name) is None]
    if missing:
        raise RunError(
            f"fine-tuning needs {', '.join(missing)}; install it: pip install 'cast-serve[train]'"
        )
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from cast_serve.trainer.finetune.train import run

    disable_progress_bar()
    run(config, Console(highlight=False))
    return 0
