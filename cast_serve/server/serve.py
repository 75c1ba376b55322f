"""The server process: checks checkpoint and plugin, then runs vLLM's OpenAI-compatible server."""

import argparse
import os
import socket
import sys
from pathlib import Path

from cast_serve.server.main import ENDED, fail
from cast_serve.server.parent import end_with_parent

# What vLLM raises when an engine cannot start or an argument does not fit the model.
ENGINE_ERRORS = (RuntimeError, ValueError, OSError, AssertionError, NotImplementedError)


def main() -> None:
    """Process entry; main.py starts it."""
    end_with_parent()
    # As vLLM's own console script does: fork would copy a started accelerator runtime.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    sys.exit(_run())


def _run() -> int:
    from cast_serve.server import plugin

    try:
        plugin.require()
    except (RuntimeError, ImportError) as error:
        return fail(str(error))

    from vllm.entrypoints.cli.serve import validate_parsed_serve_args
    from vllm.platforms import current_platform

    from cast_serve.envs import forced_kernel
    from cast_serve.kernels.selection import forced_spec
    from cast_serve.model_loaders.errors import CheckpointError
    from cast_serve.server.arguments import parse
    from cast_serve.server.report import report

    if current_platform.is_cpu():
        # vLLM 0.32 saves what it compiled for a CPU in a form that it fails to load, so it compiles
        # at every start. Inductor's own cache works.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    try:
        if forced := forced_kernel():
            forced_spec(forced)
    except ValueError as error:
        return fail(str(error))
    try:
        args = parse()
        if args.load_format != "dummy":
            report(args.model, args.quantization, args.kv_cache_memory_bytes)
    except CheckpointError as error:
        return fail(str(error))
    if args.check_only:
        found = Path(args.model).is_dir()
        return 0 if found else fail(f"{args.model}: no such folder, so nothing was checked")
    try:
        validate_parsed_serve_args(args)
        _require_free_port(args)
    except (ValueError, TypeError, KeyError, OSError) as error:
        return fail(str(error))
    return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from cast_serve.server.ready import announce_when_ready
    from cast_serve.server.shutdown import quiet_engine_exit

    quiet_engine_exit()
    announce_when_ready(args)
    try:
        ServeSubcommand.cmd(args)
    except ENGINE_ERRORS as error:
        fault = None if args.load_format == "dummy" else _fault(args.model)
        return fail(fault or f"{type(error).__name__}: {error}")
    return ENDED


def _fault(model: str) -> str | None:
    """What is wrong with the data of the checkpoint, None if that is not why the engine failed."""
    from cast_serve.model_loaders.check import check
    from cast_serve.model_loaders.checkpoint import Checkpoint
    from cast_serve.model_loaders.errors import CheckpointError

    if not Path(model).is_dir():
        return None
    try:
        problems = (found.problem for found in check(Checkpoint.open(Path(model))))
        return next(filter(None, problems), None)
    except CheckpointError as error:
        return str(error)


def _require_free_port(args: argparse.Namespace) -> None:
    """Raise OSError if the port is taken, before the minutes that an engine start may take."""
    if args.uds or args.headless:
        return
    family = socket.AF_INET6 if ":" in (args.host or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host or "", args.port))
        except OSError as error:
            where = f"{args.host or '*'}:{args.port}"
            raise OSError(f"cannot listen on {where} ({error.strerror}); see --port") from error


if __name__ == "__main__":
    main()
