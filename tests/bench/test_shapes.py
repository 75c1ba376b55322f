import pytest

from cast_serve.bench.shapes import FLOORS, MODELS, SHAPES, TOKENS, Layer, find_model

# (N, K) of qkv, o, gate_up, down, worked out by hand from the published config.json files.
PUBLISHED = {
    "Llama-3.1-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "Llama-2-7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "Llama-2-13B": [(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    "Qwen3-14B": [(7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408)],
    "Llama-3.1-70B-TP8": [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)],
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
}


def test_every_model_is_checked() -> None:
    assert SHAPES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers(name: str) -> None:
    assert [(layer.N, layer.K) for layer in SHAPES[name]] == PUBLISHED[name]
    assert [layer.name for layer in SHAPES[name]] == ["qkv", "o", "gate_up", "down"]


@pytest.mark.parametrize("layer", [x for layers in SHAPES.values() for x in layers], ids=str)
def test_layers_can_be_packed(layer: Layer) -> None:
    assert layer.N % 16 == 0 and layer.K % 64 == 0


def test_floors_cover_the_tokens() -> None:
    assert tuple(FLOORS) == TOKENS


def test_floor() -> None:
    llama, smol = find_model("Llama-3.1-8B"), find_model("smollm2-135m")
    assert (llama.floor(1), llama.floor(16384), llama.floor(2048)) == (1.65, 1.45, None)
    assert smol.floor(1) == smol.floor(2048) == 1.0


def test_only_smollm_is_small() -> None:
    assert [model.name for model in MODELS if model.small] == ["SmolLM2-135M"]


def test_find_model_refuses() -> None:
    with pytest.raises(ValueError, match=r"no model 'gpt-5'; there is Llama-3\.1-8B, .*SmolLM2"):
        find_model("gpt-5")
