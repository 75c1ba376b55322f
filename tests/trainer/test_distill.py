"""The chunked loss and its written-out gradient against torch's own, in fp64."""

import pytest
import torch
from torch.nn import functional

from cast_serve.trainer.distillation.loss import distillation_loss

TOKENS, VOCAB = 11, 17


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(TOKENS, VOCAB, generator=generator, dtype=dtype) * 3
    teacher = torch.randn(TOKENS, VOCAB, generator=generator, dtype=dtype) * 3
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[[2, 7]] = -100
    return student.requires_grad_(), teacher, labels


def by_torch(student, teacher, labels, eta, temperature):
    valid = labels != -100
    ce = functional.cross_entropy(student, labels)
    kl = functional.kl_div(
        functional.log_softmax(student[valid] / temperature, -1),
        functional.softmax(teacher[valid] / temperature, -1),
        reduction="batchmean",
    )
    kl = kl * temperature**2
    return eta * kl + (1 - eta) * ce, ce, kl


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
def test_distillation_loss(eta, temperature, chunk):
    student, teacher, labels = problem()
    total, ce, kl = by_torch(student, teacher, labels, eta, temperature)
    (expected,) = torch.autograd.grad(total * 5, student)
    loss = distillation_loss(
        student, teacher, labels, eta=eta, temperature=temperature, chunk=chunk
    )
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.ce, ce)
    if eta:
        torch.testing.assert_close(loss.kl, kl)
    (gradient,) = torch.autograd.grad(loss.total * 5, student)
    torch.testing.assert_close(gradient, expected)


def test_distillation_loss_ignored_tokens_have_no_gradient():
    student, teacher, labels = problem()
    distillation_loss(student, teacher, labels, eta=0.5).total.backward()
    assert (student.grad[[2, 7]] == 0).all()
    assert (student.grad[[0, 1]] != 0).all()


def test_distillation_loss_without_eta_ignores_the_teacher():
    student, teacher, labels = problem()
    loss = distillation_loss(student, teacher * torch.nan, labels, eta=0.0)
    assert torch.isfinite(loss.total)
    assert loss.kl == 0


def test_distillation_loss_equal_models_have_no_kl():
    student, _, labels = problem()
    loss = distillation_loss(student, student.detach(), labels, eta=1.0)
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_distillation_loss_bf16_is_computed_in_fp32():
    student, teacher, labels = problem(torch.bfloat16)
    wide = student.detach().double().requires_grad_()
    total, _, _ = by_torch(wide, teacher.double(), labels, 1 / 3, 1.0)
    (expected,) = torch.autograd.grad(total, wide)
    loss = distillation_loss(student, teacher, labels, eta=1 / 3)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-6, atol=1e-6)
    # One rounding of the gradient to bf16 and no more.
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad.double(), expected, rtol=2**-8, atol=1e-7)
