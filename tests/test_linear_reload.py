"""Other weights in a layer that runs, through vLLM's own reload, without an engine."""

import gc
import weakref

import pytest
import torch
from torch.nn import Module
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from cast_serve.config import CastConfig, Part
from cast_serve.kernels.packing import pack, unpack
from cast_serve.kernels.pattern import random_mask
from cast_serve.linear import CastLinearMethod
from cast_serve.model_loaders.formats import Format, Scheme
from cast_serve.model_loaders.rounding import dequantize_rows, quantize_rows

N, K = 32, 64
# Of a linear inside of a decoder layer.
NAME = "layers.0.linear"
Tensors = dict[str, torch.Tensor]


def sparse_weight(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N, K // 2, generator=generator)
    return unpack(values, random_mask(N, K, generator))


def stored(form: Format, weight: torch.Tensor) -> Tensors:
    """What a checkpoint has of a layer, in the order of its names."""
    if form in (Format.PLAIN, Format.DENSE):
        return {"weight": weight}
    if form is Format.TRAINING:
        # The scale comes last, as from another file.
        return {"weight": weight, "cast_scale": torch.full((N, 1), 2.0)}
    values, bitmask = pack(weight)
    scales: Tensors = {}
    if form.quantized is not None:
        values, scales["weight_scale"] = quantize_rows(values, form.quantized)
    return {"bitmask": bitmask, "compressed": values, "shape": torch.tensor([N, K]), **scales}


def expected(form: Format, weight: torch.Tensor) -> torch.Tensor:
    if form is Format.TRAINING:
        return 2 * weight
    if form.quantized is not None:
        values, bitmask = pack(weight)
        return unpack(
            dequantize_rows(*quantize_rows(values, form.quantized), weight.dtype), bitmask
        )
    return weight


class Linear(Module):
    def load(self, parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        parameter.data.copy_(tensor)


class Model(Module):
    """One linear of [N, K] as vLLM makes, loads and reloads it."""

    def __init__(self, form: Format, vllm_config: VllmConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.vllm_config = vllm_config
        self.linear = Linear()
        part = Part(name=NAME, sparse=True)
        method = CastLinearMethod(CastConfig(Scheme(format=form)), NAME, (part,))
        method.create_weights(
            *(self.linear, K, [N], K, N, torch.float32),
            weight_loader=self.linear.load,
        )
        if bias:
            self.linear.bias = torch.nn.Parameter(torch.zeros(N), requires_grad=False)
        self.linear.quant_method = method
        record_metadata_for_reloading(self)

    @property
    def method(self) -> CastLinearMethod:
        return self.linear.quant_method

    def receive(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            parameter = getattr(self.linear, name)
            parameter.weight_loader(parameter, tensor)

    def load(self, tensors: Tensors) -> "Model":
        self.receive(tensors)
        self.method.process_weights_after_loading(self.linear)
        return self

    def reload(self, tensors: Tensors) -> None:
        initialize_layerwise_reload(self)
        self.receive(tensors)
        finalize_layerwise_reload(self, self.vllm_config.model_config)

    def assert_runs(self, weight: torch.Tensor) -> None:
        x = torch.randn(3, K, generator=torch.Generator().manual_seed(9))
        answer = self.method.apply(self.linear, x)
        torch.testing.assert_close(answer, torch.nn.functional.linear(x, weight))

    def addresses(self) -> dict[str, int]:
        return {name: p.data_ptr() for name, p in self.linear.named_parameters()}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers stay packed, as on a GPU."""
    monkeypatch.setenv("CAST_SERVE_KERNEL", "reference")


FORMS = [
    Format.PACKED,
    Format.PACKED_FP8,
    Format.DENSE,
    Format.PLAIN,
    Format.TRAINING,
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_other_weights(vllm_config, packed, form):
    """In the tensors that CUDA graphs know."""
    first, second = sparse_weight(1), sparse_weight(2)
    model = Model(form, vllm_config).load(stored(form, first))
    model.assert_runs(expected(form, first))
    before = model.addresses()
    assert list(before) == ["weight_packed", "metadata_0"]
    for weight in (second, first):
        model.reload(stored(form, weight))
        model.assert_runs(expected(form, weight))
        assert model.addresses() == before


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layer_that_runs_dense(vllm_config, form):
    first, second = sparse_weight(1), sparse_weight(2)
    model = Model(form, vllm_config).load(stored(form, first))
    model.reload(stored(form, second))
    model.assert_runs(expected(form, second))


def test_dense_weights_of_a_packed_checkpoint(vllm_config, packed):
    """A trainer sends what it holds."""
    model = Model(Format.PACKED, vllm_config).load(stored(Format.PACKED, sparse_weight(1)))
    model.reload({"weight": sparse_weight(2)})
    model.assert_runs(sparse_weight(2))


def test_sparse_weights_of_a_layer_that_was_dense(vllm_config, packed):
    """It stays in the form for which graphs were captured."""
    dense = torch.randn(N, K)
    model = Model(Format.PLAIN, vllm_config).load({"weight": dense})
    for weight in (sparse_weight(1), dense):
        model.reload({"weight": weight})
        model.assert_runs(weight)
    assert list(model.addresses()) == ["weight"]


def test_dense_weights_of_a_layer_that_runs_packed(vllm_config, packed):
    model = Model(Format.PLAIN, vllm_config).load({"weight": sparse_weight(1)})
    with pytest.raises(ValueError) as raised:
        model.reload({"weight": torch.randn(N, K)})
    assert str(raised.value) == (
        f"{NAME}: not 2:4 in the weights that are reloaded, and {NAME} runs packed; "
        "start a server with them instead"
    )


def test_weights_of_a_layer_that_was_made_up(vllm_config, packed):
    """`--load-format dummy`, and a trainer that sends the weights."""
    vllm_config.load_config.load_format = "dummy"
    model = Model(Format.PACKED, vllm_config).load({})
    model.reload(stored(Format.PACKED, sparse_weight(1)))
    model.assert_runs(sparse_weight(1))


def test_part_that_does_not_come(vllm_config, packed):
    """The bias alone: vLLM has made memory for all of the layer by then."""
    model = Model(Format.PACKED, vllm_config, bias=True)
    model.load(stored(Format.PACKED, sparse_weight(1)))
    model.linear.bias.weight_loader = lambda param, loaded_weight: param.data.copy_(loaded_weight)
    with pytest.raises(ValueError, match="linear: not in the checkpoint, or not whole"):
        model.reload({"bias": torch.ones(N)})


def test_layer_that_is_not_reloaded(vllm_config, packed):
    """Its old tensors are put back."""
    model = Model(Format.PACKED, vllm_config).load(stored(Format.PACKED, sparse_weight(1)))
    before = model.addresses()
    model.reload({})
    model.assert_runs(sparse_weight(1))
    assert model.addresses() == before


def test_load_time_is_that_of_the_start(vllm_config, packed):
    model = Model(Format.PACKED, vllm_config).load(stored(Format.PACKED, sparse_weight(1)))
    ended = model.method.config.loading_ended
    model.reload(stored(Format.PACKED, sparse_weight(2)))
    assert model.method.config.loading_ended == ended


def test_model_that_is_gone_is_not_kept(vllm_config, packed):
    """vLLM records for reloading in a table of the process."""
    model = Model(Format.PACKED, vllm_config).load(stored(Format.PACKED, sparse_weight(1)))
    layer = weakref.ref(model.linear)
    del model
    gc.collect()
    assert layer() is None
