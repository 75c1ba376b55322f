"""The loss (Eq. 13) and its gradient on one block of logits: what loss.py does chunk by chunk.

    Shapes   z_CV logits of the student, of C tokens; labels_C int64, -100 is ignored
    Teacher  logits t_CV, or a TopK of its distribution, or nothing (eta = 0)
    Dtypes   any floating dtype; computed in fp32 (fp64 logits in fp64), the gradient in z's dtype

With a temperature tau the KL is tau^2 * KL(softmax(t/tau) || softmax(z/tau)), AST's form; Eq. 13
has tau = 1. The gradient, of which the caller gives the factor 1/tokens:

    dL/dz = eta * tau * (softmax(z/tau) - target) + (1-eta) * (softmax(z) - onehot(label))

target is softmax(t/tau). Of a TopK only p_i for i in S and p_r, the probability of all other tokens
together, are known. The KL is then taken over |S| + 1 outcomes, the last one being "none of S",

    KL_k = sum_S p_i log(p_i/q_i) + p_r log(p_r/q_r),   q_r = sum of q outside of S,

which the log-sum inequality bounds by the KL, and which equals it with S the whole vocabulary. Its
target is p_i in S and p_r * q_j/q_r outside: the student's own shape, with the teacher's mass.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn import functional

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The K most likely tokens of the teacher at the run's temperature, and what is left of 1.

    Attributes:
        log_p_TK: log-probabilities, floating.
        ids_TK: tokens, any integer dtype, no two alike in a row.
        log_rest_T: fp32 log of the probability of all others; -inf where there are none.
    """

    log_p_TK: torch.Tensor
    ids_TK: torch.Tensor
    log_rest_T: torch.Tensor

    @classmethod
    def of(cls, logits_TV: torch.Tensor, *, k: int, temperature: float) -> "TopK":
        """The K largest of each row; all values in fp32 or the wider dtype of the logits."""
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        log_p = torch.log_softmax(logits_TV.to(wide) / temperature, dim=-1)
        top = log_p.topk(k, dim=-1)
        # Not log(1 - sum of p): that difference is rounding error where the rest is small.
        rest = log_p.scatter_(-1, top.indices, -torch.inf).logsumexp(-1)
        return cls(log_p_TK=top.values, ids_TK=top.indices, log_rest_T=rest)

    def rows(self, part: slice) -> "TopK":
        return TopK(
            log_p_TK=self.log_p_TK[part],
            ids_TK=self.ids_TK[part],
            log_rest_T=self.log_rest_T[part],
        )


def block_loss(
    z_CV: torch.Tensor,
    teacher: torch.Tensor | TopK | None,
    labels_C: torch.Tensor,
    *,
    eta: float,
    temperature: float,
    scale: torch.Tensor,
    out_CV: torch.Tensor | None,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(CE, KL), each summed over the tokens that are not ignored.

    Args:
        scale: 0-dim, fp32 or wider; the gradient is multiplied by it before it is rounded.
        out_CV: gets the gradient of eta * KL + (1-eta) * CE; may be z_CV itself; None for none.
        compiled: through torch.compile, where no Triton kernel takes the block.
    """
    if _takes_triton(z_CV, teacher):
        from cast_serve.trainer.distillation.triton_kernel import distill_rows

        assert not isinstance(teacher, TopK)
        ce_C, kl_C = distill_rows(
            z_CV, teacher, labels_C, scale, eta=eta, temperature=temperature, out_CV=out_CV
        )
        return ce_C.sum(), kl_C.sum()
    options = (eta, temperature, out_CV is not None)
    if isinstance(teacher, TopK):
        top_k = _compiled_top_k if compiled else _top_k
        ids = teacher.ids_TK.long()
        ce, kl, grad = top_k(
            z_CV, teacher.log_p_TK, ids, teacher.log_rest_T, labels_C, scale, *options
        )
    else:
        dense = _compiled_dense if compiled else _dense
        ce, kl, grad = dense(z_CV, teacher, labels_C, scale, *options)
    if out_CV is not None:
        assert grad is not None
        out_CV.copy_(grad)
    return ce, kl


def _takes_triton(z: torch.Tensor, teacher: torch.Tensor | TopK | None) -> bool:
    return (
        z.is_cuda
        and z.dtype != torch.float64
        and not isinstance(teacher, TopK)
        and find_spec("triton") is not None
    )


def _dense(
    z: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    scale: torch.Tensor,
    eta: float,
    temperature: float,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    z, log_q, log_q1, ce, valid = _student(z, labels, temperature)
    kl, pull = torch.zeros_like(ce), None
    if teacher is not None:
        log_p = torch.log_softmax(teacher.to(z.dtype) / temperature, dim=-1)
        each = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        kl = torch.where(valid, each, 0).sum() * temperature**2
        if want_grad:
            pull = log_q.exp().sub_(log_p.exp_())
    grad = _gradient(pull, log_q1, labels, valid, scale, eta, temperature) if want_grad else None
    return ce, kl, grad


def _top_k(
    z: torch.Tensor,
    log_p: torch.Tensor,
    ids: torch.Tensor,
    rest: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    eta: float,
    temperature: float,
    want_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    z, log_q, log_q1, ce, valid = _student(z, labels, temperature)
    log_p, rest = log_p.to(z.dtype), rest.to(z.dtype)
    # Stored values are rounded: make them sum to 1 again.
    total = torch.logaddexp(log_p.logsumexp(-1), rest)
    log_p, rest = log_p - total.unsqueeze(1), rest - total
    p, p_rest = log_p.exp(), rest.exp()
    on_support = log_q.gather(1, ids)
    log_q_rest = log_q.scatter(1, ids, -torch.inf).logsumexp(-1)
    tail = torch.where(p_rest > 0, p_rest * (rest - log_q_rest), 0)
    # A stored log-probability may be -inf; p log p is 0 there.
    each = torch.where(p > 0, p * (log_p - on_support), 0).sum(-1) + tail
    kl = torch.where(valid, each, 0).sum() * temperature**2
    if not want_grad:
        return ce, kl, None
    # exp(log_q - log_q_rest) is at most 1 outside of the support, and overwritten within.
    outside = log_q.exp() - p_rest.unsqueeze(1) * (log_q - log_q_rest.unsqueeze(1)).exp()
    pull = outside.scatter(1, ids, on_support.exp() - p)
    return ce, kl, _gradient(pull, log_q1, labels, valid, scale, eta, temperature)


# Compiled on the first call, not here.
_compiled_dense = torch.compile(_dense)
_compiled_top_k = torch.compile(_top_k)


def _student(
    z: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, their log-softmax at the temperature and at 1, CE, and which tokens count."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    log_q1 = torch.log_softmax(z, dim=-1)
    log_q = log_q1 if temperature == 1 else torch.log_softmax(z / temperature, dim=-1)
    ce = functional.nll_loss(log_q1, labels, ignore_index=IGNORED, reduction="sum")
    return z, log_q, log_q1, ce, labels != IGNORED


def _gradient(
    pull: torch.Tensor | None,
    log_q1: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    scale: torch.Tensor,
    eta: float,
    temperature: float,
) -> torch.Tensor:
    """scale * dL/dz; `pull` is softmax(z/tau) - target, None without a teacher."""
    grad = log_q1.exp()
    grad.scatter_add_(1, labels.clamp(min=0).unsqueeze(1), -torch.ones_like(grad[:, :1]))
    grad *= 1 - eta
    if pull is not None:
        grad.add_(pull, alpha=eta * temperature)
    grad *= scale
    return torch.where(valid.unsqueeze(1), grad, 0)
