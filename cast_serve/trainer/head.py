"""The output head of a model, made to compute the loss in place of the logits.

FSDP gathers a parameter, and DDP and FSDP expect its gradient, around the forward pass of the
module that owns it. So the loss, which needs the head's weight and not its output, is computed
inside of the head's own forward: `model(...)` then returns it as `logits`. A model that does more
to its logits than return them (Gemma 2's soft cap, the scales of Granite and Cohere) would do that
to the loss as well. `returns_its_head` finds out by running the model, not by a list of names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

# From the head's input [..., hidden], weight [vocab, hidden] and bias to what it returns instead.
Work = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class LossHead(nn.Linear):
    """A linear head that shares its parameters and their names; in `doing`, it returns `work`."""

    def __init__(self, head: nn.Linear) -> None:
        bias = head.bias is not None
        super().__init__(head.in_features, head.out_features, bias=bias, device="meta")
        self.weight = head.weight
        self.bias = head.bias
        self._work: Work | None = None

    @contextmanager
    def doing(self, work: Work) -> Iterator[None]:
        """Within, the head returns work(hidden, weight, bias) instead of the logits."""
        self._work = work
        try:
            yield
        finally:
            self._work = None

    # torch.compile would trace `work` anew at every step, and unroll its loop over the chunks.
    @torch.compiler.disable
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._work is None:
            return functional.linear(hidden, self.weight, self.bias)
        return self._work(hidden, self.weight, self.bias)


@torch.no_grad()
def returns_its_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are what its head returns, a plain linear layer called once."""
    head = model.get_output_embeddings()
    if type(head) is LossHead:
        return True
    if type(head) is not nn.Linear:
        return False
    calls: list[torch.Tensor] = []

    def give_back(_: nn.Module, args: tuple[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        calls.append(args[0])
        return args[0]

    training = model.training
    hook = head.register_forward_hook(give_back)
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    return len(calls) == 1 and logits is calls[0]


def put_loss_head(model: PreTrainedModel) -> LossHead:
    """Replace the head of a model that returns it; once there, it stays."""
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        return head
    assert isinstance(head, nn.Linear)
    name = next(name for name, module in model.named_modules() if module is head)
    replacement = LossHead(head)
    model.set_submodule(name, replacement)
    return replacement


def loss_head(model: nn.Module) -> LossHead | None:
    """The loss head of a model or of what wraps it; None where its logits are needed."""
    return next((m for m in model.modules() if isinstance(m, LossHead)), None)
