"""What a run needs of each GPU, and how fast it may be, from the shapes of a model alone.

Memory is what must be there at the peak of a step, by part; activations and the allocator's waste
are estimates. Speed is a roofline: a step takes as long as its arithmetic at a share of the GPU's
peak (the MFU), or as its traffic between GPUs where that is longer, and then the optimizer's pass
over its state. docs/cast-in-practice.md has both against measured runs.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.layers import choose_layers, decoder_blocks

# AdamS reads w, g, mu, nu and a byte of mask and writes w, mu, nu, all fp32.
_OPTIMIZER_BYTES = 29
# Activations of the hidden size that a block keeps a token (Korthikanti et al. 2022, arXiv
# 2205.05198, Eq. 2, in bytes of 16 bits and without attention scores, which flash kernels never
# write).
_ACTIVATIONS = 34
# Of a host with two sockets of eight DDR5 channels each, about half of what they could.
_HOST_BANDWIDTH = 300e9
# Blocks of a sharded model that are whole at once: the one at work and the next.
_BLOCKS_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model counts here; counts are of parameters.

    Attributes:
        parameters: of the student, scales included.
        matmul: that every token is multiplied with: all linears, and lm_head.
        sparse: that get a mask.
        largest_block: of the largest decoder block, or of the embeddings where they are more.
    """

    parameters: int
    matmul: int
    sparse: int
    largest_block: int
    layers: int
    hidden: int

    @classmethod
    def of(cls, model: PreTrainedModel, config: RunConfig) -> "Shape":
        """The shape of a dense model, on any device, "meta" too."""
        text = model.config.get_text_config()
        choices = choose_layers(model, config.nm, scaling_blocks=config.scaling_blocks)
        sparse = [choice for choice in choices if choice.dense_because is None]
        blocks = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)]
        parameters = sum(p.numel() for p in model.parameters())
        head = text.vocab_size * text.hidden_size
        return cls(
            parameters=parameters + sum(one.rows * config.scaling_blocks for one in sparse),
            matmul=sum(blocks) + head,
            sparse=sum(choice.numel for choice in sparse),
            largest_block=max(*blocks, parameters - sum(blocks)),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
        )


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and its link to the others of its host: bytes, and units a second."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    host_link: float


# Data sheets: dense bf16, HBM, NVLink and PCIe in one direction.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", memory=80e9, flops=312e12, bandwidth=2.0e12, link=300e9, host_link=25e9),
        Gpu(name="h100", memory=80e9, flops=989e12, bandwidth=3.35e12, link=450e9, host_link=50e9),
        Gpu(name="h200", memory=141e9, flops=989e12, bandwidth=4.8e12, link=450e9, host_link=50e9),
    )
}


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of that configuration without weights, on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a step, by part: on one GPU, and of the host for that GPU."""

    gpu: dict[str, int]
    host: dict[str, int]


def memory(shape: Shape, config: RunConfig, *, context: int, processes: int) -> Memory:
    """What one of `processes` needs."""
    shards = processes if config.parallel == "fsdp" else 1
    width = 2 if config.compute == "bf16" else 4
    tokens = config.batch_size * context
    kept = shape.layers + _ACTIVATIONS
    if not config.gradient_checkpointing:
        kept = _ACTIVATIONS * shape.layers
    # Of the blocks whose backward pass is still to come: A * W in fp32, and rounded.
    scaled = shape.sparse
    if config.gradient_checkpointing:
        scaled = min(scaled, shape.largest_block)
    at_once = _BLOCKS_AT_ONCE * shape.largest_block if shards > 1 else 0
    state = {
        "fp32 master weights": 4 * shape.parameters // shards,
        "fp32 gradients": 4 * shape.parameters // shards,
        "AdamS moments": 8 * shape.parameters // shards,
        "masks": shape.sparse // shards,
        "teacher": width * shape.parameters // shards if config.eta else 0,
    }
    work = {
        "blocks put together": at_once * (4 + 4 + (width if config.eta else 0)),
        "scaled weights for the backward pass": scaled * (4 if width == 4 else 4 + width),
        "activations (rough)": kept * tokens * shape.hidden * width,
    }
    return Memory(gpu=work, host=state) if config.offload else Memory(gpu=state | work, host={})


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one optimizer step, by what takes them, and its tokens over all GPUs."""

    arithmetic: float
    traffic: float
    optimizer: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (max(self.arithmetic, self.traffic) + self.optimizer)


def flops_per_token(shape: Shape, config: RunConfig, *, context: int) -> int:
    """Of a training step: 2 a multiplication; the teacher's forward pass, and recomputation, too.

    A forward pass is 2 a parameter, a backward pass twice that (Kaplan et al. 2020, arXiv
    2001.08361); causal attention adds 2 * context * hidden a layer to each forward pass.
    """
    forward = 2 * shape.matmul + 2 * shape.layers * shape.hidden * context
    passes = 3 + (config.eta > 0) + config.gradient_checkpointing
    return passes * forward


def speed(
    shape: Shape, config: RunConfig, gpu: Gpu, *, context: int, processes: int, mfu: float
) -> Speed:
    """What a step takes on `processes` of one host's GPUs.

    Args:
        mfu: share of the GPU's peak that the passes reach.
    """
    passes = config.gradient_accumulation
    tokens = config.batch_size * passes * context
    shards = processes if config.parallel == "fsdp" else 1
    others = (processes - 1) / processes
    width = 2 if config.compute == "bf16" else 4
    # Weights are needed for either pass, and gradients made; of the teacher, weights once.
    used = (3 * 4 + (width if config.eta else 0)) * shape.parameters
    if shards > 1:
        traffic = passes * used * others / gpu.link
    else:
        # A ring's all-reduce moves everything twice.
        traffic = 2 * 4 * shape.parameters * others / gpu.link
    pace = gpu.bandwidth
    if config.offload:
        traffic = max(traffic, passes * used / shards / gpu.host_link)
        pace = _HOST_BANDWIDTH / processes
    return Speed(
        arithmetic=tokens * flops_per_token(shape, config, context=context) / (mfu * gpu.flops),
        traffic=traffic,
        optimizer=_OPTIMIZER_BYTES * shape.parameters / shards / pace,
        tokens=tokens * processes,
    )
