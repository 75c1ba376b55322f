"""One fine-tune from a 2:4 checkpoint to a 2:4 checkpoint of the same pattern, or to an adapter."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, Trainer, TrainingArguments

from cast_serve.model_loaders.checkpoint import read_json
from cast_serve.model_loaders.rewrite import rewrite
from cast_serve.model_loaders.write import PROVENANCE, new_folder, write_json
from cast_serve.trainer.distillation.loss import IGNORED, distillation_loss
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import to_perplexity
from cast_serve.trainer.finetune.config import FinetuneConfig
from cast_serve.trainer.finetune.examples import (
    Example,
    Examples,
    ExampleStream,
    load_examples,
    pad,
)
from cast_serve.trainer.finetune.pattern import add_lora, mask_gradients, merge
from cast_serve.trainer.output import require_free, require_writable
from cast_serve.trainer.provenance import versions
from cast_serve.trainer.schedule import Schedule, whole_steps
from cast_serve.trainer.source import context_length
from cast_serve.trainer.sparse_source import SparseSource, load_sparse, require_two_of_four


def run(config: FinetuneConfig, console: Console) -> None:
    """Carry out `config`; config.output is written at the end, whole or not at all.

    Raises:
        RunError, CheckpointError: anything a user can put right, said in one line.
    """
    require_free(config.output, source=config.model)
    require_two_of_four(config.model)
    source = load_sparse(config.model)
    context = context_length(source.model, config.context)
    examples = load_examples(
        config.data,
        source.tokenizer,
        context=context,
        held_out=config.held_out_share,
        eval_files=config.eval_data,
        text_key=config.text_key,
    )
    steps = step_count(config, len(examples.train))
    require_writable(config.output)
    _announce(config, examples, steps, context, console)
    # peft draws A.
    torch.manual_seed(config.seed)
    model: nn.Module = source.model
    if config.lora:
        model = add_lora(
            source,
            rank=config.rank,
            alpha=config.alpha,
            targets=config.lora_target,
            masked=config.merge,
        )
    with TemporaryDirectory() as scratch:
        arguments = _training_arguments(config, steps, Path(scratch))
        model.to(arguments.device)
        if not config.lora:
            mask_gradients(source.sparse_modules())
        before = mean_loss(model, examples.evaluation, batch_size=config.batch_size)
        length = steps * config.batch_size * config.gradient_accumulation
        stream = ExampleStream(examples.train, length=length, seed=config.seed)
        FinetuneTrainer(config, model, stream, arguments).train()
    # The loss is looked at where it is logged, and not after the last step.
    broken = (name for name, p in model.named_parameters() if not p.isfinite().all())
    if (name := next(broken, None)) is not None:
        raise RunError(f"{name} is not finite after {steps} steps; lower lr or raise warmup")
    if config.merge:
        assert isinstance(model, PeftModel)
        model = merge(model)
    after = mean_loss(model, examples.evaluation, batch_size=config.batch_size)
    if not math.isfinite(after):
        raise RunError(f"the loss is {after} after {steps} steps; lower lr or raise warmup")
    record = _provenance(config, examples, steps, context, before=before, after=after)
    if isinstance(model, PeftModel):
        _write_adapter(model, config, record)
    else:
        _write_model(source, model, config, record)
    console.print(
        f"loss {before:.4f} -> {after:.4f}, perplexity {to_perplexity(before):.3f} -> "
        f"{to_perplexity(after):.3f} ({examples.evaluated_on})",
        markup=False,
    )
    written = "adapter" if isinstance(model, PeftModel) else config.export
    console.print(f"wrote {config.output} ({written})", markup=False)


def step_count(config: FinetuneConfig, examples: int) -> int:
    """Optimizer steps of the budget; a part of a step is rounded up.

    Raises:
        RunError: more than any run could take.
    """
    if config.steps is not None:
        return whole_steps(config.steps)
    epochs = 1.0 if config.epochs is None else config.epochs
    return whole_steps(epochs * examples / (config.batch_size * config.gradient_accumulation))


class FinetuneTrainer(Trainer):
    """AdamW and cross-entropy over labels; masks and adapters are the model's own affair."""

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module,
        stream: ExampleStream,
        arguments: TrainingArguments,
    ) -> None:
        schedule = Schedule(steps=arguments.max_steps, warmup=config.warmup, floor=config.lr_floor)
        optimizer = torch.optim.AdamW(_groups(model, config.weight_decay), lr=config.peak_lr)
        super().__init__(
            model=model,  # type: ignore[arg-type]  # a PeftModel is no PreTrainedModel
            args=arguments,
            data_collator=pad,
            train_dataset=stream,
            optimizers=(optimizer, LambdaLR(optimizer, schedule.factor())),
        )
        self.bf16_compute = config.compute == "bf16"
        # Makes the Trainer count the labels of a step, and leave the division to compute_loss.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(ProgressCallback)
        self.add_callback(_ProgressBar)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This forward pass's share of the mean over the labels of the whole step."""
        assert not return_outputs, "evaluation goes through mean_loss"
        with self._autocast():
            total, count = _loss(model, inputs)
        assert num_items_in_batch is not None, "the Trainer counts labels"
        return total * count / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log.

        Raises:
            RunError: the loss is no longer a number.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RunError(
                f"loss is {logs['loss']} at step {self.state.global_step}; lower lr or raise warmup"
            )
        super().log(logs, start_time)

    def _autocast(self) -> AbstractContextManager[Any]:
        # Not TrainingArguments(bf16=True): accelerate would turn the logits to fp32 as a whole.
        if not self.bf16_compute:
            return nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)


