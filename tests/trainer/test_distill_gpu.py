"""The loss, its memory and the offloaded teacher on a GPU, at the sizes of real models.

The loss alone, timed: `python tests/trainer/test_distill_gpu.py` prints milliseconds and peak
memory of forward and backward, by Triton, by torch.compile and from whole logits.
"""

import pytest
import torch

from cast_serve.trainer.distillation import block as distill_block
from cast_serve.trainer.distillation.loss import (
    Projection,
    TopK,
    chunk_tokens,
    distillation_loss,
    linear_distillation_loss,
)

pytestmark = pytest.mark.gpu

SMOLLM2_135M = (32768, 49152, 576)
LLAMA_1B = (8192, 128256, 2048)


def problem(tokens, vocab, hidden, *, dtype=torch.bfloat16):
    """fp32 master weights and a bf16 teacher near the student."""
    draw = torch.Generator("cuda").manual_seed(0)
    student = torch.randn(tokens, hidden, device="cuda", generator=draw)
    weight = torch.randn(vocab, hidden, device="cuda", generator=draw) * 2 / hidden**0.5
    noise = torch.randn(tokens, hidden, device="cuda", generator=draw)
    teacher = Projection(
        hidden_TH=(student + 0.3 * noise).to(dtype), weight_VH=weight.clone().to(dtype)
    )
    labels = torch.randint(vocab, (tokens,), device="cuda", generator=draw)
    labels[::100] = -100
    return student.to(dtype).requires_grad_(), weight.requires_grad_(), teacher, labels


def run(student, weight, teacher, labels, **options):
    student.grad = weight.grad = None
    with torch.autocast("cuda", torch.bfloat16, enabled=student.dtype == torch.bfloat16):
        loss = linear_distillation_loss(
            student, weight, None, teacher, labels, **({"eta": 1 / 3} | options)
        )
    loss.total.backward()
    return loss, student.grad, weight.grad


def whole(student, weight, teacher, labels, **options):
    """The same from logits that exist as a whole."""
    student.grad = weight.grad = None
    with torch.autocast("cuda", torch.bfloat16, enabled=student.dtype == torch.bfloat16):
        logits = torch.nn.functional.linear(student, weight)
    targets = teacher.rows(slice(None)) if isinstance(teacher, Projection) else teacher
    loss = distillation_loss(logits, targets, labels, **({"eta": 1 / 3} | options))
    loss.total.backward()
    return loss, student.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("eta", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("vocab", [50257, 128256])
def test_triton_is_torch(monkeypatch, vocab, eta, temperature):
    options = {"eta": eta, "temperature": temperature, "chunk": 128}
    inputs = problem(300, vocab, 64, dtype=torch.float32)
    found, *grads = run(*inputs, **options)
    monkeypatch.setattr(distill_block, "_takes_triton", lambda *_: False)
    expected, *exact = run(*inputs, **options)
    torch.testing.assert_close(
        (found.total, found.ce, found.kl),
        (expected.total, expected.ce, expected.kl),
        rtol=1e-5,
        atol=1e-5,
    )
    for grad, reference in zip(grads, exact, strict=True):
        assert (grad - reference).norm() <= 1e-4 * reference.norm()


@pytest.mark.parametrize("vocab", [50257, 49152])
def test_bf16_is_as_exact_as_whole_logits(vocab):
    """Against fp32: no further off than twice what one bf16 product each is."""
    inputs = problem(2048, vocab, 576)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs[:2]]
    exact_teacher = Projection(
        hidden_TH=inputs[2].hidden_TH.float(), weight_VH=inputs[2].weight_VH.float()
    )
    exact, *exact_grads = whole(*exact_inputs, exact_teacher, inputs[3])
    found, *grads = run(*inputs, chunk=256)
    plain, *plain_grads = whole(*inputs)
    assert abs(found.total - exact.total) <= 2 * abs(plain.total - exact.total) + 1e-4
    for grad, other, reference in zip(grads, plain_grads, exact_grads, strict=True):
        error, allowed = (
            ((x.float() - reference).norm() / reference.norm()).item() for x in (grad, other)
        )
        assert error <= 2 * allowed + 1e-4


