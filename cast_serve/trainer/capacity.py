"""What a run needs of each GPU, and how fast it may be, from the shapes of a model alone.

Memory is what must be there at the peak of a step, by part; activations and the allocator's waste
are estimates. Speed is a roofline: a step takes as long as its arithmetic at a share of the GPU's
peak (the MFU), or as its traffic between GPUs where that is longer, and then the optimizer's pass
over its state; offloaded, also as the host takes to sum gradients. `cast-bench train` measures
memory and speed without offloading.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.distillation.loss import chunk_tokens
from cast_serve.trainer.head import returns_its_head
from cast_serve.trainer.layers import LayerChoice, blocks_name, decoder_blocks, layers_of

# AdamS reads w, g, mu, nu and a byte of mask and writes w, mu, nu, all fp32.
_OPTIMIZER_BYTES = 29
# Of a weight on a CPU (adams/rule.py): what is copied in the same time, measured.
_HOST_OPTIMIZER_BYTES = 70
# A pass adds its gradients to those of the passes before, fp32.
_SUM_BYTES = 12
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
        blocks: of all decoder blocks.
        largest: of the largest one.
        kept: values that a block keeps of a token for its backward pass.
        plain_head: the loss is computed inside of the output head (head.py).
    """

    parameters: int
    matmul: int
    sparse: int
    blocks: int
    largest: int
    kept: int
    layers: int
    hidden: int
    vocabulary: int
    plain_head: bool

    @property
    def head(self) -> int:
        """Of the output head."""
        return self.vocabulary * self.hidden

    @property
    def largest_unit(self) -> int:
        """Of what a sharded model puts together at once: a block, or all that is in none."""
        return max(self.largest, self.parameters - self.blocks)

    @classmethod
    def of(cls, model: PreTrainedModel, config: RunConfig) -> "Shape":
        """The shape of a dense model, on any device, "meta" too."""
        text = model.config.get_text_config()
        linears = layers_of(model, config)
        sparse = [one for one in linears if one.dense_because is None]
        blocks = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)]
        parameters = sum(p.numel() for p in model.parameters())
        learned = config.scaling_blocks if config.learns_scales else 0
        return cls(
            parameters=parameters + sum(one.rows * learned for one in sparse),
            matmul=sum(blocks) + text.vocab_size * text.hidden_size,
            sparse=sum(choice.numel for choice in sparse),
            blocks=sum(blocks),
            largest=max(blocks),
            kept=_kept_of_a_token(model, linears),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            # A model on the meta device cannot be run to find out.
            plain_head=config.loss != "logits"
            and (model.device.type == "meta" or returns_its_head(model)),
        )


def _kept_of_a_token(model: PreTrainedModel, linears: list[LayerChoice]) -> int:
    """Values that a block keeps of a token: what its matrix products read and give.

    The output of every linear, queries and keys once more as they are rotated, and what linears
    read: behind each of two norms, the attention's output, and the input of the MLP's last one.
    Flash kernels never write attention scores. Korthikanti et al. 2022 (arXiv 2205.05198, Eq. 2)
    have 34 bytes a token and hidden dimension for GPT in 16 bits, which are 36 here.
    """
    text = model.config.get_text_config()
    block = [one for one in linears if one.name.startswith(f"{blocks_name(model)}.0.")]
    outputs = sum(one.rows for one in block)
    # None where nothing attends, as in Mamba.
    heads = getattr(text, "num_attention_heads", None) or 0
    head = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    queries = heads * head
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head
    widest = max(one.columns for one in block)
    return outputs + (queries + keys) + 2 * text.hidden_size + queries + widest


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
    """What one of `processes` needs; activations are a rough upper estimate."""
    shards = processes if config.parallel == "fsdp" else 1
    width = 2 if config.compute == "bf16" else 4
    tokens = config.batch_size * context
    # Of the blocks whose backward pass is still to come: activations, and weights as they were
    # multiplied, rounded or scaled.
    activations, weights = shape.layers * shape.kept, shape.matmul if width == 2 else shape.sparse
    if config.gradient_checkpointing:
        activations = shape.layers * shape.hidden + shape.kept
        weights = min(weights, shape.largest + shape.head)
    at_once = _BLOCKS_AT_ONCE * shape.largest_unit if shards > 1 else 0
    moments = "AdamS moments" if config.method == "cast" else "AdamW moments"
    state = {
        "fp32 master weights": 4 * shape.parameters // shards,
        "fp32 gradients": 4 * shape.parameters // shards,
        moments: 8 * shape.parameters // shards,
        "masks": shape.sparse // shards,
    }
    work = {
        "blocks put together": at_once * (4 + 4),
        "weights for the backward pass": width * weights,
        **_loss(shape, config, tokens=tokens, width=width),
        "activations (rough)": width * activations * tokens,
    }
    on_gpu, on_host = _teacher(shape, config, shards=shards, width=width)
    if config.offload:
        return Memory(gpu=work | {"teacher": on_gpu}, host=state | {"teacher": on_host})
    return Memory(gpu=state | {"teacher": on_gpu} | work, host={"teacher": on_host})


def _teacher(shape: Shape, config: RunConfig, *, shards: int, width: int) -> tuple[int, int]:
    """Bytes on one GPU and in host memory."""
    if not config.eta or config.teacher == "cached":
        return 0, 0
    slices, outside = shape.blocks // shards, shape.parameters - shape.blocks
    # Two blocks have room on the device, whose weights are in slices or in host memory.
    room = _BLOCKS_AT_ONCE * shape.largest
    if config.teacher == "offload" or config.offload:
        return width * (room + outside), width * slices
    return width * (slices + outside + (room if shards > 1 else 0)), 0


def _loss(shape: Shape, config: RunConfig, *, tokens: int, width: int) -> dict[str, int]:
    """Bytes of the logits of a chunk and the head's gradient, or of whole logits."""
    models = 2 if config.eta and config.teacher != "cached" else 1
    if not shape.plain_head:
        # And the gradient.
        return {"logits": (models + 1) * tokens * shape.vocabulary * width}
    chunk = chunk_tokens(tokens, vocab=shape.vocabulary, hidden=shape.hidden)
    # Where no kernel works in place, 7 fp32 blocks: logits, log-softmaxes, products, gradient.
    blocks = 7 * 4 if config.teacher == "cached" or width == 4 else models * width
    return {
        "logits of a chunk": blocks * chunk * shape.vocabulary,
        "gradient of the head": 4 * shape.head,
    }


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one optimizer step, by what takes them, and its tokens over all GPUs.

    Attributes:
        host_sums: offloaded gradients of one pass added to those before; the GPU waits for it.
    """

    arithmetic: float
    traffic: float
    host_sums: float
    optimizer: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        seconds = max(self.arithmetic, self.traffic) + self.host_sums + self.optimizer
        return self.tokens / seconds


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
    held = shape.parameters / shards
    host_sums, optimizer = 0.0, _OPTIMIZER_BYTES * held / gpu.bandwidth
    if config.offload:
        pace = _HOST_BANDWIDTH / processes
        traffic = max(traffic, passes * used / shards / gpu.host_link)
        host_sums = (passes - 1) * _SUM_BYTES * held / pace
        optimizer = _HOST_OPTIMIZER_BYTES * held / pace
    return Speed(
        arithmetic=tokens * flops_per_token(shape, config, context=context) / (mfu * gpu.flops),
        traffic=traffic,
        host_sums=host_sums,
        optimizer=optimizer,
        tokens=tokens * processes,
    )
