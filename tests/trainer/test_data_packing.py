"""Attention within documents: a packed document's logits are those of the document alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from cast_serve.trainer.data.packing import document_positions, require_document_attention
from cast_serve.trainer.errors import RunError


@given(tokens=st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=3))
def test_document_positions(tokens):
    expected = []
    for row in tokens:
        positions, place = [], 0
        for token in row:
            positions.append(place)
            place = 0 if token == 0 else place + 1
        expected.append(positions)
    assert document_positions(torch.tensor(tokens), eos=0).tolist() == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_documents_are_seen_alone(tiny_models, name, attention):
    model = tiny_models[name]().eval()
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    # Rows that are cut at different places, one document of EOS alone, one that fills a row.
    lengths = [[5, 11, 4], [1, 1, 18], [20]]
    rows = [
        [
            torch.cat((torch.randint(1, 257, (n - 1,)), torch.zeros(1, dtype=torch.long)))
            for n in row
        ]
        for row in lengths
    ]
    batch = torch.stack([torch.cat(row) for row in rows])
    positions = document_positions(batch, eos=0)
    with torch.no_grad():
        packed = model(input_ids=batch, position_ids=positions, use_cache=False).logits
        for found, row in zip(packed, rows, strict=True):
            alone = [model(input_ids=document[None], use_cache=False).logits[0] for document in row]
            torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-6)
        mixed = model(input_ids=batch, use_cache=False).logits
    assert not torch.allclose(mixed[0], packed[0], atol=1e-4)


def test_gradient_is_that_of_the_documents_alone(tiny_models):
    model = tiny_models["llama"]()
    torch.manual_seed(1)
    first, second = torch.randint(1, 257, (2, 1, 6))
    first[0, -1] = second[0, -1] = 0
    batch = torch.cat((first, second), dim=1)
    positions = document_positions(batch, eos=0)
    model(input_ids=batch, position_ids=positions, use_cache=False).logits.square().sum().backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for document in (first, second):
        model(input_ids=document, use_cache=False).logits.square().sum().backward()
    for found, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5)


def test_require_document_attention(tiny_models):
    for name in ("llama", "gpt2"):
        model = tiny_models[name]()
        require_document_attention(model)
        assert model.training


def test_models_that_mix_documents_are_refused():
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=257,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            **ids,
        )
    )
    with pytest.raises(RunError, match="OPTForCausalLM attends across documents"):
        require_document_attention(opt)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=2, **ids)
    )
    with pytest.raises(RunError, match="document_attention: BloomForCausalLM"):
        require_document_attention(bloom)
