"""How much longer than plain fine-tuning's does a training step of CAST take?

    python -m bench.bench_train                              SmolLM2-135M and a Llama of 1B
    python -m bench.bench_train --models SmolLM2-135M --batch-size 16
    python -m bench.bench_train                              on a CPU: a small model, one table

Against   the same model, batch and loss head without teacher, scales and masks: next-token loss and
          torch.optim.AdamW(fused=True). The floor: CAST in at most 1.45 of it, of which the
          teacher's forward pass alone is about a third.
Method    Random weights and tokens, bf16 autocast on fp32 weights, blocks through torch.compile,
          both passes recorded as a CUDA graph.
          Whole steps (gradient, clipping, optimizer; one in ten refreshes masks) between CUDA
          events, after a warm-up; the median. Parts are timed in steps of their own, and kernels in
          a profile of one.
MFU       Arithmetic of the step, the teacher's included, over the GPU's bf16 peak
          (trainer/capacity.py counts both).
Writes    train-GPU.json under --out; on a CPU only where --out is given. The last line on stdout is
          one JSON object.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from cast_serve.bench import environment
from cast_serve.bench.by_model import add_common_arguments, find_device, find_models, run
from cast_serve.bench.decoders import Decoder
from cast_serve.bench.result_file import positive
from cast_serve.trainer.capacity import GPUS, Shape, flops_per_token, memory
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.data import BlockStream
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.distillation.teacher import make_teacher
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.layers import compile_blocks, layers_of
from cast_serve.trainer.methods import method_of
from cast_serve.trainer.objective import prepare_head
from cast_serve.trainer.processes import Processes
from cast_serve.trainer.run_dir import Fixed

MOST_RATIO = 1.45
WARM_UP = 5
KERNELS = 12
PLAIN, CAST = "plain", "cast"
HEADER = (
    *("method", "step ms", "x plain", "gradient", "teacher", "clip", "optimizer"),
    *("tokens/s", "MFU", "GiB", "estimated"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train one model, on one GPU.

    Attributes:
        step_ms: median of whole steps.
        gradient_ms, teacher_ms, clip_ms, optimizer_ms: of the parts; the teacher's forward pass is
            part of the gradient.
        mfu: share of the GPU's peak; 0 where that is not known.
        peak_gib: most memory allocated in a step, the first ones and the recording of the graph
            included, because a replay allocates nothing; None on a CPU, or not known.
        estimated_gib: what capacity.py says.
        kernels: milliseconds of a step by kernel, the longest ones.
    """

    model: str
    method: str
    batch_size: int
    context: int
    step_ms: float
    gradient_ms: float
    teacher_ms: float
    clip_ms: float
    optimizer_ms: float
    tokens_per_s: float
    mfu: float
    peak_gib: float | None
    estimated_gib: float
    kernels: dict[str, float]
    run: str

    @property
    def key(self) -> tuple[object, ...]:
        return self.model, self.method, self.batch_size, self.context


