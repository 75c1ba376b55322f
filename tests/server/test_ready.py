"""Who is told that the server serves: main.py and systemd, the user by a line to paste."""

import argparse
import http.server
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cast_serve.server.main import READY_FD
from cast_serve.server.ready import announce_when_ready

FLAGS = {
    **{"host": None, "port": 8000, "uds": None, "headless": False, "ssl_certfile": None},
    **{"model": "m", "served_model_name": None, "api_key": None, "no_ui": False},
}


class Health(http.server.BaseHTTPRequestHandler):
    """/health of a server that is not well the first time."""

    answers: Iterator[int] = iter(())

    def do_GET(self):
        self.send_response(next(Health.answers))
        self.end_headers()

    def address_string(self):
        return "a socket in the file system"

    def log_message(self, *args):
        pass


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path, monkeypatch) -> Iterator[socket.socket]:
    """The socket that systemd listens on, under either kind of name."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name.replace("@", "\0", 1) if name[0] == "@" else name)
        listening.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listening


@pytest.fixture
def pipe(monkeypatch) -> Iterator[int]:
    reader, writer = os.pipe()
    monkeypatch.setenv(READY_FD, str(writer))
    yield reader
    os.close(reader)
    os.close(writer)


def test_socket_in_the_file_system(tmp_path: Path, systemd, pipe, capfd):
    Health.answers = iter([503, 200])
    path = str(tmp_path / "server")
    with socketserver.UnixStreamServer(path, Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        announce_when_ready(argparse.Namespace(**{**FLAGS, "uds": path}))
        assert systemd.recv(100) == b"READY=1"
        assert os.read(pipe, 1) == b"1"
        for announcer in [t for t in threading.enumerate() if t.name == "ready"]:
            announcer.join(timeout=10)
        server.shutdown()
    assert next(Health.answers, None) is None
    assert f"curl -s --unix-socket {path} http://localhost:8000/v1/comp" in capfd.readouterr().err


def test_without_a_socket(systemd, pipe, capfd):
    announce_when_ready(argparse.Namespace(**{**FLAGS, "headless": True}))
    assert systemd.recv(100) == b"READY=1"
    assert os.read(pipe, 1) == b"1"
    assert capfd.readouterr().err == ""
