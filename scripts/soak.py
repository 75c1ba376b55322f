"""Does every one of many streams get what it would get alone, and does memory stay flat?

    cast-serve --model examples/tiny-llama-2of4 &
    python scripts/soak.py --pid $! --streams 256 --seconds 600

Method    --prompts different completions at temperature 0, of different lengths, are asked for one
          at a time. Then --streams clients ask for them in random order, by streaming, for
          --seconds; a share of --abandon of the streams is hung up in the middle. The API key is
          VLLM_API_KEY.
Judged    Token by token. An answer that ends early, is refused, or differs is counted as lost or
          wrong, but for one: matrices of other sizes are summed in another order, so of two tokens
          that were almost equally likely another may be taken. Such an answer is asked for again,
          alone and given its tokens, and must be at every token within --tie of the likeliest.
          All answers differ when asked for alone, so one that went to the wrong client is seen.
Memory    Proportional set size of --pid and all of its descendants, every 2 s.
Status    0 if nothing is lost or wrong and no request is left in the server. The last line on
          stdout is one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil

WORDS = "the day was fine and a bird sang to old Mr Grey who had no hat in that cold house of rain"
SAMPLE_SECONDS = 2.0
# Of 256 streams on two cores.
ANSWER_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Question:
    prompt: str
    max_tokens: int

    def body(self, model: str) -> dict[str, object]:
        return {
            **{"model": model, "prompt": self.prompt, "max_tokens": self.max_tokens},
            **{"temperature": 0, "ignore_eos": True, "return_token_ids": True},
        }


@dataclass(kw_only=True)
class Seen:
    """What became of the requests.

    Attributes:
        ends: how many ended in which way.
        ties: answers that differ from those asked for alone, to be judged; by question.
        wrong: a few words on each lost or wrong answer.
    """

    ends: Counter[str] = field(
        default_factory=lambda: Counter(equal=0, abandoned=0, differs=0, lost=0)
    )
    tokens: int = 0
    ties: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


def questions(count: int, seed: int) -> list[Question]:
    """Prompts of 5 to 60 words, each with a number of its own, and 16 to 128 tokens to answer."""
    chance = random.Random(seed)
    words = WORDS.split()
    return [
        Question(
            prompt=f"{number} " + " ".join(chance.choices(words, k=chance.randint(5, 60))),
            max_tokens=chance.randint(16, 128),
        )
        for number in range(count)
    ]


async def alone(client: httpx.AsyncClient, question: Question, model: str) -> tuple[int, ...]:
    """The tokens of an answer."""
    answer = await client.post("/v1/completions", json=question.body(model))
    answer.raise_for_status()
    return tuple(answer.json()["choices"][0]["token_ids"])


async def distance(
    client: httpx.AsyncClient, question: Question, tokens: tuple[int, ...], model: str
) -> float:
    """How much less likely than the likeliest, in log-probability, a token of an answer ever is."""
    first = await client.post("/tokenize", json={"model": model, "prompt": question.prompt})
    prompt = first.raise_for_status().json()["tokens"]
    body = {"model": model, "prompt": [*prompt, *tokens], "max_tokens": 1, "prompt_logprobs": 1}
    answer = await client.post("/v1/completions", json=body)
    told = answer.raise_for_status().json()["choices"][0]["prompt_logprobs"][len(prompt) :]
    return max(
        max(entry["logprob"] for entry in place.values()) - place[str(token)]["logprob"]
        for token, place in zip(tokens, told, strict=True)
    )


async def stream(
    client: httpx.AsyncClient, question: Question, model: str, stop_after: int | None
) -> tuple[tuple[int, ...], str | None]:
    """Tokens and finish reason of a streamed answer; hangs up after `stop_after` tokens."""
    tokens: list[int] = []
    reason = None
    body = {**question.body(model), "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            tokens += choice["token_ids"]
            reason = choice["finish_reason"] or reason
            if stop_after is not None and len(tokens) >= stop_after:
                break
    return tuple(tokens), reason


async def ask_until(
    end: float,
    client: httpx.AsyncClient,
    asked: list[Question],
    answers: list[tuple[int, ...]],
    seen: Seen,
    args: argparse.Namespace,
    chance: random.Random,
) -> None:
    """One client: a stream after the other."""
    while time.monotonic() < end:
        number = chance.randrange(len(asked))
        stop_after = chance.randint(1, 15) if chance.random() < args.abandon else None
        try:
            tokens, reason = await stream(client, asked[number], args.model, stop_after)
        except (httpx.HTTPError, json.JSONDecodeError, KeyError, ValueError) as error:
            seen.ends["lost"] += 1
            seen.wrong.append(f"{asked[number].prompt[:20]!r}: {error!r}")
            continue
        seen.tokens += len(tokens)
        expected = answers[number] if stop_after is None else answers[number][: len(tokens)]
        if stop_after is None and (reason != "length" or len(tokens) != len(expected)):
            seen.ends["lost"] += 1
            seen.wrong.append(f"{asked[number].prompt[:20]!r}: {len(tokens)} tokens, {reason}")
        elif tokens == expected:
            seen.ends["equal" if stop_after is None else "abandoned"] += 1
        else:
            seen.ends["differs"] += 1
            seen.ties.add((number, tokens))


async def sample(pid: int | None, taken: list[tuple[float, int]]) -> None:
    """Append time and memory in bytes, until cancelled."""
    begin = time.monotonic()
    while pid is not None:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        size = sum(member.memory_full_info().pss for member in family)
        taken.append((time.monotonic() - begin, size))
        await asyncio.sleep(SAMPLE_SECONDS)


async def left_running(client: httpx.AsyncClient) -> float:
    """Requests in the server, once it has had 30 s to notice who hung up."""
    for _ in range(30):
        metrics = (await client.get("/metrics")).text.splitlines()
        counts = [
            float(line.split()[-1])
            for line in metrics
            if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
        ]
        if not any(counts):
            return 0.0
        await asyncio.sleep(1)
    return sum(counts)


def say(text: str) -> None:
    print(text, flush=True)


async def soak(args: argparse.Namespace) -> dict[str, object]:
    """Run it all; what is reported."""
    headers = {"Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', 'none')}"}
    # A connection each: one that is kept may be closed by the server, which waits 5 s
    # (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), while this busy process takes longer to use it again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    asked = questions(args.prompts, args.seed)
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, timeout=ANSWER_SECONDS, limits=limits
    ) as client:
        models = await client.get("/v1/models")
        args.model = models.raise_for_status().json()["data"][0]["id"]
        begin = time.monotonic()
        answers = [await alone(client, question, args.model) for question in asked]
        if len(set(answers)) < len(answers):
            raise SystemExit("soak: two answers are the same; a mix-up could not be seen")
        say(f"{len(asked)} answers alone in {time.monotonic() - begin:.0f} s")

        seen, memory = Seen(), list[tuple[float, int]]()
        sampler = asyncio.create_task(sample(args.pid, memory))
        begin = time.monotonic()
        end = begin + args.seconds
        chances = [random.Random(f"{args.seed} {number}") for number in range(args.streams)]
        await asyncio.gather(
            *(ask_until(end, client, asked, answers, seen, args, chance) for chance in chances)
        )
        seconds = time.monotonic() - begin
        say(f"{args.streams} streams for {seconds:.0f} s: {dict(seen.ends)}")
        left = await left_running(client)
        sampler.cancel()
        worst = 0.0
        for number, tokens in seen.ties:
            gap = await distance(client, asked[number], tokens, args.model)
            worst = max(worst, gap)
            if gap > args.tie:
                seen.wrong.append(f"{asked[number].prompt[:20]!r}: {gap:.3f} from the likeliest")
    # From a quarter on: buffers and caches have been filled.
    settled = [size for at, size in memory if at > seconds / 4] or [0]
    return {
        **{"streams": args.streams, "seconds": round(seconds), "prompts": args.prompts},
        **{"answers": seen.ends.total(), "tokens": seen.tokens, **seen.ends},
        **{"different_answers_judged": len(seen.ties), "furthest_from_likeliest": round(worst, 4)},
        **{"wrong_or_lost": len(seen.wrong), "left_in_server": left},
        "mib_settled": settled[0] >> 20,
        "mib_most": max(settled) >> 20,
        "mib_end": settled[-1] >> 20,
        "examples": seen.wrong[:10],
    }


def main() -> int:
    """Console entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="cast-serve's, to measure its memory")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--abandon", type=float, default=0.05)
    parser.add_argument("--tie", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    report = asyncio.run(soak(parser.parse_args()))
    for example in report.pop("examples"):
        say(f"wrong: {example}")
    say(json.dumps(report))
    return 0 if not report["wrong_or_lost"] and not report["left_in_server"] else 1


if __name__ == "__main__":
    sys.exit(main())
