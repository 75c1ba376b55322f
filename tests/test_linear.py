"""CastLinearMethod without an engine: what a loaded layer holds, and what vLLM's caches know."""

from collections.abc import Callable

import pytest
import torch
from layers import random_packed
from torch.nn import Module, Parameter
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.offload import OffloadConfig

from cast_serve import config as config_module
from cast_serve.config import CastConfig, Part
from cast_serve.kernels.packing import unpack
from cast_serve.kernels.pattern import nm_mask
from cast_serve.linear import CastLinearMethod
from cast_serve.model_loaders.formats import Format, Scheme

N, K = 32, 64
STORED_DENSE = [Format.DENSE, Format.CT_DENSE, Format.TRAINING, Format.PACKED]


def made(
    vllm_config: VllmConfig,
    stored: Format = Format.PACKED,
    *,
    prefix: str = "layers.0.linear",
    columns: int = K,
    dtype: torch.dtype = torch.float32,
    weight_loader: Callable[[Parameter, torch.Tensor], object] | None = None,
) -> tuple[CastLinearMethod, Module]:
    """A layer of which nothing has arrived."""
    layer = Module()
    with set_current_vllm_config(vllm_config):
        part = Part(name=prefix, sparse=True)
        method = CastLinearMethod(CastConfig(Scheme(format=stored)), prefix, (part,))
        method.create_weights(
            *(layer, columns, [N], columns, N, dtype),
            weight_loader=weight_loader or (lambda into, tensor: into.data.copy_(tensor)),
        )
    return method, layer


def receive(layer: Module, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)


def load(
    vllm_config: VllmConfig, prefix: str = "layers.0.linear"
) -> tuple[CastLinearMethod, Module]:
    """A layer of which the whole weight has arrived, packed."""
    method, layer = made(vllm_config, prefix=prefix)
    values, mask = random_packed(N, K, torch.float32, "cpu")
    receive(layer, compressed=values, bitmask=mask)
    method.process_weights_after_loading(layer)
    return method, layer


def assert_is_dense(method: CastLinearMethod, layer: Module, weight: torch.Tensor) -> None:
    assert not method.sparse
    # Not by what it holds: vLLM keeps a layout of its own on a CPU.
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(method.apply(layer, x), torch.nn.functional.linear(x, weight))


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
    """Without what a reload puts back there is nothing to process."""
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
    load(vllm_config, "layers.0.other")
    assert len({plain, one_sparse, vllm_config.compute_hash()}) == 3


def test_plain_layer_whose_width_no_bitmask_byte_divides(vllm_config):
    """Of a vision tower, say."""
    method, layer = made(vllm_config, Format.PLAIN, columns=60)
    weight = torch.randn(N, 60)
    receive(layer, weight=weight)
    method.process_weights_after_loading(layer)
    assert_is_dense(method, layer, weight)


def test_a_part_of_several_matrices(vllm_config, monkeypatch):
    """q, k and v of Qwen3.5's linear attention are one linear of the checkpoint, z is another."""
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    rows = {(0, 1, 2): slice(24), 3: slice(24, N)}
    parts = (Part(name="in_proj_qkv", sparse=True), Part(name="in_proj_z", sparse=True))
    layer = Module()
    with set_current_vllm_config(vllm_config):
        method = CastLinearMethod(CastConfig(Scheme(format=Format.PACKED)), "in_proj_qkvz", parts)
        method.create_weights(
            *(layer, K, [8, 8, 8, 8], K, N, torch.float32),
            weight_loader=lambda into, tensor, part_id: into.data[rows[part_id]].copy_(tensor),
        )
    values, mask = random_packed(N, K, torch.float32, "cpu")
    missing = []
    for part_id, own in rows.items():
        for inlet, tensor in (("compressed", values), ("bitmask", mask)):
            parameter = layer.get_parameter(inlet)
            parameter.weight_loader(parameter, tensor[own], part_id)
        missing.append(set(method.missing))
    assert missing == [{"in_proj_z"}, set()]
    method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight_packed, values)


def test_plain_layer_that_ranks_cut_too_narrow(vllm_config, caplog):
    with set_current_vllm_config(vllm_config):
        method = CastLinearMethod(
            CastConfig(), "layers.0.down_proj", (Part(name="layers.0.down_proj", sparse=True),)
        )
        method.create_weights(
            *(Module(), 12, [N], 24, N, torch.float32), weight_loader=lambda into, tensor: None
        )
    assert not method.sparse
    assert "layers.0.down_proj runs dense" in caplog.text
    assert "12 of its columns are a rank's" in caplog.text


