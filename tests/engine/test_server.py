"""cast-serve as its users run it: a process, OpenAI's client, signals."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file
from server_process import CAST_SERVE, ENVIRONMENT, Server
from vllm.platforms import current_platform

from cast_serve.model_loaders.convert import convert
from cast_serve.server.ready import curl_line

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def packed(stored, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "packed"
    convert(stored("llama"), folder, to="packed")
    return folder


@pytest.fixture(scope="module")
def server(packed, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server"
    # Eager: compiled code rounds differently from the eager engine that it is compared with.
    flags = ("--max-model-len", "256", "--served-model-name", "tiny", "--enforce-eager")
    running = Server(packed, log, *flags)
    running.wait_ready()
    yield running
    running.stop(signal.SIGTERM)


def test_curl_line(server):
    printed = subprocess.run(server.wait_ready(), shell=True, capture_output=True, check=True)
    assert len(json.loads(printed.stdout)["choices"][0]["text"]) > 0


def test_completion_tokens(server, oracle):
    completion = server.client().completions.create(
        model="tiny",
        prompt=[[5, 6, 7, 8], [300, 12, 44, 190, 77, 3, 3, 9, 10]],
        max_tokens=12,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    expected = oracle("llama")
    assert [choice.token_ids for choice in completion.choices] == expected.tokens
    for choice, logprobs in zip(completion.choices, expected.logprobs, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-3)


def test_chat(server):
    chat = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "it was"}], max_tokens=5
    )
    assert chat.usage.completion_tokens == 5
    assert chat.choices[0].finish_reason == "length"


def test_streaming_is_the_whole(server):
    options = {"model": "tiny", "prompt": "it was", "max_tokens": 20, "temperature": 0}
    whole = server.client().completions.create(**options).choices[0].text
    chunks = list(server.client().completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 2


def test_report(server):
    report = server.log.read_text()
    assert re.search(r"^format +packed, bfloat16 *$", report, re.MULTILINE)
    assert re.search(r"^layers +14 sparse, 1 dense *$", report, re.MULTILINE)
    assert re.search(r"^KV cache +\d\.\d GiB on each rank", report, re.MULTILINE)


def test_info_of_layers_that_run_dense(server):
    """As they do on a CPU, which their bytes say too; test_metrics.py has the rest."""
    info = httpx.get(f"{server.url}/v1/cast/info").json()
    assert info["model"]["format"] == "packed"
    assert info["device"] == "cpu"
    assert info["linears"] == {"sparse": 14, "dense": 0}
    assert info["weights"]["bytes"] == info["weights"]["bytes_if_dense"]
    for layer in info["layers"]:
        assert (layer["sparse"], layer["packed"], layer["sparsity"]) == (True, False, 0.5)
    assert {row["kernel"] for entry in info["kernels"] for row in entry["plan"]} == {"dense"}
    assert 'cast_serve_sparse_layers{held="dense"} 14.0' in httpx.get(f"{server.url}/metrics").text


@pytest.mark.slow
def test_ctrl_c_drains(packed, tmp_path):
    server = Server(packed, tmp_path / "log", "--served-model-name", "tiny", "--enforce-eager")
    server.wait_ready()
    assert_drains(server, signal.SIGINT)


def assert_drains(server: Server, number: signal.Signals) -> None:
    """The stream in flight ends by itself, and then the server."""
    stream = server.client().completions.create(
        model="tiny", prompt="it was", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = [next(stream)]
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    reader.start()
    assert server.stop(number) == 0
    reader.join(timeout=60)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_sigterm_drains_several_api_servers(packed, tmp_path):
    """Both end their streams, and refuse what comes after the signal."""
    flags = ("--served-model-name", "tiny", "--enforce-eager", "--api-server-count", "2")
    server = Server(packed, tmp_path / "log", *flags)
    server.wait_ready()
    begun = threading.Barrier(9)
    refused = threading.Event()
    ends: list[list[str]] = []

    # Unread, a stream is in flight however early the engine is done with it, if it is more than
    # sockets hold: 4 MiB on the server's side. Every event has the id of its request.
    asked = {"model": "tiny", "prompt": "it was", "max_tokens": 200, "ignore_eos": True}
    headers = {"X-Request-Id": "x" * 2**15}
    little = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)]

    def read() -> None:
        transport = httpx.HTTPTransport(socket_options=little)
        with (
            httpx.Client(transport=transport, base_url=server.url, timeout=120) as client,
            client.stream(
                "POST", "/v1/completions", json={**asked, "stream": True}, headers=headers
            ) as answer,
        ):
            lines = answer.iter_lines()
            first = next(lines)
            begun.wait(timeout=120)
            refused.wait(timeout=120)
            *_, last, done = filter(None, [first, *lines])
            reason = json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
            ends.append([reason, done])

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    begun.wait(timeout=120)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("(?s)requests in flight get.*requests in flight get")
    late = httpx.get(f"{server.url}/v1/models", timeout=30)
    assert (late.status_code, late.json()["error"]["code"]) == (503, 503)
    refused.set()
    assert server.process.wait(timeout=90) == 0
    for reader in readers:
        reader.join(timeout=60)
    assert ends == [["length", "data: [DONE]"]] * 8
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["^format ", "Initializing a V1 LLM engine"])
def test_stopped_while_starting(packed, tmp_path, moment, number):
    starting = Server(packed, tmp_path / "log")
    starting.wait_for(moment)
    begin = time.monotonic()
    assert starting.stop(number) == 0
    assert time.monotonic() - begin < 10
    assert "Traceback" not in starting.log.read_text()


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CAST_SERVE, *flags], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


def last_line(process: subprocess.CompletedProcess[str]) -> str:
    return process.stderr.strip().splitlines()[-1]


def test_check_only(packed):
    checked = run("--model", str(packed), "--check-only")
    assert checked.returncode == 0
    assert "14 sparse, 1 dense" in checked.stderr
    assert "Initializing" not in checked.stdout + checked.stderr


@pytest.mark.slow
def test_check_only_checks_something():
    """A mistyped folder looks like the name of a model on a hub."""
    mistyped = run("--model", "sparse/lama", "--check-only")
    assert mistyped.returncode == 1
    assert last_line(mistyped) == "cast-serve: sparse/lama: no such folder, so nothing was checked"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("marlin", "CAST_SERVE_KERNEL=marlin: no kernel 'marlin'"),
        pytest.param(
            "wgmma_sp",
            "CAST_SERVE_KERNEL=wgmma_sp needs a GPU; on a CPU there is reference",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU runs it"),
            ],
        ),
    ],
)
def test_kernel_that_cannot_be_forced(packed, monkeypatch, kernel, said):
    monkeypatch.setitem(ENVIRONMENT, "CAST_SERVE_KERNEL", kernel)
    refused = run("--model", str(packed), "--check-only")
    assert refused.returncode == 1
    assert last_line(refused).startswith(f"cast-serve: {said}")


def test_refuses_before_loading(packed, tmp_path):
    convert(packed, tmp_path / "cut", to="packed")
    file = tmp_path / "cut" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refused = run("--model", str(tmp_path / "cut"))
    assert refused.returncode == 1
    assert last_line(refused).startswith(f"cast-serve: {file}: ")
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_bad_data_named_last(packed, tmp_path):
    """What no header shows is found by the engine, and said in one line after its log."""
    convert(packed, tmp_path / "nan", to="packed")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.compressed"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    failed = run("--model", str(tmp_path / "nan"), "--port", "0")
    assert failed.returncode == 1
    assert last_line(failed).startswith(f"cast-serve: {file}: {name}: nan at row 0, column ")


@pytest.mark.slow
def test_port_taken(packed):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = run("--model", str(packed), "--host", "127.0.0.1", "--port", port)
    assert refused.returncode == 1
    assert last_line(refused) == (
        f"cast-serve: cannot listen on 127.0.0.1:{port} (Address already in use); see --port"
    )


def test_broken_plugin(packed):
    """vLLM alone would log the import error and die later of an unknown quantization method."""
    program = (
        "import sys; sys.modules['cast_serve.config'] = None;"
        "from cast_serve.server.serve import main; main()"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program, "--model", str(packed)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert failed.returncode == 1
    assert last_line(failed).startswith("cast-serve: the vLLM plugin cannot be imported: ")
    assert "cast_serve.config" in last_line(failed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "http://localhost:8000/v1/completions"),
        ({"host": "::"}, "http://[::1]:8000/v1/completions"),
        ({"host": "10.1.2.3", "port": 99}, "http://10.1.2.3:99/v1/completions"),
        ({"ssl_certfile": "c.pem"}, "curl -sk https://localhost:8000/v1/completions"),
        ({"ssl_certfile": "c.pem", "ssl_cert_reqs": 2}, "curl -sk --cert CLIENT.pem https://"),
        ({"api_key": ["secret"]}, '-H "Authorization: Bearer $VLLM_API_KEY"'),
        ({"served_model_name": ["it's"]}, "it'\"'\"'s"),
        ({"uds": "/run/s"}, "curl -s --unix-socket /run/s http://localhost:8000/v1/completions"),
    ],
)
def test_curl_line_fits_flags(changed, expected):
    flags = {
        "host": None,
        "port": 8000,
        "uds": None,
        "ssl_certfile": None,
        "ssl_cert_reqs": 0,
        "api_key": None,
        "served_model_name": None,
        "model": "m",
    }
    line = curl_line(argparse.Namespace(**{**flags, **changed}))
    assert expected in line
    assert "secret" not in line


def test_sigterm_drains(server):
    """The last test of this file: it ends the server that the others share."""
    assert_drains(server, signal.SIGTERM)
