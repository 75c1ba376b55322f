"""cast-train estimate: memory a GPU and time of a run, from a config.json alone (capacity.py)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Llama 2 (arXiv 2307.09288), of which CAST's results are.
_LLAMA_2: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
# What CUDA, NCCL and the allocator's gaps take of a GPU's memory.
_USABLE = 0.9
_CONTEXT = 4096


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cast-train estimate",
        description="Estimate memory and time of a training run before there are weights or GPUs.",
        allow_abbrev=False,
    )
    known = ", ".join(_LLAMA_2)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help=f"folder with a config.json, or {known}"
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100 or h200")
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="GPUs of one host")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--gradient-accumulation", type=int, default=1, metavar="N")
    parser.add_argument("--context", type=int, metavar="N", help="(default 4096 or the model's)")
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--offload", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--compute", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--eta", type=float, default=1 / 3, metavar="X", help="0: no teacher")
    parser.add_argument("--tokens", type=float, default=7.5e9, metavar="N", help="of the run")
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="X", help="share of the GPU's peak reached"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print tables and one JSON line; exit status 1 where memory does not do.

    Raises:
        RunError: unknown model or GPU, or a value out of range.
    """
    given = build_parser().parse_args(arguments)
    # Slow to import.
    from rich.console import Console

    from cast_serve.trainer.capacity import GPUS, Shape, memory, speed
    from cast_serve.trainer.report import memory_table, size
    from cast_serve.trainer.source import context_length

    if given.gpu not in GPUS:
        raise RunError(f"gpu: {given.gpu!r} is not known; there is {', '.join(GPUS)}")
    if given.processes < 1 or not 0 < given.mfu <= 1 or not given.tokens >= 1:
        raise RunError("processes and tokens must be at least 1, and mfu above 0 and at most 1")
    model = _empty_model(given.model)
    given.context = context_length(model, given.context, default=_CONTEXT)
    gpu, config = GPUS[given.gpu], _run_config(given)
    shape = Shape.of(model, config)
    needed = memory(shape, config, context=given.context, processes=given.processes)
    pace = speed(
        shape, config, gpu, context=given.context, processes=given.processes, mfu=given.mfu
    )
    console = Console(highlight=False)
    on_gpu, on_host = sum(needed.gpu.values()), sum(needed.host.values()) * given.processes
    fits = on_gpu <= _USABLE * gpu.memory
    verdict = "fits" if fits else "does not fit"
    title = f"memory of one {gpu.name} of {size(gpu.memory, 'B')}, estimated: {verdict}"
    console.print(memory_table(needed, title=title))
    if on_host:
        console.print(f"host memory for {given.processes} of them: {size(on_host, 'B')}")
    hours = given.tokens / pace.tokens_per_s / 3600
    figures = {
        "model": given.model,
        "parameters": shape.parameters,
        "processes": given.processes,
        "gpu": gpu.name,
        "parallel": given.parallel,
        "gpu_bytes": needed.gpu,
        "host_bytes": needed.host,
        "fits": fits,
        "seconds_a_step": {
            "arithmetic": pace.arithmetic,
            "traffic": pace.traffic,
            "host_sums": pace.host_sums,
            "optimizer": pace.optimizer,
        },
        "tokens_per_s": pace.tokens_per_s,
        "hours": hours,
    }
    console.print(
        f"{pace.tokens_per_s:,.0f} tokens/s at {given.mfu:.0%} of the peak: "
        f"{given.tokens / 1e9:.3g} B tokens take {hours:,.0f} h",
        markup=False,
    )
    print(json.dumps(figures))
    return 0 if fits else 1


def _run_config(given: argparse.Namespace) -> RunConfig:
    return RunConfig(
        model=Path(given.model),
        data=(DataSource(place="none.txt"),),
        output=Path("none"),
        parallel=given.parallel,
        batch_size=given.batch_size,
        gradient_accumulation=given.gradient_accumulation,
        context=given.context,
        gradient_checkpointing=given.gradient_checkpointing,
        offload=given.offload,
        compute=given.compute,
        eta=given.eta,
    )


def _empty_model(model: str) -> "PreTrainedModel":
    from cast_serve.trainer.capacity import empty_model
    from cast_serve.trainer.source import LOADING_ERRORS

    config = _model_config(model)
    try:
        return empty_model(config)
    except LOADING_ERRORS as error:
        reason = first_line(error).rstrip(".")
        raise RunError(
            f"model: {model} makes no causal language model: {reason}; give a folder of one, or "
            f"one of {', '.join(_LLAMA_2)}"
        ) from error


def _model_config(model: str) -> Any:
    from transformers import AutoConfig, LlamaConfig

    from cast_serve.trainer.source import LOADING_ERRORS

    if model in _LLAMA_2:
        return LlamaConfig(**_LLAMA_2[model], max_position_embeddings=4096)
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except LOADING_ERRORS as error:
        raise RunError(
            f"model: no configuration in {model}: {first_line(error)}; give a folder with a "
            f"config.json, or one of {', '.join(_LLAMA_2)}"
        ) from error
