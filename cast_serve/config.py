"""CastConfig: what a checkpoint says about its 2:4 layers, as vLLM's QuantizationConfig."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch.nn import Module
from vllm import envs as vllm_envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from cast_serve.model_loaders.checkpoint import CONFIG, WEIGHTS, Checkpoint
from cast_serve.model_loaders.formats import (
    CLASS,
    COMPRESSED_TENSORS,
    PATTERN,
    QUANT_METHOD,
    SPARSITY,
    Format,
    Scheme,
    method_of,
    recognise,
)
from cast_serve.model_loaders.layers import find_layers, require_served, require_whole

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = init_logger(__name__)


# Values of --load-format by which vLLM reads config.json and *.safetensors.
READS_CHECKPOINT = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One linear of the checkpoint inside a vLLM layer: `q_proj` of `qkv_proj`, say."""

    name: str
    sparse: bool


class CastConfig(QuantizationConfig):
    """The scheme of the checkpoint being served.

    Made without arguments for `--quantization cast` on a checkpoint that declares nothing: then
    every linear whose weight turns out to be 2:4 is sparse.
    """

    def __init__(self, scheme: Scheme | None = None) -> None:
        super().__init__()
        self.declared = scheme or Scheme(format=Format.PLAIN)
        # The same by the names of vLLM's modules, and how those come about: a model inside of
        # another maps what is left to it.
        self.scheme = self.declared
        self.mappers: list[WeightsMapper] = []
        # That of config.json, None if it is not on this machine. The weights may be elsewhere.
        self.folder: Path | None = None
        self.in_hub_cache = False
        # What vLLM takes the model for: not what config.json says, of heads that draft tokens.
        self.model_type: str | None = None
        # --download-dir: where weights from the hub are, if not in its cache.
        self.download_dir: str | None = None
        self.headers_read = False
        # vLLM's names of linears that the headers show to stay dense.
        self.dense_by_headers: frozenset[str] = frozenset()
        # Each is said once a model, of the first layer that it is true of.
        self.warnings: set[str] = set()
        # time.monotonic() when the first layer was made, and when the latest one was loaded.
        self.loading_began: float | None = None
        self.loading_ended: float | None = None
        # Of packed layers, [N, K]: the plan of each shape is logged once a model.
        self.logged_shapes: set[tuple[int, int]] = set()

    # vLLM types method names as a Literal of its own ones.
    def get_name(self) -> str:  # type: ignore[override]
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # mma.sp: PTX ISA, "Matrix multiply-accumulate operation using sparse matrix A"

    @staticmethod
    def get_config_filenames() -> list[str]:
        # Empty: vLLM then makes this class without arguments where config.json says nothing.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CastConfig":
        """Read a `quantization_config`.

        Raises:
            CheckpointError: a format, version or sparsity that is not served.
        """
        scheme = recognise({"quantization_config": config}, Path(CONFIG))
        if scheme.format.quantized is not None:
            logger.warning(
                "%s is dequantized while loading and takes the memory of 16-bit 2:4: "
                "there is no kernel for 8-bit values yet",
                scheme.format,
            )
        return cls(scheme)

    @classmethod
    def override_quantization_method(  # type: ignore[override]
        cls,
        hf_quant_cfg: dict[str, Any],
        user_quant: str | None,
        hf_config: Any = None,
    ) -> str | None:
        """Take over 2:4 checkpoints of compressed-tensors, which vLLM itself refuses."""
        if method_of(hf_quant_cfg) != COMPRESSED_TENSORS:
            return None
        sparsity = hf_quant_cfg.get("sparsity_config") or {}
        return QUANT_METHOD if sparsity.get("sparsity_structure") == SPARSITY else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        self.folder = Path(model_name)
        if not self.folder.is_dir():
            self.in_hub_cache = True
            self.folder = _snapshot(model_name, revision)
        self.model_type = getattr(hf_config, "model_type", None)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename what the checkpoint ignores and targets to the names that vLLM's modules have."""
        self.mappers.append(hf_to_vllm_mapper)
        self.scheme = replace(
            self.declared,
            ignore=self._named_by_vllm(self.declared.ignore),
            targets=self._named_by_vllm(self.declared.targets),
        )

    def _named_by_vllm(self, names: Iterable[str]) -> tuple[str, ...]:
        """Modules by vLLM's names; classes and patterns as they are, since a mapper may prefix all.

        A pattern that was written for other names than vLLM's then matches nothing: what it was to
        leave dense, `read_headers` finds.
        """
        found: list[str] = []
        for name in names:
            mapped = [name]
            if name != CLASS and not name.startswith(PATTERN):
                for mapper in self.mappers:
                    mapped = mapper.apply_list(mapped)
            found += mapped
        return tuple(found)

    def checkpoint(self) -> Checkpoint | None:
        """The headers of what is served; None where config.json and weights are not here.

        Nor of a model that config.json does not describe.

        Raises:
            CheckpointError: they are damaged, or do not fit together.
        """
        folder = self.folder
        if folder is None or not (folder / CONFIG).exists() or not any(folder.glob(WEIGHTS)):
            return None
        if self.in_hub_cache and self.download_dir:
            return None
        checkpoint = Checkpoint.open(folder)
        same = self.model_type in (None, checkpoint.config.get("model_type"))
        return checkpoint if same else None

    def read_headers(self) -> None:
        """Check once that the checkpoint is whole, after vLLM has downloaded all of it.

        vLLM does not: of a quantized model it takes what is missing for what need not be there.

        Raises:
            CheckpointError: a tensor is missing, or not as the checkpoint's format has it.
        """
        if self.headers_read:
            return
        self.headers_read = True
        checkpoint = self.checkpoint()
        # Another one is declared by --hf-overrides.
        if checkpoint and recognise(checkpoint.config, checkpoint.path / CONFIG) == self.declared:
            layers = find_layers(checkpoint)
            require_served(checkpoint, layers)
            if layers.scheme.format is Format.PLAIN:
                # Not asked by find_layers: what is served must be whole, not all that is read.
                require_whole(checkpoint, layers)
            dense = (linear.name for linear in layers.linears if not linear.sparse)
            self.dense_by_headers = frozenset(self._named_by_vllm(dense))

    def get_quant_method(self, layer: Module, prefix: str) -> Optional["QuantizeMethodBase"]:
        """CastLinearMethod for a linear with a sparse part; vLLM's own method for all else."""
        if not isinstance(layer, LinearBase):
            return None
        parts = self.parts(prefix)
        if not any(part.sparse for part in parts):
            return UnquantizedLinearMethod()
        if not all(part.sparse for part in parts):
            sparse, dense = (
                ", ".join(part.name for part in parts if part.sparse is wanted)
                for wanted in (True, False)
            )
            self.warn_mixed(prefix, sparse=sparse, dense=dense)
        # linear.py needs this module's Part.
        from cast_serve.linear import CastLinearMethod

        return CastLinearMethod(self, prefix, parts)

    def parts(self, prefix: str) -> tuple[Part, ...]:
        """The checkpoint's linears that vLLM fuses into the layer `prefix`, in vLLM's order."""
        parent, _, leaf = prefix.rpartition(".")
        names = [
            f"{parent}.{part}" if parent else part
            for part in self.packed_modules_mapping.get(leaf, [leaf])
        ]
        return tuple(
            Part(name=name, sparse=self.scheme.why_left_out(name) is None) for name in names
        )

    def warn_mixed(self, layer: str, *, sparse: str, dense: str) -> None:
        """Say that fused layers of which a part is dense run dense as a whole."""
        self._warn_once(
            "%s runs dense: %s is 2:4 and %s is not, and they run as one matrix. "
            "So do other layers like it.",
            layer,
            sparse,
            dense,
        )

    def warn_cut(self, layer: str, columns: int) -> None:
        """Say that layers run dense for how tensor parallelism cuts them."""
        self._warn_once(
            "%s runs dense, and so do other layers like it: %d of its columns are a rank's, "
            "which is no multiple of 8; a smaller --tensor-parallel-size keeps it packed",
            layer,
            columns,
        )

    def warn_not_offloaded(self) -> None:
        """Say that packed layers are not moved to the CPU as was asked."""
        self._warn_once(
            "2:4 layers stay on the GPU: vLLM moves them by names that they have no longer, "
            "with --offload-group-size or VLLM_WEIGHT_OFFLOADING_DISABLE_UVA=1; "
            "--cpu-offload-gb alone moves them"
        )

    def _warn_once(self, message: str, *values: object) -> None:
        if message not in self.warnings:
            self.warnings.add(message)
            logger.warning(message, *values)


def _snapshot(model_name: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache of the Hugging Face hub."""
    if vllm_envs.VLLM_USE_MODELSCOPE:
        return None
    try:
        cached = try_to_load_from_cache(model_name, CONFIG, revision=revision)
    except HFValidationError:
        # No name of a model on the hub, but the URL of one.
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def offloads_by_name(vllm_config: VllmConfig) -> bool:
    """Whether vLLM moves weights to the CPU by the names that parameters have before loading.

    With UVA it moves their memory instead, which a packed layer goes on using.
    """
    offload = vllm_config.offload_config
    by_group = offload.prefetch.offload_group_size > 0 and offload.offload_backend != "uva"
    by_size = offload.uva.cpu_offload_gb > 0 and offload.offload_backend != "prefetch"
    return by_group or (by_size and vllm_envs.VLLM_WEIGHT_OFFLOADING_DISABLE_UVA)
