"""cast-bench: the benchmarks by name; what follows the name is theirs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# Imported when asked for: one needs a GPU's packages, the others vLLM.
COMMANDS = {
    "linear": "kernels against cuBLAS, layer by layer",
    "latency": "a batch without a server, dense vLLM and cast-serve",
    "throughput": "many requests without a server, dense vLLM and cast-serve",
    "load": "what loading takes, dense vLLM and cast-serve",
    "optim": "a step of AdamS against AdamW, fused",
    "train": "a training step of CAST against plain fine-tuning",
    "serve": "the OpenAI-compatible server, dense vLLM and cast-serve",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status: the benchmark's, 2 on wrong usage."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="cast-bench",
        usage="cast-bench NAME [options]",
        description="Benchmarks of kernels and of serving; `cast-bench NAME --help` for one.",
        epilog="\n".join(f"{name:12} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=COMMANDS, help="the benchmark")
    name = parser.parse_args(given[:1]).name
    return importlib.import_module(f"cast_serve.bench.bench_{name}").main(given[1:])


if __name__ == "__main__":
    sys.exit(main())
