"""Where the teacher lives changes nothing of what it says."""

import copy

import psutil
import pytest
import torch

from cast_serve.trainer.distillation.teacher import _twin, make_teacher
from cast_serve.trainer.head import put_loss_head
from cast_serve.trainer.layers import blocks_name
from cast_serve.trainer.offload import OffloadedBlocks
from cast_serve.trainer.processes import ALONE

CPU = torch.device("cpu")


@pytest.fixture
def ids():
    return torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offload_is_the_resident_teacher(tiny_models, make_config, ids, name, compute):
    model = tiny_models[name]()
    put_loss_head(model)
    found = []
    for place in ("resident", "offload"):
        teacher = make_teacher(model, make_config(teacher=place, compute=compute), ALONE)
        # The second pass finds the first block already on its way.
        found.append([teacher.targets(batch).rows(slice(None)) for batch in (ids, ids.flip(0))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][0].dtype == (torch.bfloat16 if compute == "bf16" else torch.float32)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_offloaded_blocks(depth):
    """Blocks of different sizes and dtypes, with buffers, any number of them."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList()
    for number in range(depth):
        block = torch.nn.Sequential(torch.nn.Linear(5, 3 + number), torch.nn.Linear(3 + number, 5))
        block.register_buffer("scale", torch.tensor([number + 1.0], dtype=torch.float64))
        blocks.append(block.requires_grad_(False))

    def run(x):
        for block in blocks:
            x = (block(x) * block.scale).float()
        return x

    inputs = torch.randn(3, 4, 5)
    expected = [run(x) for x in inputs]
    OffloadedBlocks(blocks, CPU)
    assert all(torch.equal(run(x), y) for x, y in zip(inputs, expected, strict=True))


def test_offloaded_blocks_take_two_rooms(tiny_models):
    model = tiny_models["llama"](num_hidden_layers=6)
    blocks = model.get_submodule(blocks_name(model))
    offloaded = OffloadedBlocks(blocks, CPU)
    parameters = list(blocks[0].parameters())
    padding = 256 * len(parameters)
    for room in offloaded._rooms:
        assert 0 <= len(room) - sum(p.nbytes for p in parameters) < padding
    model(torch.zeros(1, 4, dtype=torch.long))
    rooms = {room.untyped_storage().data_ptr() for room in offloaded._rooms}
    assert {p.untyped_storage().data_ptr() for p in blocks.parameters()} == rooms


def test_bf16_teacher_keeps_its_rotary_frequencies(tiny_models, make_config):
    """Rounded to bf16 they put tokens in other places: its KL to itself in fp32 was 0.1."""
    model = tiny_models["llama"](max_position_embeddings=1024)
    put_loss_head(model)
    twin = make_teacher(model, make_config(compute="bf16"), ALONE).model
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_twin_of_a_process_without_weights_takes_no_memory(tiny_models):
    """Under FSDP all but the first process have such a model; shards are sent to them."""
    model = tiny_models["llama"](vocab_size=500_000)
    put_loss_head(model)
    before = psutil.Process().memory_info().rss
    twin = _twin(model, torch.bfloat16, holds_weights=False)
    grown = psutil.Process().memory_info().rss - before
    assert grown < 0.1 * sum(p.nbytes for p in twin.parameters())
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_teacher_is_a_frozen_copy(tiny_models, make_config, ids):
    model = tiny_models["gpt2"]().train()
    put_loss_head(model)
    before = copy.deepcopy(model.state_dict())
    teacher = make_teacher(model, make_config(), ALONE)
    said = teacher.targets(ids).rows(slice(None))
    for parameter in model.parameters():
        parameter.data.zero_()
    # In eval mode, so that dropout is off.
    assert torch.equal(teacher.targets(ids).rows(slice(None)), said)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.model.state_dict().items())