class _ProgressBar(ProgressCallback):
    """The Trainer's bar with the loss at its end, in place of a printed line each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


@torch.no_grad()
def mean_loss(model: nn.Module, examples: list[Example], *, batch_size: int) -> float:
    """Mean cross-entropy over the labels of `examples`, nats; the model's mode is restored."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, labels = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = pad(examples[start : start + batch_size])
        loss, count = _loss(model, {key: value.to(device) for key, value in batch.items()})
        total += loss.item() * int(count)
        labels += int(count)
    model.train(training)
    return total / labels


def _loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the labels of a batch, and how many there are."""
    logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    loss = distillation_loss(logits, None, labels, eta=0.0)
    return loss.total, (labels != IGNORED).sum()


def _groups(model: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Parameters in training: matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    yield {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay}
    yield {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}


def _training_arguments(config: FinetuneConfig, steps: int, scratch: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=steps,
        # One "epoch" of ExampleStream is the whole run, in its own order.
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        learning_rate=config.peak_lr,
        max_grad_norm=config.clip,
        gradient_checkpointing=config.gradient_checkpointing,
        # With frozen embeddings a reentrant checkpoint would see no input that has a gradient.
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        seed=config.seed,
        use_cpu=config.device == "cpu",
    )
    # The Trainer wraps the model in DataParallel where it sees several GPUs: take the first.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _announce(
    config: FinetuneConfig, examples: Examples, steps: int, context: int, console: Console
) -> None:
    labels = sum(int((example.labels != IGNORED).sum()) for example in examples.train)
    console.print(
        f"{config.method}: {len(examples.train)} examples ({examples.kind}) with {labels} tokens "
        f"to learn, {steps} steps, lr {config.peak_lr:.3g}, context {context}",
        markup=False,
    )
    if examples.cut:
        console.print(
            f"warning: {examples.cut} examples are longer than {context} tokens and lose their "
            f"end, {examples.dropped} of them all they would teach and are left out",
            style="yellow",
            markup=False,
        )


def _write_model(
    source: SparseSource, model: nn.Module, config: FinetuneConfig, record: dict[str, Any]
) -> None:
    state = model.state_dict()
    weights = {stored: state[name].cpu() for stored, name in source.names.items()}
    before = source.folder / PROVENANCE
    kept = read_json(before, "") if before.is_file() else {}
    # Of the base's 8-bit values; those that are written are not.
    if "quantization" in kept:
        record |= {"base_quantization": kept.pop("quantization")}
    provenance = kept | {"finetune": record}
    rewrite(source.folder, config.output, weights, to=config.export, provenance=provenance)


def _write_adapter(model: PeftModel, config: FinetuneConfig, record: dict[str, Any]) -> None:
    """The adapter folder that peft reads and vLLM serves on the sparse base."""
    # The name alone: a path of this machine means nothing on another.
    model.peft_config["default"].base_model_name_or_path = config.model.resolve().name
    with new_folder(config.output, source=config.model) as folder:
        # "auto" would look the base model up on the hub.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        # peft's card is a form to fill in.
        (folder / "README.md").unlink(missing_ok=True)
        write_json(folder / PROVENANCE, {"finetune": record})


def _provenance(
    config: FinetuneConfig,
    examples: Examples,
    steps: int,
    context: int,
    *,
    before: float,
    after: float,
) -> dict[str, Any]:
    """What made the output. Folder and file names only, no paths of a machine."""
    record: dict[str, Any] = {
        "base": config.model.resolve().name,
        "method": config.method,
        "data": {
            "files": [path.name for path in config.data],
            "kind": examples.kind,
            "examples": len(examples.train),
            "cut": examples.cut,
            "dropped": examples.dropped,
            "sha256": examples.sha256,
        },
        "steps": steps,
        "batch": config.batch_size * config.gradient_accumulation,
        "context": context,
        "lr": config.peak_lr,
        "warmup": config.warmup,
        "lr_floor": config.lr_floor,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        "compute": config.compute,
        "seed": config.seed,
        "evaluation": {"on": examples.evaluated_on, "loss_before": before, "loss_after": after},
        "versions": versions("peft"),
    }
    if config.lora:
        record["lora"] = {"rank": config.rank, "alpha": config.alpha}
    return record
