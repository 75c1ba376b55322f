"""The loss (Eq. 13): L = eta * KL(P_teacher || P_student) + (1 - eta) * CE, mean over tokens.

    linear_distillation_loss   from the last hidden states: no [tokens, vocab] tensor exists
    distillation_loss          from logits, for models that change them after their head

Both go through the tokens in chunks (block.py) and compute the gradient with the loss, because
autograd would keep several [tokens, vocab] fp32 tensors alive between the two. The first makes the
logits of a chunk, turns them into their gradient, multiplies that into the gradients of the hidden
states and of the head, fp32, and forgets it.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from cast_serve.trainer.distillation.block import IGNORED, TopK, block_loss

__all__ = [
    "IGNORED",
    "Loss",
    "Projection",
    "Targets",
    "TopK",
    "distillation_loss",
    "linear_distillation_loss",
    "top_k_of",
]

# Of one chunk's logits, were they fp32. More saves kernel launches, less saves memory.
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class Loss:
    """`total` carries the gradient; `ce` and `kl` are its unweighted parts, for the log."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Logits not yet computed: hidden_TH @ weight_VH.T + bias_V, without gradient."""

    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None

    def rows(self, part: slice) -> torch.Tensor:
        hidden = self.hidden_TH[part].to(self.weight_VH.dtype)
        return torch.nn.functional.linear(hidden, self.weight_VH, self.bias_V)


# What is known of the teacher: logits [tokens, vocab], what they are computed from, or their top.
Targets = torch.Tensor | Projection | TopK


def distillation_loss(
    student_TV: torch.Tensor,
    teacher: Targets | None,
    labels_T: torch.Tensor,
    *,
    eta: float,
    temperature: float = 1.0,
    chunk: int | None = None,
    compiled: bool = False,
) -> Loss:
    """Eq. 13 over the tokens whose label is not -100.

    Args:
        student_TV: logits of the model in training, any floating dtype.
        teacher: of the frozen model; None, and not looked at, with eta = 0.
        chunk: tokens per block taken to fp32 (fp64 logits stay fp64); None for CHUNK_BYTES.
        compiled: blocks go through torch.compile, where there is no Triton kernel for them.
    """
    assert eta == 0 or teacher is not None, "eta > 0 needs the teacher"
    options = _Options(eta=eta, temperature=temperature, chunk=chunk, compiled=compiled)
    known = teacher if eta > 0 else None
    with_grad = torch.is_grad_enabled() and student_TV.requires_grad
    total, ce, kl = _LogitsLoss.apply(student_TV, known, labels_T, options, with_grad)
    return Loss(total=total, ce=ce, kl=kl)


def linear_distillation_loss(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    teacher: Targets | None,
    labels_T: torch.Tensor,
    *,
    eta: float,
    temperature: float = 1.0,
    chunk: int | None = None,
    compiled: bool = False,
) -> Loss:
    """distillation_loss of the logits hidden_TH @ weight_VH.T + bias_V.

    Logits are computed in autocast's dtype where autocast is on, else in that of the arguments; the
    gradient of the head is summed up in fp32, whatever the dtype (fp64 in fp64). Under autocast,
    as with any linear layer, the weight is rounded for the product alone.
    """
    assert eta == 0 or teacher is not None, "eta > 0 needs the teacher"
    options = _Options(eta=eta, temperature=temperature, chunk=chunk, compiled=compiled)
    inputs = (hidden_TH, weight_VH, bias_V)
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    known = teacher if eta > 0 else None
    total, ce, kl = _LinearLoss.apply(*inputs, known, labels_T, options, with_grad)
    return Loss(total=total, ce=ce, kl=kl)


def top_k_of(teacher: torch.Tensor | Projection, *, k: int, temperature: float) -> TopK:
    """The top k of every row of logits, chunk by chunk."""
    if isinstance(teacher, Projection):
        tokens, vocab = len(teacher.hidden_TH), len(teacher.weight_VH)
    else:
        tokens, vocab = teacher.shape
    found = []
    for part in _parts(tokens, vocab=vocab):
        logits = _rows(teacher, part)
        assert isinstance(logits, torch.Tensor)
        found.append(TopK.of(logits, k=k, temperature=temperature))
    return TopK(
        log_p_TK=torch.cat([top.log_p_TK for top in found]),
        ids_TK=torch.cat([top.ids_TK for top in found]),
        log_rest_T=torch.cat([top.log_rest_T for top in found]),
    )


