"""The loss inside of the head: which models allow it, and that it is the loss from logits."""

from functools import partialmethod
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.distillation.loss import Projection
from cast_serve.trainer.distillation.teacher import Teacher
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import mean_loss
from cast_serve.trainer.head import loss_head, put_loss_head, returns_its_head
from cast_serve.trainer.layers import compile_blocks
from cast_serve.trainer.objective import Objective, next_tokens, prepare_head
from cast_serve.trainer.train import run

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tiny_opt():
    """Its last hidden states are narrower than its blocks."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        )
    )


SCALED = {
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=5.0)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_plain_heads(tiny_models, name):
    model = (tiny_models | {"opt": tiny_opt})[name]()
    assert returns_its_head(model)
    assert returns_its_head(model.bfloat16())


@pytest.mark.parametrize("name", SCALED)
def test_models_that_change_their_logits(name, make_config):
    model = SCALED[name]()
    assert not returns_its_head(model)
    assert "its logits are kept whole" in prepare_head(model, make_config())
    assert loss_head(model) is None
    with pytest.raises(RunError, match=r"loss: .*so chunked is not possible; use auto"):
        prepare_head(model, make_config(loss="chunked"))


def test_probe_leaves_the_model_as_it_was(tiny_models):
    model = tiny_models["llama"]().train()
    ids = torch.arange(8).view(1, 8)
    before = model(ids).logits
    assert returns_its_head(model)
    assert model.training
    assert torch.equal(model(ids).logits, before)


def test_loss_head_keeps_names_and_ties(tiny_models):
    model = tiny_models["gpt2"]().eval()
    ids = torch.arange(8).view(1, 8)
    names, before = list(model.state_dict()), model(ids).logits
    head = put_loss_head(model)
    assert put_loss_head(model) is head is model.get_output_embeddings()
    assert list(model.state_dict()) == names
    assert head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(ids).logits, before)


def models(make, **dtype):
    student, teacher = make(), make()
    draw = torch.Generator().manual_seed(1)
    for parameter in teacher.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return student.to(**dtype).eval(), teacher.to(**dtype)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", *SCALED])
def test_objective(tiny_models, name):
    """With and without a head of its own, a model has the loss and gradient of whole logits."""
    make = (tiny_models | {"opt": tiny_opt} | SCALED)[name]
    student, teacher = models(make, dtype=torch.float64)
    ids = torch.randint(64, (3, 8), generator=torch.Generator().manual_seed(2))
    z = student(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    with torch.no_grad():
        p = teacher.eval()(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    ce = torch.nn.functional.nll_loss(z, ids[:, 1:].flatten())
    kl = torch.nn.functional.kl_div(z, p, reduction="batchmean", log_target=True)
    (0.3 * kl + 0.7 * ce).backward()
    expected = {key: p.grad for key, p in student.named_parameters()}
    student.zero_grad()

    plain = name not in SCALED
    for model in (student, teacher):
        if plain:
            put_loss_head(model)
    targets = Teacher(teacher).targets(ids)
    assert isinstance(targets, Projection) == plain
    loss = Objective(eta=0.3)(student, loss_head(student), ids, targets)
    loss.total.backward()
    torch.testing.assert_close((loss.ce, loss.kl), (ce.detach(), kl.detach()))
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], msg=key)


def test_next_tokens():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert next_tokens(ids).tolist() == [2, 3, -100, 5, 6, -100]


def test_blocks_are_compiled_once_for_all_and_for_all_steps(tiny_models):
    from torch._dynamo.utils import counters

    model = tiny_models["llama"]()
    head = put_loss_head(model)
    objective = Objective(eta=0.0)
    batches = [
        torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(step))
        for step in range(4)
    ]
    exact = [objective(model, head, ids, None).total for ids in batches]
    torch.compiler.reset()
    counters.clear()
    compile_blocks(model)
    for ids, expected in zip(batches, exact, strict=True):
        torch.testing.assert_close(objective(model, head, ids, None).total, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_evaluation_leaves_training_its_own_shapes(tiny_models, monkeypatch):
    """A graph whose batch is a variable takes it as a SymInt."""
    shapes, compiled = [], nn.Module.compile

    def backend(graph, inputs):
        batches = [x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3]
        shapes.append((batches[0], any(isinstance(x, torch.SymInt) for x in inputs)))
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(compiled, backend=backend))
    model = tiny_models["llama"]()
    head = put_loss_head(model)
    torch.compiler.reset()
    compile_blocks(model)
    ids = torch.randint(257, (20, 16), generator=torch.Generator().manual_seed(0))
    # Batches of 8, 8 and 4, then the one of training.
    mean_loss(model, ids)
    Objective(eta=0.0)(model, head, ids[:16], None).total.backward()
    assert shapes == [(8, False), (4, False), (16, False)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger(temperature):
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    from cast_serve.trainer.distillation.liger import liger_distillation_loss
    from cast_serve.trainer.distillation.loss import linear_distillation_loss

    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=draw), torch.randn(31, 8, generator=draw)
    teacher = Projection(
        hidden_TH=torch.randn(12, 6, generator=draw), weight_VH=torch.randn(31, 6, generator=draw)
    )
    labels = torch.randint(31, (12,), generator=draw)
    labels[3] = -100
    found = []
    for loss in (linear_distillation_loss, liger_distillation_loss):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        value = loss(*inputs, None, teacher, labels, eta=0.3, temperature=temperature)
        value.total.backward()
        found.append((value.total, value.ce, value.kl, *(x.grad for x in inputs)))
    torch.testing.assert_close(*found)


def test_liger_needs_the_teacher_in_memory(make_config):
    with pytest.raises(RunError, match="loss: liger needs the teacher's hidden states"):
        make_config(loss="liger", teacher="cached")


def test_logits_are_kept_where_asked(tiny_models, make_config):
    model = tiny_models["llama"]()
    config: RunConfig = make_config(loss="logits")
    assert prepare_head(model, config) is None
    assert loss_head(model) is None


def test_liger_is_not_recorded(make_config):
    with pytest.raises(RunError, match="cuda_graph: Liger-Kernel's backward pass reads"):
        make_config(loss="liger", cuda_graph=True, device="auto")


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="Liger-Kernel is installed")
def test_without_liger_nothing_is_begun(make_config):
    config = make_config(loss="liger")
    with pytest.raises(RunError, match=r"loss: liger needs .* pip install liger-kernel"):
        run(config, Console(quiet=True))
    assert not config.run_dir.exists()