def fault(row: Row) -> str | None:
    """What is wrong with the values of a row."""
    good = positive(row.step_ms, row.gradient_ms, row.optimizer_ms, row.tokens_per_s)
    return None if good else "a time or rate that is not above zero"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 2 cannot run as asked."""
    parser = argparse.ArgumentParser(
        prog="cast-bench train", description="Time a training step of CAST and of fine-tuning."
    )
    device = find_device()
    on_gpu = device.type == "cuda"
    add_common_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of each")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="that are timed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=on_gpu)
    given = parser.parse_args(arguments)
    try:
        models = find_models(given.models, device)
        for flag in ("batch_size", "context", "steps"):
            if getattr(given, flag) < 2:
                raise ValueError(f"--{flag.replace('_', '-')}: needs 2 or more")
    except ValueError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 2
    env = environment.describe(device if on_gpu else None, commit=given.commit)
    config = replace(
        run_config(batch_size=given.batch_size, context=given.context),
        compile=given.compile,
        cuda_graph=given.cuda_graph,
    )

    def both(model: Decoder) -> list[Row]:
        return [
            measure(model, method, config, device, steps=given.steps, env=env)
            for method in (PLAIN, CAST)
        ]

    run(
        "train",
        models,
        env,
        row_type=Row,
        fault=fault,
        measure=both,
        show=show,
        summarize=summarize,
        device=device,
        out=given.out,
    )
    return 0


def run_config(*, batch_size: int, context: int) -> RunConfig:
    """A CAST run in bf16, of which only the steps matter."""
    return RunConfig(
        model=Path("random"),
        data=(DataSource(place="random.txt"),),
        output=Path("random"),
        lambda_=1e-5,
        batch_size=batch_size,
        context=context,
        compute="bf16",
    )


def by_method(config: RunConfig, method: str) -> RunConfig:
    """`config` for PLAIN or CAST: plain fine-tuning has no teacher."""
    if method == PLAIN:
        return replace(config, method="dense", lambda_=None, eta=0.0)
    return config


def llama_config(decoder: Decoder, context: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=decoder.vocab,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.hidden // decoder.head,
        num_key_value_heads=decoder.kv // decoder.head,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )


def estimate_gib(shape: Shape, config: RunConfig) -> float:
    """Memory at the peak of a step, as capacity.py has it."""
    assert config.context is not None
    needed = memory(shape, config, context=config.context, processes=1)
    return sum(needed.gpu.values()) / 2**30


def measure(
    decoder: Decoder,
    method: str,
    config: RunConfig,
    device: torch.device,
    *,
    steps: int,
    env: dict[str, Any],
) -> Row:
    """The row of a model trained by `method`."""
    config = by_method(config, method)
    torch.manual_seed(0)
    training = _Step(decoder, config, device)
    clock = _Clock(device)
    # The first step compiles, which takes memory of its own.
    training.run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        training.run()
    whole = statistics.median(clock.ms(training.run) for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    parts: dict[str, list[float]] = {"gradient": [], "clip": [], "optimizer": []}
    for _ in range(steps):
        parts["gradient"].append(clock.ms(training.gradient))
        parts["clip"].append(clock.ms(training.clip))
        parts["optimizer"].append(clock.ms(training.update))
    teacher = 0.0
    if training.teacher is not None:
        teacher = statistics.median(clock.ms(training.ask_teacher) for _ in range(steps))
    medians = {name: statistics.median(taken) for name, taken in parts.items()}
    tokens = config.batch_size * training.context
    rate = tokens / whole * 1e3
    shape = training.shape
    flops = flops_per_token(shape, config, context=training.context)
    known_gpu = next((gpu for name, gpu in GPUS.items() if name in env["gpu"].lower()), None)
    return Row(
        model=decoder.name,
        method=method,
        batch_size=config.batch_size,
        context=training.context,
        step_ms=whole,
        gradient_ms=medians["gradient"],
        teacher_ms=teacher,
        clip_ms=medians["clip"],
        optimizer_ms=medians["optimizer"],
        tokens_per_s=rate,
        mfu=rate * flops / known_gpu.flops if known_gpu else 0.0,
        peak_gib=peak,
        estimated_gib=estimate_gib(shape, config),
        kernels=_profile(training.run) if device.type == "cuda" else {},
        run=env["run"],
    )


class _Step:
    """A model, its teacher, its optimizer and random tokens: what a step needs."""

    def __init__(self, decoder: Decoder, config: RunConfig, device: torch.device) -> None:
        assert config.context is not None
        self.context = config.context
        model = LlamaForCausalLM(llama_config(decoder, self.context))
        processes = Processes(rank=0, count=1, device=device)
        layers = layers_of(model, config)
        prepare_head(model, config)
        self.shape = Shape.of(model, config)
        self.teacher = make_teacher(model, config, processes) if config.eta else None
        blocks = torch.randint(decoder.vocab, (64, self.context), dtype=torch.int32)
        stream = BlockStream(blocks, length=1 << 30, seed=0)
        method = method_of(config)
        method.add_layers(model, layers, stream, resumed=False)
        if config.compile:
            compile_blocks(model)
        model.to(device)  # type: ignore[arg-type]  # hidden by a decorator of transformers
        fixed = Fixed(
            steps=10_000,
            context=self.context,
            sequences_per_step=config.batch_size,
            lr=1e-4,
            lambda_=config.lambda_ or 0.0,
            data_sha256="",
            dense_loss=0.0,
        )
        self.optimizer: torch.optim.Optimizer = method.optimizer(model, fixed)
        if config.method == "dense":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.config = config
        self._gradient = Gradient(config, model, self.teacher, stream, processes)
        self._ids = blocks[: config.batch_size].long().to(device)
        self._step = 0

    def run(self) -> None:
        self.gradient()
        self.clip()
        self.update()

    def gradient(self) -> None:
        self._gradient.accumulate(self._step, eta=self.config.eta)
        self._step += 1

    def clip(self) -> None:
        self._gradient.clip()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def ask_teacher(self) -> None:
        assert self.teacher is not None
        self.teacher.targets(self._ids)


class _Clock:
    """Milliseconds of a call, on the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def ms(self, call: Callable[[], None]) -> float:
        if not self.on_gpu:
            begun = time.perf_counter()
            call()
            return (time.perf_counter() - begun) * 1e3
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _profile(call: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one call by kernel, the longest first, and "all others"."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    taken: dict[str, float] = {}
    for event in profile.key_averages():
        taken[event.key[:80]] = taken.get(event.key[:80], 0.0) + event.self_device_time_total / 1e3
    order = sorted(taken.items(), key=lambda item: -item[1])
    others = sum(ms for _, ms in order[KERNELS:])
    return dict(order[:KERNELS]) | {"all others": others}


def show(rows: Sequence[Row]) -> Table:
    """A table of a model's rows."""
    first = rows[0]
    table = Table(title=f"{first.model}: {first.batch_size} x {first.context} tokens")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*cells(row, plain=first))
    return table


def cells(row: Row, *, plain: Row) -> list[str]:
    """A row under HEADER; `plain` is the one that it is measured against."""
    return [
        row.method,
        f"{row.step_ms:.1f}",
        f"{row.step_ms / plain.step_ms:.3f}",
        f"{row.gradient_ms:.1f}",
        f"{row.teacher_ms:.1f}" if row.teacher_ms else "",
        f"{row.clip_ms:.1f}",
        f"{row.optimizer_ms:.1f}",
        f"{row.tokens_per_s:,.0f}",
        f"{row.mfu:.1%}" if row.mfu else "",
        "" if row.peak_gib is None else f"{row.peak_gib:.1f}",
        f"{row.estimated_gib:.1f}",
    ]


def summarize(env: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What the last line says: each model's ratio, and whether the floor holds."""
    steps = {(row.model, row.method): row.step_ms for row in rows}
    ratios = {
        model: ms / steps[model, PLAIN] for (model, method), ms in steps.items() if method == CAST
    }
    return {
        "benchmark": "train",
        "gpu": env["gpu"],
        "commit": env["commit"],
        "most_ratio": MOST_RATIO,
        "ratios": ratios,
        "missed": [model for model, ratio in ratios.items() if ratio > MOST_RATIO],
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
