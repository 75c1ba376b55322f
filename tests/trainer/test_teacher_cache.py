"""The teacher's top tokens: what of the loss they keep, and the files they are kept in."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from cast_serve.trainer import train
from cast_serve.trainer.distillation import teacher_cache
from cast_serve.trainer.distillation.loss import TopK, distillation_loss, top_k_of
from cast_serve.trainer.distillation.teacher import make_teacher
from cast_serve.trainer.distillation.teacher_cache import (
    Origin,
    TeacherCache,
    batch_targets,
    cache_bytes,
)
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.head import put_loss_head
from cast_serve.trainer.journal import read_history
from cast_serve.trainer.processes import ALONE, Processes

QUIET = Console(quiet=True)
CONTEXT, VOCAB = 16, 257


def losses(k, *, temperature=1.0, vocab=200, dtype=torch.float64, spread=4.0):
    """Exact and truncated loss with their gradients, of logits as peaked as a language model's."""
    draw = torch.Generator().manual_seed(k)
    teacher = torch.randn(40, vocab, generator=draw, dtype=torch.float64) * spread
    student = teacher + torch.randn(40, vocab, generator=draw, dtype=torch.float64)
    labels = torch.randint(vocab, (40,), generator=draw)
    labels[5] = -100
    top = top_k_of(teacher.to(dtype), k=k, temperature=temperature)
    found = []
    for known in (teacher, top):
        z = student.clone().requires_grad_()
        loss = distillation_loss(z, known, labels, eta=0.6, temperature=temperature, chunk=7)
        loss.total.backward()
        found.append((loss, z.grad))
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_vocabulary_is_exact(temperature):
    (exact, exact_grad), (found, grad) = losses(200, temperature=temperature)
    assert found.total.item() == pytest.approx(exact.total.item(), abs=1e-9)
    torch.testing.assert_close(grad, exact_grad)


