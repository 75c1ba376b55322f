"""cast-train generate writes texts through vLLM, and goes on where it was stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "tiny-llama-2of4"
DRIVER = """
import sys
from cast_serve.trainer.generation import main
main._BATCH = 16
from cast_serve.trainer.main import main
sys.exit(main(sys.argv[1:]))
"""


def generate(output: Path, tokens: int, *flags: str) -> dict[str, object]:
    settings = ["--model", str(EXAMPLE), "--output", str(output), "--tokens", str(tokens)]
    settings += ["--context", "64", "--least-tokens", "8", *flags]
    command = [sys.executable, "-c", DRIVER, "generate", *settings, "--", "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return summary


def test_generate_and_continue(tmp_path):
    prompts = tmp_path / "beginnings.txt"
    prompts.write_text("The captain stood upon the deck and looked at the sea.\n\n\n" * 40)
    output = tmp_path / "text.jsonl"
    flags = ["--prompts", str(prompts), "--prompt-tokens", "6", "--unprompted", "0.5"]
    first = generate(output, 1500, *flags)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) == first["tokens"] >= 1500
    assert len({row["text"] for row in rows}) == len(rows) == first["texts"]["kept"]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    for row in rows:
        assert 8 <= row["tokens"] <= 63
        assert not any(token in row["text"] for token in tokenizer.all_special_tokens)
    assert any("captain" in row["text"] or "deck" in row["text"] for row in rows)
    # Cut off in the middle of a line, as a killed process leaves it.
    os.truncate(output, output.stat().st_size - 5)
    second = generate(output, 2500, *flags)
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert again[: len(rows) - 1] == rows[:-1]
    assert sum(row["tokens"] for row in again) == second["tokens"] >= 2500
    assert len({row["text"] for row in again}) == len(again)
    requests = [row["request"] for row in again]
    assert requests == sorted(set(requests))


def test_a_continued_file_holds_other_texts(tmp_path):
    """Without prompts nothing but the engine's seed tells one call's texts from another's."""
    output = tmp_path / "text.jsonl"
    generate(output, 500)
    assert "seen before" not in generate(output, 1500)["texts"]
