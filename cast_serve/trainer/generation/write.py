"""Asks vLLM for texts, batch after batch, and appends those that are kept to a file."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from cast_serve.trainer.data import read_tokens, require_keys, to_blocks
from cast_serve.trainer.data.tokens import end_of_document
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.generation.characters import Decode, without_part
from cast_serve.trainer.generation.distinct import Distinct, Verdict
from cast_serve.trainer.generation.prompts import Prompts, begin_token
from cast_serve.trainer.output import output_errors
from cast_serve.trainer.source import load_tokenizer, read_config

if TYPE_CHECKING:
    from cast_serve.trainer.generation.main import Settings


def write(
    output: Path, settings: "Settings", tokens: int, engine: list[str], *, batch: int
) -> tuple[Counter[str], int]:
    """Append texts to `output` until it has `tokens`; returns texts by verdict, and its tokens.

    Args:
        engine: flags of vLLM's engine.
        batch: requests that vLLM is given at once.

    Raises:
        RunError: the model cannot be loaded, the file is damaged or cannot be written, or hardly
            any text is kept.
    """
    model = Path(settings.model)
    # First: a folder that is no model has no tokenizer either.
    read_config(model)
    tokenizer = load_tokenizer(model)
    distinct = Distinct(least=settings.least_tokens)
    written, request = _recall(output, tokenizer, distinct)
    counts: Counter[str] = Counter()
    if written >= tokens:
        return counts, written
    prompts, decode = _prompts(settings, tokenizer), _decoder(tokenizer)
    llm = _start(settings.model, _engine_flags(settings, engine, request=request))
    with _bar() as bar:
        task = bar.add_task("tokens", total=tokens, completed=written, found="")
        while written < tokens:
            asked = [prompts[request + index] for index in range(batch)]
            kept: list[str] = []
            for index, generated in enumerate(_complete(llm, asked, settings, decode)):
                verdict = distinct.judge(generated)
                counts[str(verdict)] += 1
                if verdict is not Verdict.KEPT:
                    continue
                # Special tokens, such as the one that begins every text, are not text.
                text = tokenizer.decode([*asked[index], *generated], skip_special_tokens=True)
                line = {"text": text, "request": request + index, "tokens": len(generated)}
                kept.append(json.dumps(line, ensure_ascii=False) + "\n")
                written += len(generated)
            _append(output, kept)
            request += batch
            bar.update(task, completed=min(written, tokens), found=_shares(counts))
            if len(kept) < batch // 100 + 1:
                raise RunError(
                    f"output: of {batch} texts {len(kept)} were kept ({_shares(counts)}); raise "
                    "temperature, or give prompts of more kinds"
                )
    llm.llm_engine.engine_core.shutdown()
    return counts, written


def _recall(
    output: Path, tokenizer: PreTrainedTokenizerBase, distinct: Distinct
) -> tuple[int, int]:
    """Tokens in `output`, and the number of its next request; `distinct` is told its texts.

    A last line that was cut off is removed.
    """
    if not output.exists():
        return 0, 0
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(output, len(whole))
    tokens, following = 0, 0
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            text, request, count = str(row["text"]), int(row["request"]), int(row["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{output}: line {number} is not of cast-train generate") from error
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        distinct.judge(ids[-count:])
        tokens += count
        following = max(following, request + 1)
    return tokens, following


def _prompts(settings: "Settings", tokenizer: PreTrainedTokenizerBase) -> Prompts:
    corpus = None
    if settings.prompts:
        sources = tuple(map(DataSource.parse, settings.prompts))
        require_keys(sources, settings.text_key)
        tokens = read_tokens(sources, tokenizer, text_key=settings.text_key)
        corpus = to_blocks(tokens, context=settings.prompt_tokens, key="prompts")
    return Prompts(
        corpus=corpus,
        unprompted=settings.unprompted,
        begin=begin_token(tokenizer),
        end=end_of_document(tokenizer),
        decode=_decoder(tokenizer),
        seed=settings.seed,
    )


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    def decode(tokens: list[int]) -> str:
        # Of one list it is one text.
        return str(tokenizer.decode(tokens))

    return decode


def _engine_flags(settings: "Settings", engine: list[str], *, request: int) -> list[str]:
    """Flags of vLLM's engine for the texts from number `request` on.

    An engine with the seed of the one before would write its texts again.
    """
    seed = int(np.random.SeedSequence((settings.seed, request)).generate_state(1)[0])
    flags = ["--model", settings.model, "--max-model-len", str(settings.context)]
    return [*flags, "--no-enable-prefix-caching", *engine, "--seed", str(seed)]


def _start(model: str, flags: list[str]) -> Any:
    """A vLLM engine for the model."""
    # stdout is for the result.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # Prompts were cut by threads of OpenMP, and in a fork of a process that has had some, the first
    # tensor that wants them waits for ever.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    try:
        return LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(flags)))
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(f"model: vLLM cannot serve {model}: {error}") from error


def _complete(
    llm: Any, prompts: list[list[int]], settings: "Settings", decode: Decode
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, without its end-of-text token.

    Nor with a part of a character, where `context` cut it off.
    """
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.context - len(prompt),
            detokenize=False,
        )
        for prompt in prompts
    ]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = llm.generate(asked, sampling, use_tqdm=False)
    written = []
    for answer in answers:
        tokens = list(answer.outputs[0].token_ids)
        ended = answer.outputs[0].finish_reason == "stop"
        written.append(tokens[:-1] if ended else without_part(tokens, decode))
    return written


def _append(output: Path, lines: list[str]) -> None:
    with output_errors(output, trained=False), output.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def _shares(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{verdict} {count / total:.0%}" for verdict, count in counts.items())


def _bar() -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.completed:,} / {task.total:,} tokens", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[found]}", markup=False),
        console=Console(stderr=True, highlight=False),
    )
