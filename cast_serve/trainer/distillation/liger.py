"""The loss through Liger-Kernel's chunked distillation, an alternative to loss.py.

LigerFusedLinearJSDLoss (liger-kernel 0.8.5) with beta = 0 is KL(P_teacher || P_student) over the
tokens whose label is not ignored, and takes the weights of both terms. It lacks the tau^2 of the
KL, which goes into the weight here. It is not the default, because
    - it needs the teacher's hidden states: no top-k, and no loss without a teacher;
    - it sums the head's gradient in the head's dtype (fp32 master weights here), with a product of
      that size a chunk beside the sum;
    - a chunk has 1024 tokens whatever the vocabulary, in several fp32 blocks;
    - its backward pass waits for the GPU, to see whether the incoming gradient is 1.
"""

import torch

from cast_serve.trainer.distillation.loss import Loss, Projection, Targets, linear_distillation_loss


def liger_distillation_loss(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    teacher: Targets | None,
    labels_T: torch.Tensor,
    *,
    eta: float,
    temperature: float = 1.0,
    compiled: bool = False,
) -> Loss:
    """linear_distillation_loss by Liger-Kernel; without a teacher or a gradient, that itself."""
    if teacher is None or not torch.is_grad_enabled():
        return linear_distillation_loss(
            hidden_TH,
            weight_VH,
            bias_V,
            teacher,
            labels_T,
            eta=eta,
            temperature=temperature,
            compiled=compiled,
        )
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    assert isinstance(teacher, Projection), "Liger-Kernel needs the teacher's hidden states"
    loss = LigerFusedLinearJSDLoss(
        beta=0.0,
        weight_hard_loss=1 - eta,
        weight_soft_loss=eta * temperature**2,
        temperature=temperature,
        compiled=compiled,
        return_soft_hard_loss=True,
    )
    total, soft, hard = loss(
        hidden_TH,
        weight_VH,
        teacher.hidden_TH,
        teacher.weight_VH,
        labels_T,
        bias_V,
        teacher.bias_V,
    )
    return Loss(total=total, ce=hard.detach(), kl=soft.detach() * temperature**2)
