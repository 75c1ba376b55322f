"""CastLinearMethod without an engine: what a loaded layer holds, and what vLLM's caches know."""

from collections.abc import Iterator

import pytest
import torch
from layers import random_packed
from torch.nn import Module
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)

from cast_serve.config import CastConfig, Part
from cast_serve.kernels.packing import unpack
from cast_serve.linear import CastLinearMethod
from cast_serve.model_loaders.formats import Format, Scheme

N, K = 32, 64


def load(vllm_config: VllmConfig, prefix: str = "block.linear") -> tuple[CastLinearMethod, Module]:
    """A layer of which the whole weight has arrived, packed."""
    config = CastConfig(Scheme(format=Format.PACKED))
    layer = Module()
    with set_current_vllm_config(vllm_config):
        method = CastLinearMethod(config, prefix, (Part(name=prefix, sparse=True),))
        method.create_weights(
            *(layer, K, [N], K, N, torch.float32),
            weight_loader=lambda parameter, tensor: parameter.data.copy_(tensor),
        )
        values, mask = random_packed(N, K, torch.float32, "cpu")
        for name, tensor in (("compressed", values), ("bitmask", mask)):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor)
        method.process_weights_after_loading(layer)
    return method, layer


@pytest.fixture
def vllm_config(tmp_path) -> Iterator[VllmConfig]:
    """With a tensor-parallel group of one: vLLM's parameters ask for their rank."""
    config = VllmConfig(load_config=LoadConfig(load_format="auto"))
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel()
        yield config
        cleanup_dist_env_and_memory()


def test_sparse_layer(vllm_config, monkeypatch):
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    method, layer = load(vllm_config)
    held = {name: (tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()}
    assert held == {"weight_packed": ((N, K // 2), False), "metadata_0": ((N, K // 8), False)}
    x, bias = torch.randn(3, K), torch.randn(N)
    dense = unpack(*random_packed(N, K, torch.float32, "cpu"))
    torch.testing.assert_close(
        method.apply(layer, x, bias), torch.nn.functional.linear(x, dense, bias)
    )


def test_config_that_there_is_not(vllm_config, monkeypatch):
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference:fp64")
    with pytest.raises(ValueError, match="reference:fp64: no such config; there is fp32"):
        load(vllm_config)


def test_processing_twice_changes_nothing(vllm_config, monkeypatch):
    """vLLM calls it again after an online reload."""
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    method, layer = load(vllm_config)
    before = dict(layer.named_parameters())
    method.process_weights_after_loading(layer)
    assert dict(layer.named_parameters()) == before


def test_compiled_models_are_kept_apart_by_plan(vllm_config, monkeypatch):
    """vLLM finds a compiled model by the hash of its config: it has to hold what layers hold."""
    plain = vllm_config.compute_hash()
    load(vllm_config)
    assert vllm_config.compute_hash() == plain
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    load(vllm_config)
    one_sparse = vllm_config.compute_hash()
    load(vllm_config, "block.other")
    assert len({plain, one_sparse, vllm_config.compute_hash()}) == 3
