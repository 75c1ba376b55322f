"""Every command that the documentation shows is run here, at small scale, or says why it is not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doc_commands import PAGES, ROOT, Block, blocks
from tiny_models import configuration, write_tokenizer
from transformers import AutoModelForCausalLM

BLOCKS = [block for page in PAGES for block in blocks(page) if block.commands()]
TO_RUN = {
    page.relative_to(ROOT).as_posix(): run
    for page in PAGES
    if (run := [block for block in BLOCKS if block.page == page and block.mark == "run"])
}

# What makes a command small. It stays the command: sizes change, and what takes a CPU hours.
SMALLER = [
    (r"--tokens \d{6,}", "--tokens 2048 --allow-short-travel"),
    (r"(generate .*)--tokens 1e9(.*)", r"\1--tokens 64 --context 64\2"),
    (r"--context 4096", "--context 32"),
    (r"--nproc-per-node 8", "--nproc-per-node 2"),
    (r"--gradient-accumulation 32", "--gradient-accumulation 2"),
    (r" --compile", ""),
    # Data sets of the hub.
    (r" --tasks \S+", ""),
    # The dry run is in docs/index.md; here what follows needs its output.
    (r"^(torchrun .*) --dry-run", r"\1"),
    # Starting the server is what tests/engine does.
    (r"^(cast-serve --model (?!.*--check-only).*)$", r"\1 --check-only"),
    (
        r"^(cast-train --model dense --data corpus.txt --output packed)",
        r"\1 --steps 4 --context 32 --allow-short-travel",
    ),
    (r"^(cast-train finetune .*)", r"\1 --steps 2 --context 32"),
]
# Made by pages that come before, or by no page.
SPARSE = {"docs/finetune.md"}


def test_pages_have_commands():
    assert len(BLOCKS) > 30
    assert sum(len(block.commands()) for run in TO_RUN.values() for block in run) > 25


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_says_whether_it_is_run(block: Block):
    assert block.mark, f"{block}: <!-- run --> or <!-- not run: why --> before it"
    assert block.reason is None or len(block.reason) > 8


@pytest.fixture
def workspace(tmp_path) -> Path:
    """The files that the pages speak of, small."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration("llama"))
    model.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    story = [f"it was a fine day {number}, and the sun was out." for number in range(400)]
    (tmp_path / "corpus.txt").write_text("\n\n\n".join(story))
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in story))
    (tmp_path / "heldout.txt").write_text("\n\n\n".join(story[::7]))
    turns = [{"role": "user", "content": "how was it"}, {"role": "assistant", "content": "fine"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(8 * [json.dumps({"messages": turns})]))
    for folder in ("examples", "bench"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


def smaller(command: str) -> str:
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", TO_RUN)
def test_commands_of(page, workspace):
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": programs,
        "XDG_CACHE_HOME": str(workspace / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    if page in SPARSE:
        run("cast-model prune dense --method magnitude -o pruned", workspace, environment)
        run("cast-model pack pruned -o sparse", workspace, environment)
    for block in TO_RUN[page]:
        for command in block.commands():
            run(smaller(command), workspace, environment)
            for output in re.findall(r"(?:--output|-o) (\S+)", command):
                assert (workspace / output).exists() or "--dry-run" in command


def run(command: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
