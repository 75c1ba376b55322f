"""The command line of cast-serve: that of `vllm serve`, and a few flags of ours."""

import argparse
import os
from collections.abc import Sequence

import psutil
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cast_serve.server.body_limit import MAX_REQUEST_BYTES
from cast_serve.server.drain import WATCHED
from cast_serve.server.facts import EXTENSION

LAST_PORT = 65535

# vLLM's own default is 0, which aborts the requests in flight.
DRAIN_SECONDS = 60

# On a CPU vLLM would take 92 % of the memory, and refuse to start where that much is not free.
CPU_CACHE_BYTES = 4 * 2**30

# The switch of vLLM's front end in Rust.
RUST = "VLLM_USE_RUST_FRONTEND"

# vLLM's surface for them; the last one is the first to see a request, so these come after any that
# the user names.
MIDDLEWARE = (
    "cast_serve.server.drain.Drain",
    "cast_serve.server.body_limit.LimitBody",
    "cast_serve.server.key.RequireKey",
    "cast_serve.server.errors.OpenAIErrors",
)

DESCRIPTION = """Serve a 2:4 sparse checkpoint through vLLM, with an OpenAI-compatible API.
Takes every flag that `vllm serve` takes (--help=all lists them)."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv`, by default the command line.

    Exits with status 2 if it is wrong, or names no model.
    """
    parser = FlexibleArgumentParser(
        prog="cast-serve",
        usage="cast-serve --model DIR [options]",
        description=DESCRIPTION,
    )
    own = parser.add_argument_group("cast-serve")
    own.add_argument(
        "--check-only",
        action="store_true",
        help="read the checkpoint's headers, print the report, and stop",
    )
    # main.py answers it, before this process is started.
    own.add_argument(
        "--version",
        action="store_true",
        help="print versions, the GPU and the kernels that run here, and stop",
    )
    own.add_argument("--no-ui", action="store_true", help="no page at /")
    own.add_argument(
        "--max-request-bytes",
        type=int,
        default=MAX_REQUEST_BYTES,
        help="answer 413 to a request with a larger body (default: %(default)s)",
    )
    parser = make_arg_parser(parser)
    # No default model: vLLM's would be downloaded, and is not sparse.
    parser.set_defaults(
        model=None,
        shutdown_timeout=DRAIN_SECONDS,
        worker_extension_cls=EXTENSION,
        disable_access_log_for_endpoints=WATCHED,
    )
    args = parser.parse_args(None if argv is None else list(argv))
    args.middleware = [*args.middleware, *MIDDLEWARE]
    args.model = args.model_tag or args.model
    if args.model is None:
        parser.error("which checkpoint? Give --model DIR")
    if not 0 <= args.port <= LAST_PORT:
        parser.error(f"--port {args.port}: from 0, which takes a free one, to {LAST_PORT}")
    if args.max_request_bytes < 1:
        parser.error(f"--max-request-bytes {args.max_request_bytes}: at least 1")
    _require_own_front_end(args, parser)
    if current_platform.is_cpu() and not _sizes_cache(args, parser):
        share = psutil.virtual_memory().available // 4
        args.kv_cache_memory_bytes = min(CPU_CACHE_BYTES, share // _ranks_here(args))
    return args


def _require_own_front_end(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse vLLM's other front ends: they know nothing of key, limits, drain and readiness."""
    for asked, name in (
        (getattr(args, "grpc", False), "--grpc"),
        (os.environ.get(RUST, "0") not in ("", "0"), RUST),
    ):
        if asked:
            parser.error(
                f"{name}: the API key, size limits, draining and readiness are of the HTTP server "
                "in Python; leave it out, or use `vllm serve`, which serves the checkpoint too"
            )


def _ranks_here(args: argparse.Namespace) -> int:
    """Workers on this machine, each of which has a KV cache."""
    ranks: int = args.tensor_parallel_size * args.pipeline_parallel_size
    if args.data_parallel_rank is not None or args.data_parallel_external_lb:
        # A server of its own for every replica.
        return ranks
    if args.data_parallel_size_local is not None:
        return max(1, ranks * args.data_parallel_size_local)
    return max(1, ranks * args.data_parallel_size // args.nnodes)


def _sizes_cache(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Whether the user has said how much memory the KV cache gets."""
    return bool(
        args.kv_cache_memory_bytes
        or args.gpu_memory_utilization != parser.get_default("gpu_memory_utilization")
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    )