@pytest.mark.parametrize("size", [SMOLLM2_135M, LLAMA_1B])
def test_peak_memory(size):
    """Two bf16 blocks of a chunk, the gradients, and the rounded head: no [tokens, vocab]."""
    tokens, vocab, hidden = size
    inputs = problem(*size)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    used = torch.cuda.max_memory_allocated() - before
    blocks = 2 * 2 * chunk_tokens(tokens, vocab=vocab, hidden=hidden) * vocab
    # In the backward pass the head's gradient is there before and after its scaling.
    head = (4 + 4 + 2) * vocab * hidden
    states = (2 + 2 + 4) * tokens * hidden
    assert used <= 1.1 * (blocks + head + states)


def test_top_k_on_the_gpu():
    student, weight, teacher, labels = problem(512, 50257, 64, dtype=torch.float32)
    top = TopK.of(teacher.rows(slice(None)), k=64, temperature=1.0)
    on_cpu = TopK(
        log_p_TK=top.log_p_TK.cpu(), ids_TK=top.ids_TK.cpu(), log_rest_T=top.log_rest_T.cpu()
    )
    cpu = [x.detach().cpu().requires_grad_() for x in (student, weight)]
    loss = linear_distillation_loss(*cpu, None, on_cpu, labels.cpu(), eta=0.5)
    loss.total.backward()
    for compiled in (False, True):
        found, *grads = run(student, weight, top, labels, eta=0.5, compiled=compiled)
        assert found.total.item() == pytest.approx(loss.total.item(), rel=1e-5)
        for grad, reference in zip(grads, (x.grad for x in cpu), strict=True):
            assert (grad.cpu() - reference).norm() <= 1e-3 * reference.norm()


def test_offloaded_teacher(make_config, tiny_models):
    """Copies overlap with the work on a stream of their own: many passes, all the same."""
    from cast_serve.trainer.distillation.teacher import make_teacher
    from cast_serve.trainer.head import put_loss_head
    from cast_serve.trainer.processes import Processes

    model = tiny_models["llama"](num_hidden_layers=7, hidden_size=256, intermediate_size=1024)
    put_loss_head(model)
    device = torch.device("cuda")
    resident, offloaded = (
        make_teacher(
            model,
            make_config(teacher=place, compute="bf16"),
            Processes(rank=0, count=1, device=device),
        )
        for place in ("resident", "offload")
    )
    for seed in range(20):
        ids = torch.randint(257, (8, 64), generator=torch.Generator().manual_seed(seed)).cuda()
        expected, found = resident.targets(ids), offloaded.targets(ids)
        assert torch.equal(found.hidden_TH, expected.hidden_TH)


def timed(step, *inputs, **options) -> tuple[float, float]:
    """Median milliseconds of 10 runs after 3, and peak GiB."""
    for _ in range(3):
        step(*inputs, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(*inputs, **options)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[5], (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    triton = distill_block._takes_triton
    for size in (SMOLLM2_135M, LLAMA_1B):
        inputs = problem(*size)
        chunk = chunk_tokens(size[0], vocab=size[1], hidden=size[2])
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, T V H = {size}")
        for name, step, options in (
            (f"triton, chunks of {chunk}", run, {}),
            (f"triton, chunks of {2 * chunk}", run, {"chunk": 2 * chunk}),
            (f"triton, chunks of {4 * chunk}", run, {"chunk": 4 * chunk}),
            ("triton, no teacher", run, {"eta": 0.0}),
            ("torch.compile", run, {"compiled": True}),
            ("torch", run, {}),
            ("whole logits", whole, {}),
        ):
            by_torch = name.startswith("torch")
            distill_block._takes_triton = (lambda *_: False) if by_torch else triton
            milliseconds, peak = timed(step, *inputs, **options)
            print(f"  {name:24} {milliseconds:8.2f} ms   {peak:6.2f} GiB")


if __name__ == "__main__":
    main()