def chunk_tokens(tokens: int, *, vocab: int, hidden: int = 0) -> int:
    """Tokens a chunk: near CHUNK_BYTES, chunks of equal size where they come out even.

    Where the head is large a chunk has half as many tokens as the hidden states have dimensions:
    its fp32 logits are then half of the head's gradient, which is there anyway and is read and
    written once a chunk.
    """
    most = max(1, CHUNK_BYTES // (4 * vocab), hidden // 2)
    least = math.ceil(tokens / most)
    count = next((n for n in range(least, 2 * least) if tokens % n == 0), least)
    return math.ceil(tokens / count) if count else 1


@dataclass(frozen=True, kw_only=True)
class _Options:
    eta: float
    temperature: float
    chunk: int | None
    compiled: bool

    def block(
        self,
        z: torch.Tensor,
        teacher: Targets | None,
        labels: torch.Tensor,
        part: slice,
        factor: torch.Tensor,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """CE and KL of one chunk, their share in the means; `out` gets the gradient."""
        sums = block_loss(
            z,
            _rows(teacher, part),
            labels[part],
            eta=self.eta,
            temperature=self.temperature,
            scale=factor,
            out_CV=out,
            compiled=self.compiled,
        )
        return torch.stack(sums) * factor

    def total(self, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """L, CE and KL."""
        ce, kl = means.clone().unbind()
        return self.eta * kl + (1 - self.eta) * ce, ce, kl


def _parts(tokens: int, *, vocab: int, hidden: int = 0, chunk: int | None = None) -> list[slice]:
    size = chunk or chunk_tokens(tokens, vocab=vocab, hidden=hidden)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _rows(teacher: Targets | None, part: slice) -> torch.Tensor | TopK | None:
    """What is known of some tokens; a Projection's logits are computed."""
    if teacher is None or isinstance(teacher, torch.Tensor):
        return None if teacher is None else teacher[part]
    return teacher.rows(part)


def _mean_factor(labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 / tokens that count, 0-dim on the device: reading it would wait for the GPU."""
    return 1 / (labels != IGNORED).sum().clamp(min=1).to(dtype)


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, options, with_grad):  # type: ignore[no-untyped-def]
        tokens, vocab = student.shape
        grad = torch.empty_like(student) if with_grad else None
        factor = _mean_factor(labels, torch.promote_types(student.dtype, torch.float32))
        means = torch.zeros(2, dtype=factor.dtype, device=student.device)
        ctx.parts = _parts(tokens, vocab=vocab, chunk=options.chunk)
        for part in ctx.parts:
            out = grad[part] if grad is not None else None
            means += options.block(student[part], teacher, labels, part, factor, out)
        ctx.save_for_backward(grad)
        total, ce, kl = options.total(means)
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _grad_ce, _grad_kl):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        scaled = torch.empty_like(grad)
        for part in ctx.parts:
            scaled[part] = _scaled(grad[part], grad_total)
        return scaled, None, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, labels, options, with_grad):  # type: ignore[no-untyped-def]
        device = hidden.device.type
        # Decided before autocast is turned off: what follows chooses its dtypes itself.
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        factor = _mean_factor(labels, torch.promote_types(dtype, torch.float32))
        means = torch.zeros(2, dtype=factor.dtype, device=hidden.device)
        grads = _HeadGradients.like(hidden, weight, bias, dtype) if with_grad else None
        with torch.autocast(device, enabled=False):
            rounded = weight.to(dtype)
            rounded_bias = bias.to(dtype) if bias is not None else None
            vocab, width = weight.shape
            for part in _parts(len(hidden), vocab=vocab, hidden=width, chunk=options.chunk):
                h = hidden[part].to(dtype)
                z = torch.nn.functional.linear(h, rounded, rounded_bias)
                out = z if with_grad else None
                means += options.block(z, teacher, labels, part, factor, out)
                if grads is not None:
                    # z is its gradient now.
                    grads.add(z, h, rounded, part)
        if grads is not None:
            ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        total, ce, kl = options.total(means)
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _grad_ce, _grad_kl):  # type: ignore[no-untyped-def]
        grads = (_scaled(g, grad_total) if g is not None else None for g in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _scaled(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad * factor in fp32 or wider: a 0-dim factor would be rounded to the gradient's dtype."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32)) * factor


@dataclass(frozen=True, kw_only=True)
class _HeadGradients:
    """Gradients of the mean loss, filled chunk by chunk: `hidden` [T, H] in the dtype of the
    products, `weight` [V, H] and `bias` [V] fp32 or wider; None where a bias is missing."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def like(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> "_HeadGradients":
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            hidden=torch.empty_like(hidden, dtype=dtype),
            weight=torch.zeros_like(weight, dtype=wide),
            bias=torch.zeros_like(bias, dtype=wide) if bias is not None else None,
        )

    def add(
        self, grad_CV: torch.Tensor, h_CH: torch.Tensor, weight_VH: torch.Tensor, part: slice
    ) -> None:
        torch.mm(grad_CV, weight_VH, out=self.hidden[part])
        if self.weight.dtype == grad_CV.dtype:
            self.weight.addmm_(grad_CV.t(), h_CH)
        elif grad_CV.is_cuda:
            # Products in bf16, their sum over chunks in fp32, in one call.
            wide, out = self.weight.dtype, self.weight
            torch.addmm(self.weight, grad_CV.t(), h_CH, out_dtype=wide, out=out)
        else:
            self.weight.addmm_(grad_CV.t().to(self.weight.dtype), h_CH.to(self.weight.dtype))
        if self.bias is not None:
            self.bias.add_(grad_CV.sum(0, dtype=self.bias.dtype))
