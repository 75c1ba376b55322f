"""CastLinearMethod: a vLLM linear layer read from a 2:4 checkpoint.

While loading, a layer holds `compressed` [N, K/2] and `bitmask` uint8 [N, K/8] of its own
tensor-parallel rank, whatever the checkpoint stores. Every name under which a checkpoint may store
a part is an inlet of the layer: what arrives there is turned into values and bitmask and handed to
vLLM's own loader for those two, so vLLM cuts fused and sharded layers and at most one dense layer
exists at a time. A layer of which a part is dense holds `weight` [N, K] instead; packed parts are
unpacked on arrival.

Once loaded, a sparse layer on a GPU holds `weight_packed` [N, K/2] (a name by which vLLM's LoRA
finds a layer's device) and `metadata_0`, ...: the arguments of cast_serve::linear_2of4. On a CPU,
where vLLM's own linear is faster, and for shapes that no kernel supports, it holds `weight` [N, K].

A reload (vllm/model_executor/model_loader/reload) puts the inlets back, first on the meta device,
and calls each loader twice: to count what it would load, and to load it. What comes out is copied
into the tensors that the layer ran with, so the layer stays in the form that it took first.
"""

import math
import time
import weakref
from collections.abc import Callable
from typing import NoReturn

import torch
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.platforms import current_platform

from cast_serve.config import READS_CHECKPOINT, CastConfig, Part, offloads_by_name
from cast_serve.inlets import INLETS, count, empty_inlet, loaded_into, unread
from cast_serve.kernels.op import linear_2of4
from cast_serve.kernels.packing import COLUMNS_PER_BYTE, PatternError, keeps_two, pack, unpack
from cast_serve.kernels.pattern import random_mask
from cast_serve.kernels.plan import Plan
from cast_serve.kernels.prepare import FATAL
from cast_serve.kernels.problem import Problem
from cast_serve.kernels.selection import warm_ahead
from cast_serve.kernels.weight import SparseWeight, build
from cast_serve.layer_plan import plan_layer
from cast_serve.model_loaders.formats import Format
from cast_serve.model_loaders.layers import find_layers, why_by_place
from cast_serve.model_loaders.rounding import dequantize_rows
from cast_serve.model_loaders.stream import load_linear, prune_fold_pack

# vLLM names the part of a fused layer: "q", "k", "v", or its index; None is the whole layer.
PartId = str | int | tuple[int, ...] | None

_QKV = {"q": 0, "k": 1, "v": 2}

# Of the kernels that torch.compile makes between the linears: each may be launched before the one
# ahead of it has ended, waits for that before it reads what it wrote, and then lets the next one be
# launched (CUDA C++ Programming Guide, "Programmatic Dependent Launch"). Our linears do the same,
# so their weights are on the way while the norm before them runs; kernels/README.md, "Fusions",
# says what that gains. Before Hopper torch.compile leaves it out. Users turn it off with
# --compilation-config '{"inductor_compile_config": {"triton.enable_pdl": false}}'.
_DEPENDENT_LAUNCH = "triton.enable_pdl"