def test_whole_vocabulary_is_exact_in_fp32():
    (exact, _), (found, _) = losses(200, dtype=torch.float32)
    assert found.total.item() == pytest.approx(exact.total.item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_small_k_keeps_the_direction(temperature):
    cosines = []
    for k in (4, 16, 64):
        (exact, exact_grad), (found, grad) = losses(k, temperature=temperature)
        assert found.kl < exact.kl
        assert found.ce == exact.ce
        cosines.append(torch.cosine_similarity(grad.flatten(), exact_grad.flatten(), dim=0).item())
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.98


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 11), temperature=st.floats(0.3, 4), seed=st.integers(0, 999))
def test_top_k_gradient(k, temperature, seed):
    """The written-out gradient against autograd's of the same loss over k + 1 outcomes."""
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(5, 11, generator=draw, dtype=torch.float64) * 3
    z = (torch.randn(5, 11, generator=draw, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.randint(11, (5,), generator=draw)
    whole = (teacher / temperature).softmax(-1)
    p, ids = whole.topk(k)
    q = (z / temperature).softmax(-1)
    rest = torch.ones(5, 11, dtype=torch.bool).scatter(1, ids, False)
    kl = (p * (p / q.gather(1, ids)).log()).sum(-1)
    if k < 11:
        p_rest, q_rest = ((whole * rest).sum(-1), (q * rest).sum(-1))
        kl = kl + p_rest * (p_rest / q_rest).log()
    kl = kl.mean() * temperature**2
    ce = torch.nn.functional.cross_entropy(z, labels)
    (expected,) = torch.autograd.grad(0.6 * kl + 0.4 * ce, z)
    top = TopK.of(teacher, k=k, temperature=temperature)
    loss = distillation_loss(z, top, labels, eta=0.6, temperature=temperature)
    torch.testing.assert_close(loss.kl, kl.detach(), rtol=1e-6, atol=1e-9)
    (found,) = torch.autograd.grad(loss.total, z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_top_k_of_a_certain_teacher():
    """No probability is left for the others, in fp32: no NaN, whatever the student says."""
    teacher = torch.zeros(2, 50)
    teacher[:, 3] = 1000.0
    z = torch.randn(2, 50, requires_grad=True)
    top = TopK.of(teacher, k=4, temperature=1.0)
    loss = distillation_loss(z, top, torch.tensor([3, 4]), eta=1.0)
    loss.total.backward()
    expected = torch.nn.functional.cross_entropy(z, torch.tensor([3, 3]))
    torch.testing.assert_close(loss.kl, expected.detach())
    assert z.grad.isfinite().all()


def test_compiled_top_k():
    draw = torch.Generator().manual_seed(0)
    teacher, z = torch.randn(2, 6, 40, generator=draw).unbind()
    top = TopK.of(teacher, k=8, temperature=1.0)
    labels, z = torch.arange(6), z.requires_grad_()
    found = []
    for compiled in (False, True):
        loss = distillation_loss(z, top, labels, eta=0.5, compiled=compiled)
        found.append((loss.total, *torch.autograd.grad(loss.total, z)))
    torch.testing.assert_close(*found)


@pytest.fixture
def cached(tiny_models, make_config, tmp_path):
    """(cache, teacher, origin, folder) of the tiny Llama."""

    def make(**changes):
        config = make_config(teacher="cached", **({"teacher_top_k": 8} | changes))
        model = tiny_models["llama"]()
        put_loss_head(model)
        origin = Origin.of(config, model, data_sha256="d", context=CONTEXT)
        teacher = make_teacher(model, config, ALONE)
        return TeacherCache(tmp_path / "teacher", origin), teacher, origin, tmp_path / "teacher"

    return make


@pytest.fixture
def sequences(monkeypatch):
    # Three sequences of fp32 values.
    monkeypatch.setattr(teacher_cache, "_SHARD_BYTES", 3 * 900)
    draw = torch.Generator().manual_seed(3)
    return list(torch.randint(VOCAB, (7, CONTEXT), generator=draw))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_cache_holds_what_the_teacher_says(cached, sequences, compute):
    cache, teacher, origin, folder = cached(compute=compute)
    list(cache.fill([*sequences, *sequences], teacher, batch_size=2))
    for store in (cache, TeacherCache(folder, origin)):
        assert list(store.missing(sequences)) == []
        batch = [store.read(ids) for ids in reversed(sequences)]
        found = batch_targets({key: torch.stack([x[key] for x in batch]) for key in batch[0]})
        ids = torch.stack(sequences).flip(0)
        expected = top_k_of(teacher.targets(ids), k=8, temperature=1.0)
        tolerance = {"rtol": 2**-10 if compute == "bf16" else 1e-5, "atol": 1e-4}
        torch.testing.assert_close(found.log_p_TK.float(), expected.log_p_TK.float(), **tolerance)
        torch.testing.assert_close(found.log_rest_T, expected.log_rest_T.float(), **tolerance)
        if compute == "fp32":
            assert torch.equal(found.ids_TK.long(), expected.ids_TK)


def test_cache_size_is_the_plans(cached, sequences, tiny_models, make_config):
    cache, teacher, _, folder = cached(compute="bf16")
    list(cache.fill(sequences, teacher, batch_size=2))
    files = list(folder.glob("*.safetensors"))
    stored = sum(sum(x.nbytes for x in load_file(path).values()) for path in files)
    config = make_config(teacher="cached", teacher_top_k=8, compute="bf16")
    model = tiny_models["llama"]()
    assert cache_bytes(model, config, context=CONTEXT, sequences=7) == stored
    assert stored == 7 * (CONTEXT * (8 * (2 + 2) + 4) + 32)


def test_filling_goes_on_after_the_last_whole_shard(cached, sequences, monkeypatch):
    cache, teacher, origin, folder = cached()
    save, written = teacher_cache.save_file, []

    def fail_at_the_second(tensors, path):
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(teacher_cache, "save_file", fail_at_the_second)
    with pytest.raises(RunError, match=r"cannot write .*No space left.*free space and start again"):
        list(cache.fill(sequences, teacher, batch_size=2))
    again = TeacherCache(folder, origin)
    left = list(again.missing(sequences))
    assert len(left) == 4
    asked = []
    targets = teacher.targets
    monkeypatch.setattr(teacher, "targets", lambda ids: asked.append(ids) or targets(ids))
    list(again.fill(sequences, teacher, batch_size=2))
    assert torch.equal(torch.cat(asked), torch.stack(left))
    assert list(TeacherCache(folder, origin).missing(sequences)) == []


def test_cache_of_another_run_is_refused(cached, sequences):
    cache, teacher, origin, folder = cached()
    list(cache.fill(sequences, teacher, batch_size=2))
    other = dataclasses.replace(origin, model="m", temperature=2.0)
    with pytest.raises(RunError, match="computed with another model, temperature; remove it"):
        TeacherCache(folder, other)
    (folder / "teacher.json").write_text("{")
    with pytest.raises(RunError, match=r"teacher\.json cannot be read"):
        TeacherCache(folder, origin)


def test_damaged_shard_is_named(cached, sequences):
    cache, teacher, origin, folder = cached()
    list(cache.fill(sequences, teacher, batch_size=2))
    (folder / "shard-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(RunError, match=r"shard-00000\.safetensors is damaged.*remove it"):
        TeacherCache(folder, origin)


def test_removed_shard_is_computed_again(cached, sequences):
    cache, teacher, origin, folder = cached()
    list(cache.fill(sequences, teacher, batch_size=2))
    first, *others = sorted(folder.glob("shard-*.safetensors"))
    kept = [path.read_bytes() for path in others]
    assert len(kept) == 2
    first.unlink()
    list(TeacherCache(folder, origin).fill(sequences, teacher, batch_size=2))
    assert [path.read_bytes() for path in others] == kept
    again = TeacherCache(folder, origin)
    assert list(again.missing(sequences)) == []
    for ids in sequences:
        assert torch.equal(again.read(ids)["teacher_ids"], cache.read(ids)["teacher_ids"])


def test_sequence_that_is_not_there(cached, sequences):
    cache, teacher, _, folder = cached()
    list(cache.fill(sequences[1:], teacher, batch_size=2))
    with pytest.raises(RunError, match=f"{folder} holds nothing of a sequence .*--resume"):
        cache.read(sequences[0])


def test_more_than_the_vocabulary(make_config):
    with pytest.raises(RunError, match="teacher_top_k: 300 is more than the vocabulary of 257"):
        train.run(make_config(teacher="cached", teacher_top_k=300, dry_run=True), QUIET)


def test_plan_shows_the_size(make_config, capsys):
    """8 sequences of 32 tokens at 260 bytes, each with its digest."""
    config = make_config(teacher="cached", compute="bf16", dry_run=True, steps=2, lr=1.0)
    train.run(config, Console(width=160))
    shown = capsys.readouterr().out
    assert f"top 64 tokens cached, {8 * (32 * 260 + 32) / 1e3:.3g} kB on disk" in shown
    memory = shown[shown.index("memory of the process") :]
    assert "teacher" not in memory


def run(config):
    train.run(config, QUIET)
    return load_file(config.output / "model.safetensors")


def test_run_with_the_whole_vocabulary_cached(make_config, tmp_path):
    """The same run as with the teacher in memory, up to rounding, and resumable without it."""
    changes = {"allow_short_travel": True, "steps": 4, "save_steps": 2}
    exact = run(make_config(**changes))
    config = make_config(
        **changes, output=tmp_path / "cached", teacher="cached", teacher_top_k=VOCAB
    )
    found = run(config)
    for name, weight in exact.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-5, msg=name)
    assert read_history(config.run_dir)[0]["kl"] < 1e-4
    record = json.loads((config.output / "cast.json").read_text())
    assert record["teacher_top_k"] == VOCAB


def test_processes_wait_for_a_shard_at_a_time(make_config, monkeypatch, capsys):
    """And not for all of the data, which may take longer than they wait."""
    monkeypatch.setattr(teacher_cache, "_SHARD_BYTES", 1)
    waits, on_first = [], Processes.on_first

    def counted(self, work):
        before = len(list(folder.glob("shard-*")))
        found = on_first(self, work)
        waits.append(len(list(folder.glob("shard-*"))) - before)
        return found

    monkeypatch.setattr(Processes, "on_first", counted)
    config = make_config(
        allow_short_travel=True, steps=1, batch_size=3, teacher="cached", teacher_top_k=8
    )
    folder = config.run_dir / "teacher"
    train.run(config, Console())
    assert sum(waits) == 3 and max(waits) == 1
    assert "teacher's top 8: 2 of at most 3 sequences" in capsys.readouterr().out


def test_resumed_run_needs_no_teacher(make_config, monkeypatch):
    config = make_config(
        allow_short_travel=True, steps=4, save_steps=2, teacher="cached", teacher_top_k=8
    )
    first = run(config)
    (config.output / "model.safetensors").unlink()

    def fail(*_):
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(train, "make_teacher", fail)
    shutil.rmtree(config.run_dir / "checkpoint-4")
    second = run(dataclasses.replace(config, resume=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_offloaded_run_is_the_same_run(make_config, tmp_path):
    changes = {"allow_short_travel": True, "steps": 3}
    exact = run(make_config(**changes))
    found = run(make_config(**changes, output=tmp_path / "offload", teacher="offload"))
    assert all(torch.equal(exact[name], found[name]) for name in exact)
