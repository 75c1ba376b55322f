"""The server process: checks checkpoint and plugin, then runs vLLM's OpenAI-compatible server."""

import argparse
import os
import socket
import sys
from pathlib import Path

import yaml

from cast_serve.server.main import ENDED, PARENT, WRONG_USAGE, fail
from cast_serve.server.parent import end_with_parent

# What vLLM raises when an engine cannot start or an argument does not fit the model.
ENGINE_ERRORS = (RuntimeError, ValueError, OSError, AssertionError, NotImplementedError, KeyError)

# What its set-up of logs raises of a file that cannot be read, or is none of logging.config.
LOGGING_ERRORS = (RuntimeError, OSError, ValueError, TypeError, AttributeError)

# What its parser raises of a --config that cannot be read; AttributeError of one that is a list, or
# empty. All else that is wrong with the command line is SystemExit.
CONFIG_ERRORS = (OSError, ValueError, AssertionError, AttributeError, yaml.YAMLError)


def main() -> None:
    """Process entry; main.py starts it."""
    if parent := os.environ.pop(PARENT, ""):
        end_with_parent(int(parent))
    # As vLLM's own console script does: fork would copy a started accelerator runtime.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    sys.exit(_run())


def _run() -> int:
    from cast_serve.server import plugin

    try:
        plugin.require()
    except (RuntimeError, ImportError) as error:
        return fail(str(error))

    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    from cast_serve.envs import forced_kernel
    from cast_serve.kernels.selection import forced_spec
    from cast_serve.layer_plan import forced_on_cpu
    from cast_serve.model_loaders.errors import CheckpointError
    from cast_serve.server.arguments import parse
    from cast_serve.server.report import report, why_unchecked

    if current_platform.is_cpu():
        # vLLM 0.32 saves what it compiled for a CPU in a form that it fails to load, so it compiles
        # at every start. Inductor's own cache works.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    try:
        if forced := forced_kernel():
            forced_spec(forced)
            if current_platform.is_cpu():
                forced_on_cpu(forced)
    except ValueError as error:
        return fail(str(error))
    try:
        args = parse()
    except CONFIG_ERRORS as error:
        return fail(
            f"--config takes one YAML file of lines `flag: value`: {_said(error)}", WRONG_USAGE
        )
    try:
        _configure_logging(args)
    except LOGGING_ERRORS as error:
        return fail(f"the configuration of logs: {_said(error)}", WRONG_USAGE)
    unchecked = why_unchecked(args)
    try:
        if unchecked is None:
            report(args.model, args.quantization, args.kv_cache_memory_bytes)
        elif not args.check_only:
            print(
                f"cast-serve: {args.model} is not checked before it is loaded: {unchecked}",
                file=sys.stderr,
            )
    except CheckpointError as error:
        return fail(str(error))
    if args.check_only:
        if unchecked is None and not Path(args.model).is_dir():
            unchecked = "no such folder"
        return fail(f"{args.model}: {unchecked}, so nothing was checked") if unchecked else 0
    try:
        _validate(args)
    except (ValueError, TypeError, KeyError, OSError, VLLMValidationError) as error:
        return fail(_said(error), WRONG_USAGE)
    try:
        _require_free_port(args)
    except OSError as error:
        return fail(str(error))
    return _serve(args)


def _said(error: BaseException) -> str:
    """What an error of vLLM says, in one line."""
    # str of a KeyError is the repr of what it says.
    words = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(words).split())


def _configure_logging(args: argparse.Namespace) -> None:
    """As `vllm serve` does once its arguments are parsed."""
    import vllm.logger

    # Older versions have configured logs by then, from the environment.
    if configure := getattr(vllm.logger, "configure_logging_from_args", None):
        configure(args)


def _validate(args: argparse.Namespace) -> None:
    """Raise what vLLM raises of arguments that it refuses before it reads the model."""
    from vllm.entrypoints.cli.serve import validate_parsed_serve_args
    from vllm.reasoning import ReasoningParserManager

    validate_parsed_serve_args(args)
    try:
        from vllm.entrypoints.launchers.launcher import validate_api_server_args
    except ImportError:
        # Where older versions have it.
        from vllm.entrypoints.openai.api_server import validate_api_server_args
    # A plugin brings parsers of its own, which vLLM imports first.
    if not (args.tool_parser_plugin or args.reasoning_parser_plugin):
        validate_api_server_args(args)
        if args.reasoning_parser:
            ReasoningParserManager.get_reasoning_parser(args.reasoning_parser)


def _serve(args: argparse.Namespace) -> int:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from cast_serve.server import load_failure
    from cast_serve.server.ready import announce_when_ready
    from cast_serve.server.shutdown import quiet_engine_exit

    quiet_engine_exit()
    answers = announce_when_ready(args)
    listening = load_failure.listen()
    try:
        ServeSubcommand.cmd(args)
    except ENGINE_ERRORS as error:
        status = fail(f"{type(error).__name__}: {_said(error)}")
        said = load_failure.heard(listening)
        of_files = args.load_format != "dummy" and Path(args.model).is_dir()
        if said is not None and of_files and not answers.is_set():
            _name_fault(Path(args.model), said)
        return status
    return ENDED


def _name_fault(folder: Path, said: str) -> None:
    """Read all weights, which may take minutes, for a line that names file and tensor.

    Args:
        said: what loading failed of, for weights that are whole and yet do not fit.
    """
    from cast_serve.model_loaders.check import check
    from cast_serve.model_loaders.checkpoint import Checkpoint
    from cast_serve.model_loaders.errors import CheckpointError
    from cast_serve.model_loaders.layers import find_layers, require_whole

    print(f"cast-serve: checking the weights in {folder}", file=sys.stderr, flush=True)
    try:
        checkpoint = Checkpoint.open(folder)
        layers = find_layers(checkpoint)
        require_whole(checkpoint, layers)
        problems = (found.problem for found in check(checkpoint, layers=layers))
        fault = next(filter(None, problems), None)
    except CheckpointError as error:
        fault = str(error)
    fail(fault or f"the weights in {folder} are whole by themselves, but do not load: {said}")


def _require_free_port(args: argparse.Namespace) -> None:
    """Raise OSError if the port is taken, before the minutes that an engine start may take.

    Of --port 0 it makes one that is free, so that it can be said and asked whether it answers.
    """
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
        args.port = probe.getsockname()[1]


if __name__ == "__main__":
    main()
