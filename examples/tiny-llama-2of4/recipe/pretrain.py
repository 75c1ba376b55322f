"""Trains the dense model of the example: tokenizer, split, pretraining, evaluation.

Split, at the level of the text, so that this script, `cast-train` and `perplexity.py` share it:
each document is cut into sections of at least SECTION_CHARS characters that end at the end of a
sentence, and the sections are counted through the whole corpus. Of every 100, number 0 goes to
heldout.txt (reported, never trained on, never used to choose anything) and number 25 to valid.txt
(chooses the best checkpoint). Runs of consecutive other sections form the documents of train.txt.
The split depends on nothing but the text, so a run with --init makes the same one. The tokenizer
sees train.txt only.

The best checkpoint by loss on valid.txt is the one that is kept, as 20 passes over 21 MB can
overfit. `--init DIR` continues from a dense checkpoint with its tokenizer, a new optimizer and a
new warm-up: the control that has seen as many tokens as the CAST run.
"""

import argparse
import lzma
import re
import sys
import tempfile
from pathlib import Path

import torch
from perplexity import SEPARATOR, perplexity, token_stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

EOS = "<|endoftext|>"
VOCAB_SIZE = 6144
SECTION_CHARS = 8000
MAX_CONTEXT = 1024
# The model has seen prose only: a chat is its messages as paragraphs, which the model continues.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{{ '' if loop.last else '\n\n' }}{% endfor %}"
)

Split = dict[str, list[str]]


def read_text(path: Path, limit_bytes: int | None) -> str:
    raw = path.read_bytes()
    data = lzma.decompress(raw) if path.suffix == ".xz" else raw
    return data[:limit_bytes].decode("utf-8", errors="strict" if limit_bytes is None else "ignore")


def sections(document: str) -> list[str]:
    """Cuts at ends of sentences; the sections joined are the document."""
    cuts = [0]
    # Not at paragraphs: most of the addresses, up to 217,000 characters each, have none.
    for end in re.finditer(r"[.?!][\u201d\u2019\"']?\s+", document):
        if end.end() - cuts[-1] >= SECTION_CHARS:
            cuts.append(end.end())
    pieces = [document[a:b] for a, b in zip(cuts, [*cuts[1:], len(document)], strict=True)]
    return [piece for piece in pieces if piece]


def split_text(text: str) -> Split:
    split: Split = {"train": [], "valid": [], "heldout": []}
    count = 0
    for document in text.split(SEPARATOR):
        run = ""
        for section in sections(document):
            name = {0: "heldout", 25: "valid"}.get(count % 100, "train")
            count += 1
            if name == "train":
                run += section
                continue
            split[name].append(section)
            split["train"].append(run)
            run = ""
        split["train"].append(run)
    return {name: [d.strip() for d in docs if d.strip()] for name, docs in split.items()}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        # All 256 bytes, so that any text round-trips, also what the corpus never holds.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """7.1 M parameters, 78 % of them in the linear layers that become 2:4."""
    config = LlamaConfig(
        # Fixed, not len(tokenizer): a short text gives fewer merges, and N stays a multiple of 64.
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=8,
        # 4 heads of 64 rather than 8 of 32: every attention backend of vLLM takes 64.
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        # 640 = 2 * 5 * 64, so a shard of TP=2 is a multiple of 64 too.
        intermediate_size=640,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Blocks(torch.utils.data.Dataset):
    """Windows of `context` tokens, one every `stride`."""

    def __init__(self, stream: torch.Tensor, *, context: int, stride: int) -> None:
        if len(stream) < context:
            raise ValueError(f"the text has {len(stream)} tokens, a block needs {context}")
        self.blocks = stream.unfold(0, context, stride)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def train(
    model: PreTrainedModel, streams: dict[str, torch.Tensor], args: argparse.Namespace
) -> None:
    """Trains in place and leaves the best weights by loss on valid.txt in the model."""
    # A stride of a quarter block cuts the text differently in each of four passes.
    train_blocks = Blocks(streams["train"], context=args.context, stride=args.context // 4)
    valid_blocks = Blocks(streams["valid"], context=args.context, stride=args.context)
    tokens = args.steps * args.batch_size * args.context
    print(
        f"{args.steps} steps of {args.batch_size} x {args.context}: {tokens:,} tokens, "
        f"{tokens / len(streams['train']):.1f} passes over {len(streams['train']):,}"
    )
    eval_steps = min(args.eval_every, args.steps)
    with tempfile.TemporaryDirectory() as checkpoints:
        training_args = TrainingArguments(
            output_dir=checkpoints,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=args.steps // 20,
            weight_decay=args.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=torch.cuda.is_available(),
            torch_compile=args.compile,
            seed=args.seed,
            logging_steps=eval_steps,
            eval_strategy="steps",
            eval_steps=eval_steps,
            prediction_loss_only=True,
            save_steps=eval_steps,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            # Blocks are views of one tensor: a worker would cost more than it fetches.
            dataloader_num_workers=0,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not sys.stderr.isatty(),
            report_to="none",
        )
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=train_blocks,
            eval_dataset=valid_blocks,
        )
        seconds = trainer.train().metrics["train_runtime"]
        best = trainer.state.best_metric
        print(f"{tokens / seconds:,.0f} tokens/s with evaluation, best valid loss {best:.4f}")
        # Accelerate patched forward() with bf16 autocast: the evaluation is to be in fp32.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="dense pretraining of the example model")
    parser.add_argument("--data", type=Path, required=True, help="public_domain.txt, or .txt.xz")
    parser.add_argument("--output", type=Path, required=True, help="folder of the bf16 checkpoint")
    parser.add_argument("--split-dir", type=Path, default=Path("split"), help="folder of the split")
    parser.add_argument("--init", type=Path, help="dense checkpoint to continue from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64, help="blocks a step")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=250, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--limit-bytes", type=int, help="read only the start of the text")
    args = parser.parse_args()
    if args.context > MAX_CONTEXT:
        parser.error(f"--context {args.context}: the model has {MAX_CONTEXT} positions")
    return args


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    split = split_text(read_text(args.data, args.limit_bytes))
    args.split_dir.mkdir(parents=True, exist_ok=True)
    for name, documents in split.items():
        (args.split_dir / f"{name}.txt").write_text(SEPARATOR.join(documents), encoding="utf-8")

    if args.init is None:
        tokenizer = train_tokenizer(split["train"])
        model = make_model(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    streams = {name: token_stream(tokenizer, documents) for name, documents in split.items()}
    print(f"{model.num_parameters():,} parameters")
    for name, stream in streams.items():
        print(f"{name}: {len(split[name])} documents, {len(stream):,} tokens")

    train(model, streams, args)

    ppl, scored = perplexity(model, streams["heldout"], context=args.context)
    print(f"held-out perplexity, fp32: {ppl:.3f} over {scored} tokens")
    model.to(torch.bfloat16)
    # Trainer turned it off.
    model.config.use_cache = True
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    saved = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    ppl, scored = perplexity(saved.to(model.device), streams["heldout"], context=args.context)
    print(f"held-out perplexity, bf16 as saved: {ppl:.3f} over {scored} tokens")


if __name__ == "__main__":
    main()
