"""The Triton kernel of the loss: interpreted against torch, and compiled for the GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from aot import SHARED_LIMIT, compile_for

from cast_serve.trainer.distillation.triton_kernel import BLOCK, WARPS, distill_kernel

SUPPORT = Path(__file__).parents[1] / "support"

PLAIN = {"tokens": 4, "vocab": 300, "dtype": "float32", "block": 64, "teacher": True} | {
    "eta": 1 / 3,
    "temperature": 1.0,
}
CASES = {
    "plain": PLAIN,
    "tempered": PLAIN | {"temperature": 2.5},
    "no-teacher": PLAIN | {"teacher": False, "eta": 0.0},
    "kl-alone": PLAIN | {"eta": 1.0},
    "one-block": PLAIN | {"vocab": 64},
    "less-than-a-block": PLAIN | {"vocab": 17},
    "bf16": PLAIN | {"dtype": "bfloat16", "vocab": 257},
    "bf16-tempered": PLAIN | {"dtype": "bfloat16", "temperature": 0.5},
}


@pytest.fixture(scope="module")
def emulated() -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, SUPPORT / "distill_emulated.py", json.dumps(list(CASES.values()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_distill_rows(emulated: dict[str, dict], name: str):
    result = emulated[name]
    assert result["ce"] < 1e-5
    assert result["kl"] < 1e-5
    # Triton's interpreter cuts off where a GPU rounds to bf16.
    assert result["gradient"] < (2**-7 if "bf16" in name else 1e-5)
    assert result["ignored"]


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("pointer", ["*bf16", "*fp32"])
def test_compiles(sm: int, tempered: bool, pointer: str, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    logits = dict.fromkeys(("z_ptr", "t_ptr", "out_ptr"), pointer)
    rest = {"labels_ptr": "*i64"} | dict.fromkeys(("scale_ptr", "ce_ptr", "kl_ptr"), "*fp32")
    sizes = dict.fromkeys(("vocab", "z_stride", "t_stride", "out_stride"), "i32")
    types = logits | rest | sizes | {"eta": "fp32", "temperature": "fp32"}
    built = compile_for(
        sm,
        distill_kernel,
        {name: types[name] for name in distill_kernel.arg_names if name in types},
        {"TEACHER": True, "TEMPERED": tempered, "GRADIENT": True, "BLOCK": BLOCK},
        aligned=(*logits, *sizes),
        num_warps=WARPS,
    )
    assert built.stack_bytes == 0
    # Two programs an SM, so that one computes while the other waits for memory.
    assert built.registers * 32 * WARPS * 2 <= 65536
    assert built.shared_bytes * 2 <= SHARED_LIMIT[sm]
    # 16 bytes a load: two passes over the logits of both.
    assert built.count(r"ld\.global\S*\.v4\.b32") >= 4