def test_dense_weight_that_overflows_the_dtype(vllm_config):
    """Of a layer that turns out not to be 2:4: vLLM would serve infinity."""
    method, layer = made(vllm_config, Format.PLAIN, dtype=torch.float16)
    receive(layer, weight=torch.full((N, K), 1e6))
    with pytest.raises(ValueError, match=r"layers.0.linear: .*overflows torch.float16"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("prefix", ["projector.linear_1", "model.layers.0.mlp.gate"])
@pytest.mark.parametrize("stored", STORED_DENSE)
def test_what_no_checkpoint_has_sparse_stays_dense(vllm_config, stored, prefix):
    """As `cast-model check` has it, in `ignore` or not."""
    method, layer = made(vllm_config, stored, prefix=prefix)
    weight = torch.randn(N, K)
    receive(layer, weight=weight)
    method.process_weights_after_loading(layer)
    assert_is_dense(method, layer, weight)


@pytest.mark.parametrize("stored", STORED_DENSE)
def test_what_the_headers_show_to_be_dense_stays_so(vllm_config, monkeypatch, stored):
    """By a pattern of the checkpoint's names, which are not vLLM's."""
    name = "visual.blocks.0.attn.qkv"
    method, layer = made(vllm_config, stored, prefix=name)

    def read_headers() -> None:
        method.config.dense_by_headers = frozenset([name])

    monkeypatch.setattr(method.config, "read_headers", read_headers)
    weight = torch.randn(N, K)
    receive(layer, weight=weight)
    method.process_weights_after_loading(layer)
    assert_is_dense(method, layer, weight)


@pytest.mark.parametrize("prefix", ["", "projector.linear_1"])
def test_training_weight_with_a_scale_is_pruned(vllm_config, prefix):
    """Wherever it is, and where vLLM has no name for it."""
    method, layer = made(vllm_config, Format.TRAINING, prefix=prefix)
    weight = torch.randn(N, K)
    receive(layer, weight=weight, cast_scale=torch.full((N, 1), 2.0))
    assert method.sparse
    expected = 2 * weight * nm_mask(weight)
    assert torch.equal(unpack(layer.compressed, layer.bitmask), expected)


def test_want_of_memory_is_not_blamed_on_shapes(vllm_config):
    def load_part(into: Parameter, tensor: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, layer = made(vllm_config, weight_loader=load_part)
    values, mask = random_packed(N, K, torch.float32, "cpu")
    with pytest.raises(torch.OutOfMemoryError):
        receive(layer, compressed=values, bitmask=mask)


def test_nothing_of_the_checkpoint_is_kept(vllm_config):
    """A tensor of the file, however small, keeps all of it mapped."""
    method, layer = made(vllm_config)
    values, mask = random_packed(N, K, torch.float32, "cpu")
    receive(layer, compressed=values, bitmask=mask, shape=torch.tensor([N, K]))
    assert not method.waiting


def test_nothing_that_belongs_to_no_part_is_kept(vllm_config):
    method, layer = made(vllm_config, Format.PLAIN)
    receive(layer, weight=torch.ones(N, K), cast_scale=torch.ones(N, 1))
    method.process_weights_after_loading(layer)
    assert not method.waiting


PREFETCH = {"prefetch": {"offload_group_size": 4}}
UVA = {"uva": {"cpu_offload_gb": 1}}


@pytest.mark.parametrize(
    ("options", "without_uva", "warned"),
    [
        pytest.param(PREFETCH, "0", True, id="prefetch"),
        pytest.param({**PREFETCH, **UVA}, "0", True, id="both"),
        pytest.param(UVA, "1", True, id="without UVA"),
        pytest.param(UVA, "0", False, id="UVA"),
        pytest.param({**PREFETCH, **UVA, "offload_backend": "uva"}, "0", False, id="prefetch off"),
        pytest.param({}, "1", False, id="none"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*offload:UserWarning")
def test_offloading_that_misses_the_weights(
    vllm_config, monkeypatch, caplog, options, without_uva, warned
):
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")
    monkeypatch.setenv("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", without_uva)
    monkeypatch.setattr(config_module.logger, "propagate", True)
    vllm_config.offload_config = OffloadConfig(**options)
    load(vllm_config)
    said = [record.getMessage() for record in caplog.records if "offload" in record.getMessage()]
    assert said == warned * [
        "2:4 layers stay on the GPU: vLLM moves them by names that they have no longer, with "
        "--offload-group-size or VLLM_WEIGHT_OFFLOADING_DISABLE_UVA=1; --cpu-offload-gb alone "
        "moves them"
    ]
