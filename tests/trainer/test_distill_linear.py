"""The loss from hidden states: against logits and autograd, and what it leaves unmaterialised."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cast_serve.trainer.distillation import loss as distill
from cast_serve.trainer.distillation.loss import (
    Projection,
    chunk_tokens,
    distillation_loss,
    linear_distillation_loss,
)

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 11, 17, 6, 10


def problem(dtype=torch.float64, *, tokens=TOKENS, vocab=VOCAB, bias=True):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype)

    student = [normal(tokens, HIDDEN), normal(vocab, HIDDEN), normal(vocab) if bias else None]
    teacher = Projection(
        hidden_TH=normal(tokens, TEACHER_HIDDEN),
        weight_VH=normal(vocab, TEACHER_HIDDEN),
        bias_V=normal(vocab) if bias else None,
    )
    labels = torch.randint(vocab, (tokens,), generator=draw)
    labels[[2, 7]] = -100
    return [x.requires_grad_() if x is not None else None for x in student], teacher, labels


def by_torch(student, teacher, labels, eta, temperature):
    """The same from whole logits, differentiated by autograd."""
    logits = functional.linear(*student)
    valid = labels != -100
    ce = functional.cross_entropy(logits, labels)
    kl = functional.kl_div(
        functional.log_softmax(logits[valid] / temperature, -1),
        functional.softmax(teacher.rows(slice(None))[valid] / temperature, -1),
        reduction="batchmean",
    )
    kl = kl * temperature**2
    return eta * kl + (1 - eta) * ce, ce, kl


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
def test_linear_distillation_loss(eta, temperature, chunk, bias):
    student, teacher, labels = problem(bias=bias)
    inputs = [x for x in student if x is not None]
    total, ce, kl = by_torch(student, teacher, labels, eta, temperature)
    expected = torch.autograd.grad(total * 5, inputs)
    loss = linear_distillation_loss(
        *student, teacher, labels, eta=eta, temperature=temperature, chunk=chunk
    )
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.ce, ce)
    torch.testing.assert_close(loss.kl, kl if eta else torch.zeros_like(kl))
    torch.testing.assert_close(torch.autograd.grad(loss.total * 5, inputs), expected)


def test_linear_distillation_loss_gradcheck():
    student, teacher, labels = problem()

    def total(*inputs):
        return linear_distillation_loss(
            *inputs, teacher, labels, eta=0.4, temperature=1.5, chunk=3
        ).total

    assert torch.autograd.gradcheck(total, student)


def test_linear_distillation_loss_tied_embedding():
    """The head's gradient adds up with the embedding's."""
    (_, weight, _), teacher, labels = problem(bias=False)
    ids = labels.clamp(min=0)
    total, _, _ = by_torch((weight[ids], weight, None), teacher, labels, 0.3, 1.0)
    (expected,) = torch.autograd.grad(total, weight)
    linear_distillation_loss(weight[ids], weight, None, teacher, labels, eta=0.3).total.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_linear_distillation_loss_of_a_frozen_head():
    (hidden, weight, _), teacher, labels = problem(bias=False)
    frozen = weight.detach()
    total, _, _ = by_torch((hidden, frozen, None), teacher, labels, 0.3, 1.0)
    (expected,) = torch.autograd.grad(total, hidden)
    linear_distillation_loss(hidden, frozen, None, teacher, labels, eta=0.3).total.backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_linear_distillation_loss_all_ignored():
    student, teacher, labels = problem()
    loss = linear_distillation_loss(*student, teacher, torch.full_like(labels, -100), eta=0.5)
    loss.total.backward()
    assert loss.total == 0
    assert all((x.grad == 0).all() for x in student)


@pytest.mark.parametrize("tokens", [64, 1000])
def test_linear_distillation_loss_under_autocast(tokens):
    """bf16 products, everything else in fp32: the head's gradient is that of one bf16 product."""
    student, teacher, labels = problem(torch.float32, tokens=tokens, vocab=101)
    wide = [x.detach().double().requires_grad_() for x in student]
    total, _, _ = by_torch(
        wide,
        Projection(
            hidden_TH=teacher.hidden_TH.double(),
            weight_VH=teacher.weight_VH.double(),
            bias_V=teacher.bias_V.double(),
        ),
        labels,
        1 / 3,
        1.0,
    )
    total.backward()
    half = Projection(
        hidden_TH=teacher.hidden_TH.bfloat16(),
        weight_VH=teacher.weight_VH.bfloat16(),
        bias_V=teacher.bias_V.bfloat16(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation_loss(*student, half, labels, eta=1 / 3, chunk=16)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-2)
    for x, exact in zip(student, wide, strict=True):
        assert x.grad.dtype == torch.float32
        error = (x.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 1.5e-2
    # More chunks than 2^8: summed in bf16 the last ones would be lost.
    weight = student[1].grad.clone()
    student[1].grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation_loss(*student, half, labels, eta=1 / 3, chunk=1)
    loss.total.backward()
    torch.testing.assert_close(student[1].grad, weight, rtol=1e-3, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that any operation's result had, by dtype."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements[x.dtype] = max(self.elements.get(x.dtype, 0), x.numel())
        return result


def test_linear_distillation_loss_makes_no_logits(monkeypatch):
    tokens, vocab, chunk = 256, 4096, 16
    monkeypatch.setattr(distill, "CHUNK_BYTES", 4 * vocab * chunk)
    student, teacher, labels = problem(torch.float32, tokens=tokens, vocab=vocab)
    with Largest() as seen:
        linear_distillation_loss(*student, teacher, labels, eta=0.5).total.backward()
    # The whole logits are 16 times as many.
    assert max(seen.elements.values()) == chunk * vocab
    with Largest() as whole:
        by_torch(student, teacher, labels, 0.5, 1.0)[0].backward()
    assert max(whole.elements.values()) >= (tokens - 2) * vocab


def test_distillation_loss_takes_no_more_than_a_chunk_to_fp32(monkeypatch):
    tokens, vocab, chunk = 256, 4096, 8
    monkeypatch.setattr(distill, "CHUNK_BYTES", 4 * vocab * chunk)
    logits = torch.randn(tokens, vocab).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (tokens,))
    with Largest() as seen:
        distillation_loss(logits, logits.detach(), labels, eta=0.5).total.backward()
    assert seen.elements[torch.float32] == chunk * vocab
    assert seen.elements[torch.bfloat16] == tokens * vocab


def test_without_gradient_none_is_computed(monkeypatch):
    monkeypatch.setattr(distill._HeadGradients, "like", None)
    student, teacher, labels = problem()
    with torch.no_grad():
        loss = linear_distillation_loss(*student, teacher, labels, eta=0.5)
    assert not loss.total.requires_grad


@pytest.mark.parametrize(
    ("tokens", "vocab", "hidden", "size"),
    [
        pytest.param(32768, 49152, 576, 512, id="smollm2-135m"),
        pytest.param(8192, 128256, 2048, 1024, id="llama-3.2-1b"),
        pytest.param(7, 50257, 768, 7, id="fewer-than-a-chunk"),
        pytest.param(1021, 2**20, 64, 32, id="prime"),
        pytest.param(0, 100, 8, 1, id="empty"),
    ],
)
def test_chunk_tokens(tokens, vocab, hidden, size):
    assert chunk_tokens(tokens, vocab=vocab, hidden=hidden) == size


def test_compiled_is_the_same_loss():
    student, teacher, labels = problem(torch.float32, tokens=32)
    losses, grads = [], []
    for compiled in (False, True):
        loss = linear_distillation_loss(
            *student, teacher, labels, eta=0.5, temperature=2.0, chunk=16, compiled=compiled
        )
        losses.append(loss.total)
        grads.append(torch.autograd.grad(loss.total, student))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
