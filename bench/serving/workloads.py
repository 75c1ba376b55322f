"""What clients ask for: lengths, concurrency, and how many requests."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from cast_serve.bench.serving.tokenizer import SPECIAL, word


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are kept at `concurrency` in flight until `num_prompts` are answered.

    Attributes:
        input_len, output_len: tokens of every request; None: drawn as ShareGPT's are.
        num_warmups: requests before those that are measured.
    """

    name: str
    concurrency: int
    num_prompts: int
    num_warmups: int
    input_len: int | None
    output_len: int | None

    @property
    def is_prefill(self) -> bool:
        """Whether only the first token is asked for: then there is no time between tokens."""
        return self.output_len == 1


def _chat(concurrency: int, *, num_prompts: int, num_warmups: int) -> Workload:
    return Workload(
        name=f"c{concurrency}",
        concurrency=concurrency,
        num_prompts=num_prompts,
        num_warmups=num_warmups,
        input_len=512,
        output_len=256,
    )


def _prefill(input_len: int, *, num_prompts: int) -> Workload:
    return Workload(
        name=f"prefill-{input_len}",
        concurrency=1,
        num_prompts=num_prompts,
        num_warmups=2,
        input_len=input_len,
        output_len=1,
    )


# 1-15 s each on an H100 with Llama-3.1-8B: 70 s together.
WORKLOADS = (
    _chat(1, num_prompts=8, num_warmups=1),
    _chat(4, num_prompts=24, num_warmups=4),
    _chat(16, num_prompts=64, num_warmups=16),
    _chat(64, num_prompts=192, num_warmups=16),
    _chat(128, num_prompts=384, num_warmups=16),
    _prefill(2048, num_prompts=24),
    _prefill(8192, num_prompts=10),
    Workload(
        name="mixed",
        concurrency=64,
        num_prompts=256,
        num_warmups=16,
        input_len=None,
        output_len=None,
    ),
)

# Says whether everything works; too short to say how fast.
SMOKE = Workload(
    name="smoke", concurrency=4, num_prompts=8, num_warmups=1, input_len=64, output_len=16
)


def find_workloads(names: str) -> tuple[Workload, ...]:
    """The workloads of "A,B".

    Raises:
        ValueError: there is no such workload; lists those there are.
    """
    known = {workload.name: workload for workload in (*WORKLOADS, SMOKE)}
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"no workload {name!r}; there is {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))


# Log-normal, median and sigma of tokens. Their means after the filter below are 233 and 198;
# ShareGPT's, counted by Llama 3's tokenizer, are 230 and 203 (vllm-project/vllm#18566).
_INPUT, _OUTPUT = (180, 1.5), (138, 1.0)
# vLLM leaves out what is outside of these (vllm/benchmarks/datasets.py, is_valid_sequence).
_LEAST, _MOST = 4, 1024


def mixed_lengths(count: int) -> list[tuple[int, int]]:
    """Input and output tokens of `count` requests, the same in every call."""
    generator = random.Random(0)
    return [(_draw(generator, *_INPUT), _draw(generator, *_OUTPUT)) for _ in range(count)]


def write_mixed(path: Path, *, count: int, words: int) -> None:
    """A file in ShareGPT's form with `count` conversations of one turn.

    Args:
        words: size of the vocabulary, whose every id is one word (tokenizer.py).
    """
    generator = random.Random(1)

    def text(length: int) -> str:
        return " ".join(word(generator.randrange(len(SPECIAL), words)) for _ in range(length))

    conversations = [
        {
            "conversations": [
                {"from": "human", "value": text(input_len)},
                {"from": "gpt", "value": text(output_len)},
            ]
        }
        for input_len, output_len in mixed_lengths(count)
    ]
    path.write_text(json.dumps(conversations))


def _draw(generator: random.Random, median: float, sigma: float) -> int:
    while True:
        tokens = round(generator.lognormvariate(math.log(median), sigma))
        if _LEAST <= tokens <= _MOST:
            return tokens
