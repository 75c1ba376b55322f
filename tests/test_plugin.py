"""The plugin's entry point: light, idempotent, and what it says of a config.json."""

import subprocess
import sys

import pytest

from cast_serve.model_loaders.errors import CheckpointError


def test_import_loads_neither_torch_nor_vllm():
    program = "import cast_serve, sys; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


REGISTER_TWICE = """
import logging
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from cast_serve import register
register()
register()
assert QUANTIZATION_METHODS.count("cast") == 1
assert get_quantization_config("cast").__module__ == "cast_serve.config"
assert len(logging.getLogger("cast_serve").handlers) == 1
"""


def test_register_is_idempotent():
    # In a process of its own: this one may have registered it.
    subprocess.run([sys.executable, "-c", REGISTER_TWICE], check=True)


def compressed_tensors(**sparsity: object) -> dict:
    return {"quant_method": "compressed-tensors", "sparsity_config": sparsity}


@pytest.mark.parametrize(
    ("declared", "taken"),
    [
        (compressed_tensors(sparsity_structure="2:4", format="sparse-24-bitmask"), "cast"),
        (compressed_tensors(sparsity_structure="2:4", format="dense"), "cast"),
        (compressed_tensors(sparsity_structure="unstructured", format="sparse-bitmask"), None),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
        ({"quant_method": "awq"}, None),
        ({"quant_method": "fp8"}, None),
    ],
)
def test_takes_over_only_2of4(declared, taken):
    from cast_serve.config import CastConfig

    assert CastConfig.override_quantization_method(declared, None) == taken


def test_unknown_version_is_refused():
    from cast_serve.config import CastConfig

    declared = {"quant_method": "cast", "format": "packed", "sparsity": "2:4", "version": 9}
    with pytest.raises(CheckpointError, match=r"config\.json: .*version 9 is not 1"):
        CastConfig.from_config(declared)


def test_fused_parts_are_named_as_in_the_checkpoint():
    from cast_serve.config import CastConfig

    config = CastConfig.from_config(
        {
            "quant_method": "cast",
            "format": "packed",
            "sparsity": "2:4",
            "version": 1,
            "ignore": ["model.layers.0.self_attn.k_proj"],
        }
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    parts = config.parts("model.layers.0.self_attn.qkv_proj")
    assert [(part.name.rpartition(".")[2], part.sparse) for part in parts] == [
        ("q_proj", True),
        ("k_proj", False),
        ("v_proj", True),
    ]
    assert [part.name for part in config.parts("model.layers.0.mlp.down_proj")] == [
        "model.layers.0.mlp.down_proj"
    ]


def test_names_are_those_of_the_modules_that_vllm_makes():
    """A model inside of another has other names there; "Linear" is a class and has no other."""
    from vllm.model_executor.models.utils import WeightsMapper

    from cast_serve.config import CastConfig

    sparsity = {"sparsity_structure": "2:4", "format": "dense", "ignore": ["model.lm.k_proj"]}
    for targets, sparse in ((["Linear"], True), (["model.lm.q_proj"], True), (["model.o"], False)):
        declared = compressed_tensors(**sparsity, targets=targets)
        config = CastConfig.from_config(declared)
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.lm.": "language."}))
        found = {name: config.parts(f"language.{name}")[0].sparse for name in ("q_proj", "k_proj")}
        assert found == {"q_proj": sparse, "k_proj": False}, targets


def test_model_inside_of_another_maps_what_is_left():
    """vLLM has the outer model's mapper applied, and then the inner one's."""
    from vllm.model_executor.models.utils import WeightsMapper

    from cast_serve.config import CastConfig

    sparsity = {"sparsity_structure": "2:4", "format": "dense", "ignore": ["model.lm.o.k_proj"]}
    config = CastConfig.from_config(compressed_tensors(**sparsity, targets=["Linear"]))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.lm.": "language."}))
    config.apply_vllm_mapper(WeightsMapper())
    assert not config.parts("language.o.k_proj")[0].sparse
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={".o.": ".attn."}))
    assert not config.parts("language.attn.k_proj")[0].sparse


def test_mapper_that_prefixes_all_leaves_classes_and_patterns():
    from vllm.model_executor.models.utils import WeightsMapper

    from cast_serve.config import CastConfig

    sparsity = {"sparsity_structure": "2:4", "format": "dense", "ignore": ["re:.*k_proj"]}
    config = CastConfig.from_config(compressed_tensors(**sparsity, targets=["Linear"]))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"": "model."}))
    assert config.parts("model.layers.0.q_proj")[0].sparse
    assert not config.parts("model.layers.0.k_proj")[0].sparse
