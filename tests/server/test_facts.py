"""Facts of several ranks put together, and the metrics of a model on a GPU."""

import functools
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cast_serve.server import metrics
from cast_serve.server.facts import Model
from cast_serve.server.info import info, versions

PLAN = [[16, "wgmma_sp", "r64-t16"], [512, "wgmma_sp", "r128-t128"], [None, "cusparselt", "a7"]]


def layer(name: str, **changed: Any) -> dict[str, Any]:
    """A piece of 256 x 128 of a packed layer in two bytes a weight."""
    packed = {
        "name": name,
        "linears": [name],
        "shape": [256, 128],
        "ranks": 1,
        "sparse": True,
        "packed": True,
        "zeros": 256 * 64,
        "bytes": 256 * 128 * 9 // 8,
        "dense_bytes": 256 * 128 * 2,
        "plan": PLAN,
    }
    return {**packed, **changed}


DENSE = {"sparse": False, "packed": False, "plan": [], "bytes": 256 * 128 * 2}


def rank(*layers: dict[str, Any], **changed: Any) -> dict[str, Any]:
    facts = {
        "architecture": "LlamaForCausalLM",
        "format": "packed",
        "dtype": "bfloat16",
        "device": "NVIDIA H200",
        "layers": list(layers),
        "other_bytes": 1000,
        "load_seconds": 2.0,
    }
    return {**facts, **changed}


def test_ranks_add_up():
    """Two tensor-parallel ranks of two pipeline stages."""
    model = Model.of_ranks(
        [
            rank(layer("0.up"), load_seconds=2.0),
            rank(layer("0.up", zeros=256 * 128), load_seconds=5.0),
            rank(layer("1.up", **DENSE, zeros=None), load_seconds=3.0),
            rank(layer("1.up", **DENSE, zeros=7), load_seconds=3.0),
        ]
    )
    first, second = model.layers
    assert (first.name, first.ranks, first.shape) == ("0.up", 2, (256, 128))
    assert first.sparsity == 0.75
    assert first.bytes == 2 * 256 * 128 * 9 // 8
    assert (second.name, second.ranks, second.sparsity) == ("1.up", 2, None)
    assert model.ranks == 4
    assert model.load_seconds == 5.0
    assert model.other_bytes == 4000
    assert model.dense_bytes == 4 * 256 * 128 * 2 + 4000
    assert model.bytes == first.bytes + second.bytes + 4000


def test_no_sparse_layers():
    model = Model.of_ranks([rank(layer("0.up", **DENSE), load_seconds=None)])
    assert model.load_seconds is None
    assert model.kernels == {}
    assert info(model, "m")["linears"] == {"sparse": 0, "dense": 1}


@pytest.fixture
def registry(monkeypatch) -> CollectorRegistry:
    """One of the test's own, where the families do not stay."""
    own = CollectorRegistry()
    monkeypatch.setattr(metrics, "Gauge", functools.partial(Gauge, registry=own))
    return own


def test_kernels_by_tokens(registry):
    """One sample a row of the plan, by the row's last number of tokens."""
    unsupported = layer("2.up", shape=[100, 128], packed=False, plan=[])
    model = Model.of_ranks([rank(layer("0.up"), layer("1.up"), unsupported)])
    metrics.expose(model, "m", versions())
    samples = generate_latest(registry).decode()
    for shape, tokens, kernel in (
        ("256x128", "16", "wgmma_sp:r64-t16"),
        ("256x128", "512", "wgmma_sp:r128-t128"),
        ("256x128", "+Inf", "cusparselt:a7"),
        ("100x128", "+Inf", "dense"),
    ):
        labels = f'kernel="{kernel}",layer_shape="{shape}",tokens="{tokens}"'
        assert f"cast_serve_kernel_info{{{labels}}} 1.0" in samples
    assert samples.count("cast_serve_kernel_info{") == 4
    assert 'cast_serve_sparse_layers{held="packed"} 2.0' in samples
    assert 'cast_serve_sparse_layers{held="dense"} 1.0' in samples
