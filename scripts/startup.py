"""From command to first token: where does the time go?

    python scripts/startup.py --model examples/tiny-llama-2of4
    python scripts/startup.py --repeats 3 --model examples/tiny-llama-2of4 --enforce-eager

Method    Starts cast-serve with the flags given, on a free port, and notes when each line of its
          log comes. When /health says 200 it streams a completion of one token. A phase ends with
          the line that vLLM logs when it is done; one whose line does not come is part of the next.
Noise     The first start after an installation reads 2 GB of libraries from the disk, and the first
          of a model compiles it. The median leaves out the first of several.
Status    0. The last line on stdout is one JSON object: seconds by phase, of every start.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise

import httpx

# What ends, and the line that says so. vLLM 0.26 to 0.32, CPU and GPU.
PHASES = {
    "front end: imports, arguments, the model's configuration": "Resolved architecture",
    "engine's process: imports": r"Initializing a V1 LLM engine",
    "worker's process: imports": r"Starting to load model",
    "weights: read and packed": r"Loading weights took",
    "compilation, warm-up": r"Warming up done|torch\.compile took",
    "KV cache, CUDA graphs": r"init engine .* took",
    "front end: routes": None,
    "first token": None,
}
SERVING, FIRST_TOKEN = list(PHASES)[-2:]
START_SECONDS = 900


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time a start of cast-serve by phase.",
        epilog="All other flags go to cast-serve",
    )
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="starts, one by one")
    given, flags = parser.parse_known_args()
    starts = [timeline(flags) for _ in range(given.repeats)]
    for phase in PHASES:
        seconds = [start[phase] for start in starts if phase in start]
        if seconds:
            print(f"{phase:58}", *(f"{value:7.2f}" for value in seconds))
    totals = [sum(start.values()) for start in starts]
    print(f"{'command to first token':58}", *(f"{total:7.2f}" for total in totals))
    later = totals[1:] or totals
    print(json.dumps({"starts": starts, "median_s": statistics.median(later)}))
    return 0


def timeline(flags: list[str]) -> dict[str, float]:
    """Seconds that each phase of one start took, in order.

    Raises:
        SystemExit: the server ended before it served; with its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120)
    # In the order in which they came.
    ends: dict[str, float] = {}
    lines: list[str] = []
    begun = time.monotonic()
    where = ("--host", "127.0.0.1", "--port", str(port))
    server = subprocess.Popen(
        [sys.executable, "-m", "cast_serve.server.main", *flags, *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def read() -> None:
        assert server.stdout is not None
        for line in server.stdout:
            lines.append(line)
            for phase, pattern in PHASES.items():
                if pattern and phase not in ends and re.search(pattern, line):
                    ends[phase] = time.monotonic()

    threading.Thread(target=read, daemon=True).start()
    try:
        while not is_healthy(client):
            if server.poll() is not None or time.monotonic() - begun > START_SECONDS:
                raise SystemExit("".join(lines) + "startup: the server does not serve")
            time.sleep(0.02)
        ends[SERVING] = time.monotonic()
        first_token(client)
        ends[FIRST_TOKEN] = time.monotonic()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    moments = pairwise([("", begun), *ends.items()])
    return {phase: moment - last for (_, last), (phase, moment) in moments}


def is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def first_token(client: httpx.Client) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "It was", "max_tokens": 1, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        next(answer.iter_lines())


if __name__ == "__main__":
    sys.exit(main())
