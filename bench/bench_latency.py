"""How long does a batch take without a server, dense and 2:4?

    python -m bench.bench_latency                                      Llama-3.1-8B; three minutes
    python -m bench.bench_latency --engines dense-bf16,sparse-bf16 --requests 1,16
    python -m bench.bench_latency --model tiny --requests 1 --iterations 3       on a CPU, a minute

Runs    `vllm bench latency` on each engine of bench_serve: random token ids, random weights. The
        engine is driven in-process, without the server's asynchronous scheduling.
Roof    as in bench_serve.
Writes  latency-GPU.json under --out, after every batch. The last line on stdout is one JSON object.
"""

import argparse
import sys
from collections.abc import Sequence

from cast_serve.bench.arguments import numbers, require_one
from cast_serve.bench.serving.arguments import add_common_arguments, split_flags
from cast_serve.bench.serving.offline import Job, add_lengths, run

WARMUPS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a batch failed, 2 cannot run as asked."""
    own, flags = split_flags(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="cast-bench latency",
        description="Time batches with `vllm bench latency` on dense vLLM and cast-serve.",
        epilog="Flags after -- go to every engine",
    )
    add_common_arguments(parser)
    add_lengths(parser, requests="1,64", input_len=512, output_len=128)
    parser.add_argument("--iterations", type=int, default=5, metavar="N", help="of each batch")
    given = parser.parse_args(own)
    try:
        batches = numbers("--requests", given.requests)
        require_one("--iterations", given.iterations)
    except ValueError as error:
        print(f"bench_latency: {error}", file=sys.stderr)
        return 2
    iterations = ("--num-iters", str(given.iterations), "--num-iters-warmup", str(WARMUPS))
    jobs = [
        Job(
            benchmark="latency",
            requests=batch,
            input_len=given.input_len,
            output_len=given.output_len,
            flags=("--batch-size", str(batch), *iterations),
        )
        for batch in batches
    ]
    return run(given, jobs, flags)


if __name__ == "__main__":
    sys.exit(main())