@register_weight_loader_v2_supported_method
class CastLinearMethod(LinearMethodBase):
    """Loads one (possibly fused) linear layer of a 2:4 checkpoint and runs it.

    Once loaded, the layer is one call of the sparse op, or vLLM's own unquantized linear.
    """

    def __init__(self, config: CastConfig, prefix: str, parts: tuple[Part, ...]) -> None:
        vllm_config = get_current_vllm_config()
        self.config = config
        self.prefix = prefix
        self.parts = parts
        self.sparse = all(part.sparse for part in parts)
        self.dense_linear = UnquantizedLinearMethod()
        self.load_format = vllm_config.load_config.load_format
        config.download_dir = vllm_config.load_config.download_dir
        self.additional_config = vllm_config.additional_config
        self.offloaded_by_name = offloads_by_name(vllm_config)
        if self.sparse and current_platform.is_cuda():
            # Here, because vLLM copies what it compiles with as soon as the model is built.
            options = vllm_config.compilation_config.inductor_compile_config
            options.setdefault(_DEPENDENT_LAUNCH, True)
        # Names of the op's metadata on the layer; empty: the layer runs dense.
        self.metadata_names: tuple[str, ...] = ()
        # Matrices that vLLM puts side by side in the layer; ids of parts count those.
        self.slots = len(parts)
        # Of this rank: [N, K], zeros among its weights once loaded, and what runs it; None: dense.
        self.shape = (0, 0)
        self.zeros = 0
        self.plan: Plan | None = None
        # Tensors of a part that has not arrived whole, by inlet.
        self.waiting: dict[PartId, dict[str, torch.Tensor]] = {}
        self.missing = {part.name for part in parts}
        self.finished = False
        self.reloading = False
        if config.loading_began is None:
            config.loading_began = time.monotonic()

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Callable[..., None],
    ) -> None:
        """Register what the layer holds while loading, and its inlets.

        Raises:
            ValueError: K is cut where no bitmask byte ends.
        """
        self.slots = len(output_partition_sizes)
        rows, columns = self.shape = sum(output_partition_sizes), input_size_per_partition
        if self.sparse and columns % COLUMNS_PER_BYTE:
            if self.config.scheme.format is not Format.PLAIN:
                raise ValueError(
                    f"{self.prefix}: K={input_size} over {input_size // columns} ranks is "
                    f"{columns} columns a rank, not a multiple of {COLUMNS_PER_BYTE}; "
                    "use a smaller --tensor-parallel-size"
                )
            if columns < input_size:
                self.config.warn_cut(self.prefix, columns)
            self.sparse = False
        self.layer = layer
        self.load_part = extra_weight_attrs["weight_loader"]
        self.dtype = params_dtype
        self.loaded_into = loaded_into(columns, sparse=self.sparse)
        if self.sparse and current_platform.is_cuda():
            # While vLLM loads, a freed block of 20 MiB or more is given away whole, to whatever is
            # a little smaller: 25 MiB of an 8B model were lost in what its rotary tables had left.
            torch.cuda.empty_cache()
        for name in INLETS:
            data = empty_inlet(name, params_dtype, rows=rows, columns=self.loaded_into.get(name))
            self.device = data.device
            parameter = ModelWeightParameter(
                data=data, input_dim=1, output_dim=0, weight_loader=self._loader(name)
            )
            layer.register_parameter(name, parameter)
        if self.sparse and self.config.scheme.format is not Format.PLAIN:
            self._begin_kernels()

    def _begin_kernels(self) -> None:
        """Make them ready beside the loading, once it is known that the layer needs any."""
        if current_platform.is_cuda():
            rows, columns = self.shape
            warm_ahead(Problem.on(self.device, N=rows, K=columns, dtype=self.dtype), self.device)

    def _loader(self, inlet: str) -> Callable[..., None]:
        # vLLM keeps loaders for ever, and through them would keep a layer that is long gone.
        method = weakref.ref(self)

        def receive(param: Parameter, loaded_weight: torch.Tensor, part_id: PartId = None) -> None:
            if param.is_meta:
                count(inlet)
                return
            loading = method()
            assert loading is not None, f"{inlet} of a layer that is gone"
            loading._receive(inlet, loaded_weight, part_id)

        return receive

    def _inlet(self, name: str) -> Parameter:
        """Of the layer as it is now: a reload makes other tensors."""
        return self.layer.get_parameter(name)

    def _begin_reload(self) -> None:
        """The layer holds inlets again, whose memory nobody has written to."""
        self.reloading, self.finished = True, False
        self.sparse = "bitmask" in self.loaded_into
        self.missing = {part.name for part in self.parts}
        for name in self.loaded_into:
            self._inlet(name).data.fill_(unread(name))

    def process_weights_after_loading(self, layer: Module) -> None:
        """Turn the layer into what it runs as.

        Raises:
            ValueError: a part of the layer was not in the checkpoint, or CAST_SERVE_KERNEL names a
                kernel that does not run it.
        """
        if not hasattr(layer, "bitmask"):
            # An inlet: without them there is nothing to turn.
            return
        if self.finished:
            self._begin_reload()
        self.finished = True
        self._read_headers()
        # Training checkpoints may have no scales at all: then nothing followed the weight.
        for part_id, waiting in list(self.waiting.items()):
            if "weight" in waiting:
                self._load(waiting, part_id)
        self.waiting.clear()
        # None of the tensors that vLLM makes up comes through a loader, and those of a reload do.
        dummies = self.load_format == "dummy" and not self.reloading
        if dummies and self.sparse:
            # Random, as a model's: of one pattern alone, kernels would take less power.
            bitmask = self._inlet("bitmask").data
            generator = torch.Generator(bitmask.device).manual_seed(0)
            rows, columns = len(bitmask), COLUMNS_PER_BYTE * bitmask.shape[1]
            bitmask.copy_(random_mask(rows, columns, generator))
        elif self.missing and not dummies:
            raise ValueError(
                f"{', '.join(sorted(self.missing))}: not in the checkpoint, or not whole"
            )
        held = {inlet: self._inlet(inlet).data for inlet in INLETS}
        for inlet in INLETS:
            delattr(layer, inlet)
        if self.sparse:
            self._check(held["compressed"], held["bitmask"])
            if not self.reloading:
                self.plan = plan_layer(held["compressed"], self.config)
        elif not held["weight"].isfinite().all():
            self._refuse(None, f"a weight is NaN or infinite, or overflows {self.dtype}")
        stored = held["compressed" if self.sparse else "weight"]
        self.zeros = math.prod(self.shape) - int(stored.count_nonzero())
        if self.plan is not None:
            values, bitmask = held["compressed"], held["bitmask"]
            weight = build(values, bitmask, self.plan.layouts, reuse_mask=True)
            self._hold_sparse(layer, weight)
        else:
            dense = unpack(held["compressed"], held["bitmask"]) if self.sparse else held["weight"]
            layer.weight = Parameter(dense, requires_grad=False)
            self.dense_linear.process_weights_after_loading(layer)
        if not self.reloading:
            self.config.loading_ended = time.monotonic()

    def _hold_sparse(self, layer: Module, weight: SparseWeight) -> None:
        if self.offloaded_by_name:
            self.config.warn_not_offloaded()
        named = {f"metadata_{index}": tensor for index, tensor in enumerate(weight.metadata)}
        self.metadata_names = tuple(named)
        for name, tensor in {"weight_packed": weight.values, **named}.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        # vLLM keeps compiled models under a hash of its config, in which the plan is not: without
        # this, one compiled for another plan would be given these tensors.
        if isinstance(self.additional_config, dict):
            traced = self.additional_config.setdefault("cast_serve", {})
            traced[self.prefix] = [
                f"{tensor.dtype}{list(tensor.shape)}" for tensor in named.values()
            ]

    def apply(
        self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not self.metadata_names:
            return self.dense_linear.apply(layer, x, bias)
        metadata = [getattr(layer, name) for name in self.metadata_names]
        return linear_2of4(x, layer.weight_packed, metadata, bias)

    def _receive(self, inlet: str, tensor: torch.Tensor, part_id: PartId) -> None:
        """Keep `tensor` until its part of the layer is whole, then load the part."""
        if self.finished:
            self._begin_reload()
        self._read_headers()
        if inlet == "shape":
            # It says nothing that the others do not, and to keep it keeps the file mapped.
            return
        waiting = self.waiting.setdefault(part_id, {})
        waiting[inlet] = tensor
        if "compressed" in waiting:
            quantized = self.config.scheme.format.quantized is not None
            whole = "bitmask" in waiting and ("weight_scale" in waiting or not quantized)
        elif self._is_declared_sparse(part_id, Format.TRAINING):
            whole = "weight" in waiting and "cast_scale" in waiting
        else:
            whole = "weight" in waiting
        if whole:
            self._load(self.waiting.pop(part_id), part_id)

    def _read_headers(self) -> None:
        if not self.reloading and self.load_format in READS_CHECKPOINT:
            self.config.read_headers()

    def _load(self, part: dict[str, torch.Tensor], part_id: PartId) -> None:
        packed = self._packed(part, part_id)
        if self.sparse and packed is None:
            self._become_dense(part_id)
        if packed is None:
            self._pass_on("weight", part["weight"], part_id)
        elif self.sparse:
            self._begin_kernels()
            values, bitmask = packed
            self._pass_on("compressed", values, part_id)
            self._pass_on("bitmask", bitmask, part_id)
        else:
            self._pass_on("weight", unpack(*packed), part_id)
        self.missing -= {part.name for part in self._named(part_id)}

    def _packed(
        self, part: dict[str, torch.Tensor], part_id: PartId
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Values [N, K/2] and bitmask [N, K/8] of a whole part; None if the part is dense."""
        stored = self.config.scheme.format
        if "compressed" in part:
            packed = part["compressed"], part["bitmask"]
            if stored.quantized:
                packed = self._dequantized(part, part_id), part["bitmask"]
            # Else it is checked with the whole layer, once this rank's piece is on its device.
            if not self.sparse:
                self._check(*packed, part_id)
            return packed
        if not self._is_declared_sparse(part_id, stored) or stored is Format.CT_BITMASK:
            return None
        # What is sparse already, or has a scale, was meant to be.
        if self.plan is None and "cast_scale" not in part and self._is_left_dense(part_id):
            return None
        if stored is Format.PLAIN and part["weight"].shape[-1] % COLUMNS_PER_BYTE:
            return None
        weight = part["weight"].to(self.device)
        if not weight.isfinite().all():
            self._refuse(part_id, "a weight is NaN or infinite")
        if stored is Format.TRAINING:
            scale = part.get("cast_scale")
            if scale is not None:
                scale = scale.to(self.device)
            return prune_fold_pack(weight, scale, self.dtype)
        try:
            return pack(weight)
        except PatternError as error:
            if stored is not Format.PLAIN:
                self._refuse(part_id, str(error))
            return None

    def _dequantized(self, part: dict[str, torch.Tensor], part_id: PartId) -> torch.Tensor:
        """Values [N, K/2] of a part that is stored in 8 bits, in the model's dtype."""
        scale = part["weight_scale"].to(self.device)
        if not (scale.isfinite() & (scale > 0)).all():
            self._refuse(part_id, "a scale is not finite and above 0")
        return dequantize_rows(part["compressed"].to(self.device), scale, self.dtype)

    def _become_dense(self, part_id: PartId) -> None:
        """A part turned out dense: unpack what has been loaded of the others."""
        dense = ", ".join(part.name for part in self._named(part_id))
        if self.plan is not None:
            raise ValueError(
                f"{dense}: not 2:4 in the weights that are reloaded, and {self.prefix} runs "
                "packed; start a server with them instead"
            )
        others = [part.name for part in self.parts if part.name not in self.missing]
        if others:
            self.config.warn_mixed(self.prefix, sparse=", ".join(others), dense=dense)
        compressed, bitmask = self._inlet("compressed"), self._inlet("bitmask")
        self._check(compressed.data, bitmask.data)
        self.sparse = False
        # .data, not new parameters: the model's loader holds on to these.
        self._inlet("weight").data = unpack(compressed.data, bitmask.data)
        compressed.data = compressed.data.new_empty(0)
        bitmask.data = bitmask.data.new_empty(0)

    def _pass_on(self, inlet: str, tensor: torch.Tensor, part_id: PartId) -> None:
        """Let vLLM cut this rank's piece of the part out of `tensor`, into its place."""
        parameter = self._inlet(inlet)
        try:
            if part_id is None:
                self.load_part(parameter, tensor)
            else:
                self.load_part(parameter, tensor, part_id)
        except FATAL:
            raise
        except (RuntimeError, AssertionError) as error:
            names = ", ".join(part.name for part in self._named(part_id))
            raise ValueError(
                f"{names}: {list(tensor.shape)} in the checkpoint does not fit the model's "
                f"{list(parameter.shape)} a rank; config.json is of another model"
            ) from error

    def _check(self, values: torch.Tensor, bitmask: torch.Tensor, part_id: PartId = None) -> None:
        """Refuse what no writer of 2:4 checkpoints makes."""
        if not (keeps_two(bitmask).all() & values.isfinite().all()):
            self._refuse(part_id, "damaged values or bitmask")

    def _refuse(self, part_id: PartId, reason: str) -> NoReturn:
        """Raise the error of the checkpoint's own reader, which names file, row and column."""
        names = {part.name for part in self._named(part_id)}
        # What is reloaded may come from anywhere.
        checkpoint = None if self.reloading else self.config.checkpoint()
        if checkpoint is not None:
            layers = find_layers(checkpoint)
            for linear in layers.linears:
                if linear.name in names and linear.sparse:
                    load_linear(checkpoint, layers.scheme.format, linear, dtype=self.dtype)
        raise ValueError(f"{', '.join(sorted(names))}: {reason}")

    def _named(self, part_id: PartId) -> tuple[Part, ...]:
        """The parts that vLLM calls `part_id`; all of them if the checkpoint stores them fused."""
        if part_id is None or len(self.parts) == 1:
            return self.parts
        ids = part_id if isinstance(part_id, tuple) else (part_id,)
        slots = [_QKV[one] if isinstance(one, str) else one for one in ids]
        if len(self.parts) == self.slots:
            return tuple(self.parts[slot] for slot in slots)
        # A linear may fill several slots, as q, k and v of Qwen3.5 do, beside z. Where it is
        # neither the first nor the last one, nothing says which it is.
        begins, ends = 0 in slots, self.slots - 1 in slots
        if begins == ends:
            return self.parts
        return self.parts[:1] if begins else self.parts[-1:]

    def _is_left_dense(self, part_id: PartId) -> bool:
        """Whether a part that is stored dense is not to be sparse, whatever config.json says."""
        # vLLM gives a few linears no name, which says nothing of their place.
        return all(
            (part.name and why_by_place(part.name)) or part.name in self.config.dense_by_headers
            for part in self._named(part_id)
        )

    def _is_declared_sparse(self, part_id: PartId, stored: Format) -> bool:
        return self.config.scheme.format is stored and all(
            part.sparse for part in self._named(part_id)
        )
