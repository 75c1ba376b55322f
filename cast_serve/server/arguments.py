"""The command line of cast-serve: that of `vllm serve`, and a few flags of ours."""

import argparse
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

# vLLM's own default is 0, which aborts the requests in flight.
DRAIN_SECONDS = 60

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
    parser = make_arg_parser(parser)
    # No default model: vLLM's would be downloaded, and is not sparse.
    parser.set_defaults(model=None, shutdown_timeout=DRAIN_SECONDS)
    args = parser.parse_args(None if argv is None else list(argv))
    args.model = args.model_tag or args.model
    if args.model is None:
        parser.error("which checkpoint? Give --model DIR")
    return args
