"""What the server's process says where it does not start, without an engine."""

import argparse
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm.logger
from safetensors.torch import load_file, save_file
from torch import OutOfMemoryError
from vllm.platforms import current_platform

from cast_serve.model_loaders.convert import convert
from cast_serve.server import load_failure, serve
from cast_serve.server.arguments import parse
from cast_serve.server.main import WRONG_USAGE
from tests.support.tiny_models import drop_quantization

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "tiny-llama-2of4")


@pytest.fixture(autouse=True)
def environment():
    """As it was, after what serve.py sets for its children, and the loggers that it takes over."""
    before = dict(os.environ)
    loggers = [logging.getLogger(name) for name in ("cast_serve", "vllm")]
    states = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    os.environ.clear()
    os.environ.update(before)
    for logger, (handlers, level, propagate) in zip(loggers, states, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def start(monkeypatch, capfd):
    """Runs serve.py on a command line: its status, and what it has written to stderr."""

    def run(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cast-serve", *flags])
        try:
            status = serve._run()
        except SystemExit as exited:
            status = exited.code
        return status, capfd.readouterr().err

    return run


WRONG = {
    "tool parser": ["--enable-auto-tool-choice", "--tool-call-parser", "nope"],
    "no tool parser": ["--enable-auto-tool-choice"],
    "reasoning parser": ["--reasoning-parser", "nope"],
    "missing": ["--config", "missing.yaml"],
    "no value": ["--config"],
    "twice": ["--config", "whole.yaml", "--config", "whole.yaml"],
    "broken": ["--config", "broken.yaml"],
    "empty": ["--config", "empty.yaml"],
    "list": ["--config", "list.yaml"],
    "other": ["--config", "other.toml"],
    "logs": ["--log-config-file", "missing.json"],
    "another front end": ["--grpc"],
    "port too high": ["--port", "99999"],
    "negative port": ["--port=-5"],
    "chat template": ["--chat-template", "missing.jinja"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_a_line(start, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.yaml").write_text("seed: 1\n")
    (tmp_path / "broken.yaml").write_text("seed: [1\n  x: {\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("- seed\n")
    status, said = start("--model", EXAMPLE, *WRONG[name])
    assert status == WRONG_USAGE
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("cast-serve: ")


@pytest.mark.skipif(
    not hasattr(vllm.logger, "configure_logging_from_args"),
    reason="this vLLM configures logs when it is imported",
)
def test_logs_are_configured_by_the_arguments(start, monkeypatch):
    given = []
    monkeypatch.setattr("vllm.logger.configure_logging_from_args", given.append)
    assert start("--model", EXAMPLE, "--check-only", "--log-level", "ERROR")[0] == 0
    assert [args.log_level for args in given] == ["ERROR"]


OVERRIDES = '{"quantization_config": {"quant_method": "cast"}}'


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--load-format", "dummy"], "--load-format dummy does not load config.json"),
        (["--load-format", "mistral"], "--load-format mistral does not load config.json"),
        (["--hf-overrides", OVERRIDES], "--hf-overrides has another quantization_config"),
    ],
)
def test_check_that_would_be_of_something_else(start, flags, why):
    status, said = start("--model", EXAMPLE, "--check-only", *flags)
    assert status == 1
    assert said.splitlines()[-1].startswith(f"cast-serve: {EXAMPLE}: {why}")
    assert said.endswith(", so nothing was checked\n")


def test_load_format_in_capitals(start):
    assert start("--model", EXAMPLE, "--check-only", "--load-format", "Safetensors")[0] == 0


@pytest.mark.parametrize("value", ["1", "true"])
def test_rust_front_end_is_refused(start, monkeypatch, value):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    status, said = start("--model", EXAMPLE)
    assert status == WRONG_USAGE
    assert "VLLM_USE_RUST_FRONTEND: the API key" in said


@pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU's cache is what is left")
@pytest.mark.parametrize(
    ("flags", "cache"),
    [
        ([], 2),
        (["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"], 0.5),
        (["--tensor-parallel-size", "2", "--data-parallel-size", "4"], 0.25),
        (["--data-parallel-size", "4", "--data-parallel-size-local", "2"], 1),
        (["--data-parallel-size", "4", "--data-parallel-rank", "1"], 2),
        (["--tensor-parallel-size", "4", "--nnodes", "2"], 1),
    ],
)
def test_cache_on_a_cpu_is_a_quarter_of_what_is_free(monkeypatch, flags, cache):
    free = SimpleNamespace(available=8 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    args = parse(["--model", EXAMPLE, *flags])
    assert args.kv_cache_memory_bytes == cache * (1 << 30)


@pytest.fixture
def answers() -> threading.Event:
    """Whether the server has answered."""
    return threading.Event()


@pytest.fixture
def args(tmp_path, monkeypatch, answers):
    """Those of a server of a damaged checkpoint, whose engine is not started."""
    monkeypatch.setattr("cast_serve.server.ready.announce_when_ready", lambda args: answers)
    monkeypatch.setattr("cast_serve.server.shutdown.quiet_engine_exit", lambda: None)
    (tmp_path / "config.json").write_text("{")
    return argparse.Namespace(model=str(tmp_path), load_format="auto")


def engine_fails(monkeypatch, failure: Exception, during: Callable[[Exception], None]) -> None:
    """vLLM's own log of an engine that fails, and then what the server's process gets."""

    def cmd(args: argparse.Namespace) -> None:
        load_failure.tell_of_failures()
        logger = logging.getLogger(load_failure.LOGGERS[0])
        try:
            during(failure)
        except Exception:
            logger.exception("WorkerProc failed to start.")
        finally:
            logger.filters.clear()
        raise RuntimeError("Engine core initialization failed.\nSee root cause above.")

    monkeypatch.setattr("vllm.entrypoints.cli.serve.ServeSubcommand.cmd", cmd)


def load_weights(failure: Exception) -> None:
    raise failure


def allocate_cache(failure: Exception) -> None:
    raise failure


REASON = "cast-serve: RuntimeError: Engine core initialization failed. See root cause above."


def test_weights_are_checked_where_they_failed(args, monkeypatch, capfd):
    """After what vLLM says, and announced: it may take minutes."""
    engine_fails(monkeypatch, ValueError("x"), load_weights)
    assert serve._serve(args) == 1
    reason, announced, fault = capfd.readouterr().err.splitlines()[-3:]
    assert reason == REASON
    assert announced == f"cast-serve: checking the weights in {args.model}"
    assert fault.startswith(f"cast-serve: {args.model}/config.json: is not valid JSON")


def copy_plain_without_norm(folder: Path) -> str:
    """Only vLLM looks for what is missing in a plain checkpoint."""
    shutil.rmtree(folder)
    convert(Path(EXAMPLE), folder, to="dense")
    drop_quantization(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file}: norm.weight: is missing; the checkpoint is incomplete"


def copy_whole(folder: Path) -> str:
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    return f"the weights in {folder} are whole by themselves, but do not load: ValueError: x y"


@pytest.mark.parametrize("copy", [copy_plain_without_norm, copy_whole])
def test_what_is_wrong_with_weights_that_do_not_load(args, monkeypatch, capfd, copy):
    wanted = copy(Path(args.model))
    engine_fails(monkeypatch, ValueError("x\ny"), load_weights)
    assert serve._serve(args) == 1
    assert capfd.readouterr().err.splitlines()[-1] == f"cast-serve: {wanted}"


@pytest.mark.parametrize(
    ("failure", "during"),
    [
        pytest.param(ValueError("KV cache"), allocate_cache, id="cache too small"),
        pytest.param(OutOfMemoryError("CUDA out of memory"), load_weights, id="GPU too small"),
    ],
)
def test_weights_are_not_checked_in_vain(args, monkeypatch, capfd, failure, during):
    engine_fails(monkeypatch, failure, during)
    assert serve._serve(args) == 1
    assert capfd.readouterr().err.splitlines()[-1] == REASON


def test_weights_are_not_checked_once_it_has_served(args, answers, monkeypatch, capfd):
    """Whatever an engine dies of."""
    answers.set()
    engine_fails(monkeypatch, ValueError("x"), load_weights)
    assert serve._serve(args) == 1
    assert capfd.readouterr().err.splitlines()[-1] == REASON


def test_port_0_is_a_port_that_can_be_asked():
    args = argparse.Namespace(uds=None, headless=False, host="127.0.0.1", port=0)
    serve._require_free_port(args)
    assert args.port >= 1024
