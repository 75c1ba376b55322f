"""Breakdowns of traces in torch.profiler's form."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cast_serve.bench.serving.trace import (
    IDLE,
    LM_HEAD,
    OTHER,
    TraceError,
    breakdown,
    kind,
    read_trace,
)


def mark(ts: float, prefills: int, decodes: int) -> dict[str, Any]:
    name = f"execute_context_{prefills}({prefills * 512})_generation_{decodes}({decodes})"
    return {"ph": "X", "cat": "gpu_user_annotation", "name": name, "ts": ts, "dur": 1.0}


def kernel(name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {}}


def step(ts: float) -> list[dict[str, Any]]:
    """100 us, of which 20 are idle."""
    return [
        mark(ts, 0, 64),
        # Launched on the host while the step before runs: not the GPU's.
        {**mark(ts - 50, 0, 64), "cat": "user_annotation"},
        kernel("triton_red_fused_add_rms_norm_0", ts, 10),
        kernel("wgmma_sp", ts + 5, 35),
        kernel("void flash::FlashAttnFwdSm90<...>", ts + 40, 10),
        kernel("nvjet_tst_64x8_64x16_1x2_h_bz_TNN", ts + 50, 20),
        kernel("void at::native::reduce_kernel<ArgMaxOps>", ts + 70, 5),
        {**kernel("Memcpy DtoH (Device -> Pinned)", ts + 75, 5), "cat": "gpu_memcpy"},
    ]


EVENTS = [
    {"ph": "M", "name": "process_name", "args": {}},
    mark(-1000, 1, 63),
    kernel("wgmma_sp", -900, 800),
    *step(0),
    *step(100),
    mark(200, 0, 64),
]


def test_breakdown() -> None:
    """The linear is counted from the end of the norm that it was launched under."""
    found = breakdown(EVENTS, prefills=0, decodes=64)
    assert found.steps == 2 and found.step_ms == pytest.approx(0.1)
    assert found.parts_ms == pytest.approx(
        {
            "2:4 linear": 0.030,
            "attention": 0.010,
            "dense linear": 0,
            LM_HEAD: 0.020,
            "sampling": 0.005,
            "norm, rotary, activation": 0.010,
            OTHER: 0.005,
            IDLE: 0.020,
        }
    )


def test_other_steps_are_left_out() -> None:
    found = breakdown(EVENTS, prefills=1, decodes=63)
    assert found.steps == 1
    # Its only GEMM.
    assert found.parts_ms[LM_HEAD] == pytest.approx(0.8)


def test_no_such_step() -> None:
    with pytest.raises(TraceError, match=r"and 16 in decode; there are 0 \+ 64, 1 \+ 63$"):
        breakdown(EVENTS, prefills=0, decodes=16)
    with pytest.raises(TraceError, match="there are no steps on a GPU"):
        breakdown([], prefills=0, decodes=16)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mma_sp_kernel", "2:4 linear"),
        ("sm90_xmma_sparse_gemm_bf16bf16_bf16f32", "2:4 linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "dense linear"),
        ("void cutlass::device_kernel<vllm::cutlass_3x_gemm_fp8<...>>", "dense linear"),
        ("void gemvNSP_kernel<__nv_bfloat16>", "dense linear"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<...>", "attention"),
        ("void vllm::silu_and_mul_kernel", "norm, rotary, activation"),
        ("void vllm::scaled_fp8_quant_kernel_strided_dynamic", "norm, rotary, activation"),
        ("void at::native::vectorized_elementwise_kernel<4>", OTHER),
    ],
)
def test_kind(name: str, expected: str) -> None:
    assert kind(name) == expected


def test_read_trace(tmp_path: Path) -> None:
    text = json.dumps({"schemaVersion": 1, "traceEvents": EVENTS})
    (tmp_path / "a.pt.trace.json").write_text(text)
    with gzip.open(tmp_path / "b.pt.trace.json.gz", "wt") as file:
        file.write(text)
    assert read_trace(tmp_path / "a.pt.trace.json") == EVENTS
    assert read_trace(tmp_path / "b.pt.trace.json.gz") == EVENTS
