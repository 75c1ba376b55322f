"""What a worker says of the model that it has loaded: an extension class of vLLM's workers."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.nn import Module
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from cast_serve.config import CastConfig
from cast_serve.linear import CastLinearMethod
from cast_serve.model_loaders.layers import dtype_name
from cast_serve.server.facts import Layer
from cast_serve.server.load_failure import tell_of_failures

# Here: vLLM imports this module in every process that loads weights, right before it does.
tell_of_failures()


class CastWorker:
    """Mixed into vLLM's worker class, in every rank's process."""

    # The worker's own; without values, which would hide them.
    model_runner: Any
    vllm_config: Any

    def cast_serve_facts(self) -> dict[str, Any]:
        """The facts of this rank, as `facts.Model.of_ranks` reads them."""
        return describe(self.model_runner.get_model(), self.vllm_config)


def describe(model: Module, vllm_config: Any) -> dict[str, Any]:
    """The facts of the piece of `model` that this rank holds."""
    quantization = vllm_config.quant_config
    stored = vllm_config.model_config.quantization or "dense"
    load_seconds = None
    if isinstance(quantization, CastConfig):
        stored = str(quantization.scheme.format)
        if quantization.loading_began is not None and quantization.loading_ended is not None:
            load_seconds = quantization.loading_ended - quantization.loading_began
    linears = {
        # A layer under LoRA is the base of another.
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
    }
    weights = [weight for module in linears.values() for weight in _weights(module)]
    everything = _bytes(model.parameters())
    return {
        "architecture": vllm_config.model_config.architectures[0],
        "format": stored,
        "dtype": dtype_name(vllm_config.model_config.dtype),
        "device": current_platform.get_device_name(),
        "layers": [asdict(_layer(name, module)) for name, module in linears.items()],
        "other_bytes": everything - _bytes(weights),
        "load_seconds": load_seconds,
    }


def _layer(name: str, module: LinearBase) -> Layer:
    held = list(_weights(module))
    method = module.quant_method
    if isinstance(method, CastLinearMethod):
        shape, zeros, plan = method.shape, method.zeros, method.plan
        linears = tuple(part.name for part in method.parts)
    else:
        shape, zeros, plan = _shape(module), None, None
        linears = (name,)
        if isinstance(module.quant_config, CastConfig):
            linears = tuple(part.name for part in module.quant_config.parts(name))
        # Emptied on a CPU, where vLLM keeps a copy of its own layout.
        if len(held) == 1 and held[0].shape == shape:
            zeros = held[0].numel() - int(held[0].count_nonzero())
    dense_bytes = shape[0] * shape[1] * module.params_dtype.itemsize
    return Layer(
        name=name,
        linears=linears,
        shape=shape,
        ranks=1,
        sparse=isinstance(method, CastLinearMethod) and method.sparse,
        packed=plan is not None,
        zeros=zeros,
        bytes=_bytes(held) or dense_bytes,
        dense_bytes=dense_bytes,
        plan=() if plan is None else tuple((r.max_M, r.kernel, r.config) for r in plan.rows),
    )


def _shape(module: LinearBase) -> tuple[int, int]:
    """[N, K] of this rank; a replicated layer has no sizes per rank."""
    rows = getattr(module, "output_size_per_partition", module.output_size)
    columns = getattr(module, "input_size_per_partition", module.input_size)
    return rows, columns


def _weights(module: Module) -> Iterable[Tensor]:
    return (value for name, value in module.named_parameters(recurse=False) if name != "bias")


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
