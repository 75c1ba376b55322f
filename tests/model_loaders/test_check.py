from collections.abc import Callable
from typing import Any

import pytest
import torch

from cast_serve.model_loaders.check import check
from cast_serve.model_loaders.checkpoint import Checkpoint
from cast_serve.model_loaders.stream import PackedLinear, stream
from cast_serve.model_loaders.summary import summarise

FORMATS = ["packed", "dense", "training", "ct-bitmask", "ct-dense", "plain"]
Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
Make = Callable[[str], Any]


@pytest.mark.parametrize("stored", FORMATS)
def test_check_good(make: Make, stored: str) -> None:
    folder = make(stored).save()
    findings = {finding.name: finding for finding in check(Checkpoint.open(folder.path))}
    assert findings.keys() == {*folder.expected, "lm_head"}
    assert all(finding.problem is None and not finding.faulty for finding in findings.values())
    for name, weight in folder.expected.items():
        assert findings[name].groups == weight.numel() // 4
    assert findings["lm_head"].why_dense == "outside the layers"


def test_check_goes_on_after_a_fault(make: Make) -> None:
    folder = make("dense")
    folder.tensors[Q0 + ".weight"][3:5, :8] = 1.0
    folder.tensors[Q1 + ".weight"][0, 0] = float("nan")
    folder.tensors["model.norm.weight"][1] = float("inf")
    folder.save()
    problems = [f for f in check(Checkpoint.open(folder.path), limit=3) if f.problem]
    assert [finding.name for finding in problems] == [Q0, Q1, "model.norm.weight"]
    assert problems[0].faulty == 4
    assert [(o.row, o.column) for o in problems[0].first] == [(3, 0), (3, 4), (4, 0)]
    file = folder.path / "model.safetensors"
    assert all((finding.problem or "").startswith(f"{file}: ") for finding in problems)


def test_check_plain_reports_without_problem(make: Make) -> None:
    folder = make("plain")
    folder.tensors[Q0 + ".weight"] = torch.ones(32, 32)
    findings = {f.name: f for f in check(Checkpoint.open(folder.save().path))}
    assert findings[Q0].problem is None and findings[Q0].faulty == 256
    assert (findings[Q0].why_dense or "").startswith("not 2:4: 256 of 256 groups")


@pytest.mark.parametrize("stored", FORMATS)
def test_summarise(make: Make, stored: str) -> None:
    folder = make(stored).save()
    checkpoint = Checkpoint.open(folder.path)
    summary = summarise(checkpoint)
    assert {linear.name for linear in summary.sparse} == set(folder.expected)
    assert {linear.name for linear in summary.dense} == {"lm_head"}
    assert summary.stored_bytes == sum(t.nbytes for t in folder.tensors.values())
    assert summary.needs_flag is (stored == "plain")
    # Headers against what streaming really gives.
    items = list(stream(checkpoint))
    loaded = sum(
        i.values.nbytes + i.bitmask.nbytes if isinstance(i, PackedLinear) else i.tensor.nbytes
        for i in items
    )
    assert summary.loaded_bytes == loaded
    rest = summary.stored_bytes - sum(linear.stored_bytes for linear in summary.sparse)
    itemsize = summary.sparse[0].dtype.itemsize
    sparse = sum(weight.numel() for weight in folder.expected.values())
    assert summary.dense_bytes == rest + sparse * itemsize
    if stored in ("packed", "ct-bitmask"):
        # 8 bytes for each of the two sizes in X.shape.
        assert summary.stored_bytes == rest + sparse * itemsize * 9 // 16 + 16 * 8


def test_summarise_reads_no_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("packed").save()

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    assert len(summarise(Checkpoint.open(folder.path)).sparse) == 8
