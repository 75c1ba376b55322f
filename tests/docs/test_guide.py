"""The estimates that the guide states are those that its command prints."""

import json
import re
from pathlib import Path

import pytest

from cast_serve.trainer.main import main

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
ROW = re.compile(r"\| (Llama-2-\w+)(?:, `(--offload)`)? \| (\d+) GB([^|]*)\|([^|]*)\|")


@pytest.mark.parametrize("model", ["Llama-2-7B", "Llama-2-13B", "Llama-2-70B", "--offload"])
def test_estimates(model, capsys):
    rows = {row[2] or row[1]: row for row in ROW.finditer(GUIDE.read_text())}
    name, offload, gigabytes, more, speed = rows[model].groups()
    flags = ["--gpu", "h100", "--processes", "8", "--gradient-accumulation", "32"]
    flags += [offload] if offload else []
    status = main(["estimate", "--model", name.lower(), *flags, "--tokens", "7.5e9"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert round(sum(found["gpu_bytes"].values()) / 1e9) == int(gigabytes)
    assert status == ("does not fit" in more)
    if speed.strip():
        assert found["tokens_per_s"] == pytest.approx(int(speed.replace(",", "")), rel=0.02)
