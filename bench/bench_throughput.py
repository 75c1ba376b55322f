"""How many tokens a second without a server, dense and 2:4?

    python -m bench.bench_throughput                                   Llama-3.1-8B; three minutes
    python -m bench.bench_throughput --engines dense-bf16,sparse-bf16 --requests 2000
    python -m bench.bench_throughput --model tiny --requests 16 --output-len 16  on a CPU, a minute

Runs    `vllm bench throughput` on each engine of bench_serve: prompts of random words, random
        weights; all requests are there from the start, so the batch is as large as vLLM makes it.
Roof    as in bench_serve.
Writes  throughput-GPU.json under --out. The last line on stdout is one JSON object.
"""

import argparse
import sys
from collections.abc import Sequence

from cast_serve.bench.arguments import numbers
from cast_serve.bench.serving.arguments import add_common_arguments, split_flags
from cast_serve.bench.serving.offline import Job, add_lengths, run

WARMUPS = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a run failed, 2 cannot run as asked."""
    own, flags = split_flags(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="cast-bench throughput",
        description="Count tokens a second with `vllm bench throughput`.",
        epilog="Flags after -- go to every engine",
    )
    add_common_arguments(parser)
    add_lengths(parser, requests="1000", input_len=512, output_len=256)
    given = parser.parse_args(own)
    try:
        batches = numbers("--requests", given.requests)
    except ValueError as error:
        print(f"bench_throughput: {error}", file=sys.stderr)
        return 2
    jobs = [
        Job(
            benchmark="throughput",
            requests=requests,
            input_len=given.input_len,
            output_len=given.output_len,
            flags=(
                *("--dataset-name", "random", "--num-prompts", str(requests)),
                *("--num-warmups", str(WARMUPS)),
            ),
        )
        for requests in batches
    ]
    return run(given, jobs, flags)


if __name__ == "__main__":
    sys.exit(main())
