"""Says when the server answers: to main.py, to systemd, and by a curl line that works as pasted."""

import argparse
import contextlib
import http.client
import json
import os
import shlex
import socket
import ssl
import sys
import threading
import time

from cast_serve.server.key import keys_of
from cast_serve.server.main import READY_FD

POLL_SECONDS = 0.5
TIMEOUT_SECONDS = 5


def announce_when_ready(args: argparse.Namespace) -> threading.Event:
    """Tell main.py and systemd, and print a curl line, once the server of `args` answers.

    Returns at once, an event that is set once it answers: a daemon thread polls, since vLLM has no
    hook after its socket is served. A headless one has no socket: it counts as ready, and its
    event is never set.
    """
    answers = threading.Event()
    if args.headless:
        _tell()
    else:
        poll = threading.Thread(target=_announce, args=(args, answers), daemon=True, name="ready")
        poll.start()
    return answers


def curl_line(args: argparse.Namespace) -> str:
    """A shell line that completes a prompt on the server that `args` start."""
    name = args.served_model_name[0] if args.served_model_name else args.model
    body = {"model": name, "prompt": "It was a fine day, and", "max_tokens": 32}
    # -k: the certificate need not name the address that the server is reached by here.
    words = ["curl", "-sk"] if args.ssl_certfile else ["curl", "-s"]
    # Whose, only its user knows.
    words += ["--cert", "CLIENT.pem"] if _wants_certificate(args) else []
    words += ["--unix-socket", args.uds] if args.uds else []
    words.append(f"{_root(args)}/v1/completions")
    words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    line = shlex.join(words)
    if keys_of(args):
        # Not the key itself: it would end up in logs.
        line += ' -H "Authorization: Bearer $VLLM_API_KEY"'
    return line


def _root(args: argparse.Namespace) -> str:
    """The server's URL on this machine."""
    host, port = address(args)
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{'https' if args.ssl_certfile else 'http'}://{authority}"


def address(args: argparse.Namespace) -> tuple[str, int]:
    """Host and port under which this machine reaches the server."""
    any_host = {"": "localhost", "0.0.0.0": "localhost", "::": "::1"}
    host = args.host or ""
    return any_host.get(host, host), args.port


def _announce(args: argparse.Namespace, answers: threading.Event) -> None:
    while not _answers(args):
        time.sleep(POLL_SECONDS)
    answers.set()
    _tell()
    what = "Try:" if args.no_ui or args.uds else f"Open {_root(args)}/ or try:"
    print(f"\nReady. {what}\n\n  {curl_line(args)}\n", file=sys.stderr, flush=True)


def _tell() -> None:
    # main.py waits for this: from now on a signal drains.
    if writer := os.environ.get(READY_FD):
        os.write(int(writer), b"1")
    # sd_notify(3). A name that begins with @ is one of the abstract namespace.
    if name := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.sendto(b"READY=1", name.replace("@", "\0", 1) if name[0] == "@" else name)


class _Connection(http.client.HTTPConnection):
    """To the server of `args`, whatever it listens on."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self.args = args

    def connect(self) -> None:
        self.sock = _connect(self.args)
        if self.args.ssl_certfile:
            # The certificate is the server's own; only whether it answers matters here.
            self.sock = ssl._create_unverified_context().wrap_socket(self.sock)


def _connect(args: argparse.Namespace) -> socket.socket:
    if not args.uds:
        return socket.create_connection(address(args), TIMEOUT_SECONDS)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(TIMEOUT_SECONDS)
    try:
        connected.connect(args.uds)
    except OSError:
        connected.close()
        raise
    return connected


def _answers(args: argparse.Namespace) -> bool:
    try:
        if _wants_certificate(args):
            # It answers nobody without one. vLLM listens only once it serves.
            _connect(args).close()
            return True
        with contextlib.closing(_Connection(args)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def _wants_certificate(args: argparse.Namespace) -> bool:
    return bool(args.ssl_certfile) and args.ssl_cert_reqs == ssl.CERT_REQUIRED
