"""The loss (Eq. 13): L = eta * KL(P_teacher || P_student) + (1 - eta) * CE, mean over tokens.

    Shapes   logits_TV [tokens, vocab] of either model, labels_T int64; -100 is ignored
    Memory   one [chunk, vocab] block at a time is taken to fp32, forward and backward; the only
             [tokens, vocab] tensor made here is the gradient, in the dtype of the logits.

With a temperature tau the KL is tau^2 * KL(softmax(teacher/tau) || softmax(student/tau)), AST's
form; Eq. 13 has tau = 1. The gradient is written out because autograd would keep several
[tokens, vocab] fp32 tensors alive:

    dL/dz = [eta * tau * (softmax(z/tau) - softmax(z_teacher/tau))
             + (1-eta) * (softmax(z) - onehot(label))] / tokens
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Loss:
    """`total` carries the gradient; `ce` and `kl` are its unweighted parts, for the log."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def distillation_loss(
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor | None,
    labels_T: torch.Tensor,
    *,
    eta: float,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Loss:
    """Eq. 13 over the tokens whose label is not -100.

    Args:
        student_TV: logits of the model in training, any floating dtype.
        teacher_TV: logits of the frozen model; None, and not looked at, with eta = 0.
        chunk: tokens per block taken to fp32 (fp64 logits stay fp64).
    """
    assert eta == 0 or teacher_TV is not None, "eta > 0 needs the teacher's logits"
    teacher = teacher_TV.detach() if teacher_TV is not None and eta > 0 else None
    total, ce, kl = _ChunkedLoss.apply(student_TV, teacher, labels_T, eta, temperature, chunk)
    return Loss(total=total, ce=ce, kl=kl)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, eta, temperature, chunk):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(student, teacher, labels)
        ctx.options = (eta, temperature, chunk)
        wide = torch.promote_types(student.dtype, torch.float32)
        ce = torch.zeros((), dtype=wide, device=student.device)
        kl = torch.zeros_like(ce)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            z, target = student[part].to(wide), labels[part]
            ce += functional.cross_entropy(z, target, ignore_index=IGNORED, reduction="sum")
            if teacher is not None:
                log_q = torch.log_softmax(z / temperature, dim=-1)
                log_p = torch.log_softmax(teacher[part].to(wide) / temperature, dim=-1)
                each = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                kl += torch.where(target != IGNORED, each, 0).sum() * temperature**2
        count = (labels != IGNORED).sum().clamp(min=1)
        ce, kl = ce / count, kl / count
        ctx.mark_non_differentiable(ce, kl)
        return eta * kl + (1 - eta) * ce, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _grad_ce, _grad_kl):  # type: ignore[no-untyped-def]
        student, teacher, labels = ctx.saved_tensors
        eta, temperature, chunk = ctx.options
        wide = torch.promote_types(student.dtype, torch.float32)
        upstream = grad_total.to(wide) / (labels != IGNORED).sum().clamp(min=1)
        grad = torch.empty_like(student)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            z, target = student[part].to(wide), labels[part]
            valid = (target != IGNORED).unsqueeze(1)
            block = torch.softmax(z, dim=-1)
            block.scatter_add_(1, target.clamp(min=0).unsqueeze(1), -torch.ones_like(block[:, :1]))
            block *= 1 - eta
            if teacher is not None:
                q = torch.softmax(z / temperature, dim=-1)
                q -= torch.softmax(teacher[part].to(wide) / temperature, dim=-1)
                block.add_(q, alpha=eta * temperature)
            grad[part] = torch.where(valid, block * upstream, 0)
        return grad, None, None, None, None, None
