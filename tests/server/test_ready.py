"""Who is told that the server serves: main.py and systemd, the user by a line to paste."""

import argparse
import datetime
import http.server
import os
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cast_serve.server.main import READY_FD
from cast_serve.server.ready import announce_when_ready

FLAGS = {
    **{"host": None, "port": 8000, "uds": None, "headless": False},
    **{"ssl_certfile": None, "ssl_cert_reqs": ssl.CERT_NONE},
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


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """A certificate signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    signed = builder.sign(key, hashes.SHA256()).public_bytes(pem)
    file.write_bytes(key.private_bytes(pem, *plain) + signed)
    return file


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
@pytest.mark.parametrize("asks_for", [ssl.CERT_NONE, ssl.CERT_REQUIRED])
def test_over_tls(tmp_path, certificate, pipe, capfd, family, asks_for):
    """Also where only clients with a certificate are answered, which cast-serve has none of."""
    Health.answers = iter([200])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.load_verify_locations(certificate)
    context.verify_mode = asks_for
    kind = {
        socket.AF_INET: socketserver.TCPServer,
        socket.AF_UNIX: socketserver.UnixStreamServer,
    }[family]
    where = ("127.0.0.1", 0) if family is socket.AF_INET else str(tmp_path / "server")
    with kind(where, Health) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        listens = {"uds": where}
        if family is socket.AF_INET:
            listens = dict(zip(("host", "port"), server.server_address, strict=True))
        tls = {"ssl_certfile": str(certificate), "ssl_cert_reqs": asks_for}
        announce_when_ready(argparse.Namespace(**{**FLAGS, **listens, **tls}))
        assert select.select([pipe], [], [], 5)[0]
        for announcer in [t for t in threading.enumerate() if t.name == "ready"]:
            announcer.join(timeout=10)
        server.shutdown()
    assert ("--cert CLIENT.pem" in capfd.readouterr().err) == (asks_for is ssl.CERT_REQUIRED)


def test_without_a_socket(systemd, pipe, capfd):
    announce_when_ready(argparse.Namespace(**{**FLAGS, "headless": True}))
    assert systemd.recv(100) == b"READY=1"
    assert os.read(pipe, 1) == b"1"
    assert capfd.readouterr().err == ""
