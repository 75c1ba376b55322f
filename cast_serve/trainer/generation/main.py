"""cast-train generate: the dense model writes text to train its sparse form on, through vLLM.

For users without a pretraining corpus. What a model writes is its own distribution, there is no end
of it, and the KL of Eq. 13 asks for nothing else; but what it knows and never writes is not in it.

    OUT.jsonl         one object a text: {"text": ..., "request": number, "tokens": count}
    OUT.jsonl.json    the settings, which must be the same when it is continued
    .OUT.jsonl.lock   locked while it is written

Called again, it goes on until there are --tokens of them. Text number i is asked for with prompt i;
sampling is seeded by --seed and by how many texts were asked for before, but what a GPU samples
depends on the batch that it is in.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cast_serve.trainer.arguments import Parser
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.lock import lock

# Requests handed to vLLM at once: enough to keep it busy, few enough to lose when it is stopped.
_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides which texts are written."""

    model: str
    prompts: tuple[str, ...]
    # None is "text".
    text_key: str | None
    prompt_tokens: int
    unprompted: float
    temperature: float
    top_p: float
    context: int
    least_tokens: int
    seed: int


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cast-train generate",
        description="Have a model write text to train on, through vLLM.",
        epilog="Flags after -- go to vLLM's engine, such as -- --tensor-parallel-size 2",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="dense checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file")
    parser.add_argument(
        "--tokens",
        type=_count,
        required=True,
        metavar="N",
        help="tokens to write, prompts left out",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text of whose kind more is to be written, as for training; default: none",
    )
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        help="key or column of the text in prompts of .jsonl, .parquet and data sets (default "
        "text)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=16, metavar="N", help="at most, of a prompt"
    )
    parser.add_argument(
        "--unprompted",
        type=float,
        default=0.1,
        metavar="X",
        help="share of texts that begin from nothing although there are prompts",
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="1 is the model's own distribution"
    )
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="most tokens of a text"
    )
    parser.add_argument(
        "--least-tokens", type=int, default=32, metavar="N", help="shorter texts are dropped"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: OUT holds --tokens tokens.

    Raises:
        RunError: a setting that cannot be, or other ones than the file was begun with; vLLM is not
            installed.
    """
    own, engine = _split(list(arguments))
    given = build_parser().parse_args(own)
    settings = _settings(given)
    if given.tokens < 1:
        raise RunError(f"tokens: {given.tokens} is out of range; it must be at least 1")
    if any(flag.partition("=")[0] == "--seed" for flag in engine):
        raise RunError("seed: give it before --, where cast-train generate takes it")
    output: Path = given.output
    if output.suffix != ".jsonl":
        raise RunError(f"output: {output} must end in .jsonl, which training reads it by")
    if find_spec("vllm") is None:
        raise RunError(
            "generating needs vllm; install it: pip install 'cast-serve[cuda]', or "
            "'cast-serve[cpu]' where there is no NVIDIA GPU"
        )
    # Of two that write one file, each would ask for what the other has asked for.
    lock_file = output.with_name(f".{output.name}.lock")
    with lock(lock_file, of=output, command="cast-train generate"):
        _check_output(output, settings)
        from cast_serve.trainer.generation.write import write

        begun = time.perf_counter()
        counts, tokens = write(output, settings, given.tokens, engine, batch=_BATCH)
    seconds = time.perf_counter() - begun
    print(_summary(output, counts, tokens, seconds))
    return 0


def _count(text: str) -> int:
    """1e9 is a number of tokens, too."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(number)


def _settings(given: argparse.Namespace) -> Settings:
    ranges: dict[str, tuple[bool, str]] = {
        "prompt_tokens": (given.prompt_tokens >= 1, "at least 1"),
        "unprompted": (0 <= given.unprompted <= 1, "from 0 to 1"),
        "temperature": (given.temperature > 0, "above 0: without chance texts repeat"),
        "top_p": (0 < given.top_p <= 1, "above 0 and at most 1"),
        "context": (given.context > given.prompt_tokens + 1, "more than prompt_tokens + 1"),
        "least_tokens": (1 <= given.least_tokens < given.context, "from 1 to below context"),
        "seed": (0 <= given.seed < 2**32, "from 0 to below 2^32"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise RunError(f"{name}: {getattr(given, name)} is out of range; it must be {wanted}")
    if given.text_key is not None and not given.prompts:
        raise RunError("text_key: there are no prompts to read; give --prompts FILE")
    sources = map(DataSource.parse, given.prompts)
    weighted = [source.place for source in sources if source.weight is not None]
    if weighted:
        raise RunError(f"prompts: {weighted[0]} has a weight; prompts are cut from all of it")
    return Settings(
        model=str(given.model),
        prompts=tuple(given.prompts),
        text_key=given.text_key,
        **{name: getattr(given, name) for name in ranges},
    )


def _check_output(output: Path, settings: Settings) -> None:
    """Record the settings of a new file; refuse to continue one with others."""
    record = output.with_name(f"{output.name}.json")
    now: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    try:
        if not output.exists():
            record.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
            return
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"output: cannot continue {output}: {error}") from error
    changed = [
        f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
        raise RunError(
            f"output: {output} was begun with other settings: {'; '.join(changed)}; use the same, "
            "or write another file"
        )


def _summary(output: Path, counts: Counter[str], tokens: int, seconds: float) -> str:
    figures = {
        "output": str(output),
        "tokens": tokens,
        "texts": dict(counts),
        "seconds": round(seconds, 1),
    }
    return json.dumps(figures)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    return arguments[:place], arguments[place + 1 :]
