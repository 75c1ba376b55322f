import json
import statistics
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cast_serve.bench.serving.tokenizer import write_tokenizer
from cast_serve.bench.serving.workloads import (
    WORKLOADS,
    find_workloads,
    mixed_lengths,
    write_mixed,
)


def test_workloads() -> None:
    chats = [w.concurrency for w in WORKLOADS if (w.input_len, w.output_len) == (512, 256)]
    assert chats == [1, 4, 16, 64, 128]
    assert [(w.input_len, w.output_len) for w in WORKLOADS if w.is_prefill] == [
        (2048, 1),
        (8192, 1),
    ]
    assert [w.name for w in WORKLOADS if w.input_len is None] == ["mixed"]
    # Else the last requests run at a lower concurrency than the row says, for most of the time.
    assert all(w.num_prompts >= 3 * w.concurrency for w in WORKLOADS)


def test_mixed_lengths() -> None:
    inputs, outputs = zip(*mixed_lengths(20000), strict=True)
    # ShareGPT's means: vllm-project/vllm#18566.
    assert statistics.mean(inputs) == pytest.approx(230, rel=0.03)
    assert statistics.mean(outputs) == pytest.approx(203, rel=0.03)
    assert min(inputs) >= 4 and max(inputs) <= 1024
    assert mixed_lengths(5) == mixed_lengths(20000)[:5]


def test_write_mixed(tmp_path: Path) -> None:
    """The tokenizer counts what was drawn."""
    write_tokenizer(tmp_path, words=1000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    write_mixed(tmp_path / "mixed.json", count=20, words=1000)
    lengths = [
        tuple(len(tokenizer(turn["value"]).input_ids) for turn in entry["conversations"])
        for entry in json.loads((tmp_path / "mixed.json").read_text())
    ]
    assert lengths == mixed_lengths(20)


def test_no_such_workload() -> None:
    with pytest.raises(ValueError, match="no workload 'c2'; there is c1, c4, "):
        find_workloads("c1,c2")
