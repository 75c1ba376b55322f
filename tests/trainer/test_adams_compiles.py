"""AdamS's Triton kernels compiled ahead of time: what speed rests on, without a GPU."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from aot import Compiled, compile_for

from cast_serve.trainer.adams import fused
from cast_serve.trainer.adams.triton_kernels import (
    REFRESH_COLUMNS,
    UPDATE_COLUMNS,
    refresh_columns_kernel,
    refresh_rows_kernel,
    update_kernel,
)

TABLES = {"table_ptr": "*i64", "owner_ptr": "*i32"}
# A 16-byte load or store of four fp32 values.
WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v4\.(b|f)32", r"st\.global\S*\.v4\.(b|f)32"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_update(*, masked: bool, aligned: bool, of_gradient: bool = False) -> Compiled:
    floats = [name for name in update_kernel.arg_names if name.islower() and "ptr" not in name]
    constants = {"COLUMNS": UPDATE_COLUMNS, "MASKED": masked, "ALIGNED": aligned}
    constants |= {"OF_GRADIENT": of_gradient, "BLOCK": fused.BLOCK}
    constants |= {"UNROLL": fused.UNROLL, "ROUNDS": fused.ROUNDS}
    return compile_for(
        90,
        update_kernel,
        {**TABLES, "grads_ptr": "*i64", **dict.fromkeys(floats, "fp32")},
        constants,
        aligned=(*TABLES, "grads_ptr"),
        num_warps=fused.WARPS,
    )


@pytest.mark.parametrize("of_gradient", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_update_reads_and_writes_by_16_bytes(masked: bool, of_gradient: bool):
    built = compiled_update(masked=masked, aligned=True, of_gradient=of_gradient)
    # w, g, mu, nu are read, w, mu, nu written; the rest are a weight's last entries and the table.
    assert built.count(WIDE_LOAD) == 4 * fused.UNROLL
    assert built.count(WIDE_STORE) == 3 * fused.UNROLL
    assert "convert_layout" not in built.ttgir
    assert built.stack_bytes == 0 and built.shared_bytes == 0
    # Three programs or more an SM: 90 KB of loads are in flight.
    assert built.registers * 32 * fused.WARPS * 3 <= 65536


def test_update_of_unaligned_gradients_compiles():
    built = compiled_update(masked=True, aligned=False)
    assert built.count(WIDE_LOAD) == 0 and built.stack_bytes == 0


@pytest.mark.parametrize("group", fused.GROUPS)
def test_refresh_rows_reads_by_16_bytes(group: int):
    unroll = max(fused.GROUPS) // group
    constants = {"COLUMNS": REFRESH_COLUMNS, "KEPT": group // 2, "GROUP": group, "ALIGNED": True}
    constants |= {"LANES": fused.LANES, "UNROLL": unroll, "ROUNDS": fused.REFRESH_ROUNDS}
    built = compile_for(
        90,
        refresh_rows_kernel,
        {**TABLES, "changed_ptr": "*i32"},
        constants,
        aligned=(*TABLES, "changed_ptr"),
        num_warps=fused.WARPS,
    )
    assert built.count(WIDE_LOAD) == unroll * group // 4
    # A lane compares whole groups: shared memory serves the count at the end alone.
    assert "convert_layout" not in built.ttgir
    assert built.stack_bytes == 0 and built.shared_bytes <= 4 * fused.WARPS


def test_refresh_columns_compiles():
    constants = {"COLUMNS": REFRESH_COLUMNS, "KEPT": 2, "GROUP": 4}
    constants |= {"BLOCK": fused.COLUMN_BLOCK, "ROUNDS": fused.COLUMN_ROUNDS}
    built = compile_for(
        90,
        refresh_columns_kernel,
        {**TABLES, "changed_ptr": "*i32"},
        constants,
        aligned=(*TABLES, "changed_ptr"),
        num_warps=fused.COLUMN_WARPS,
    )
    assert built.stack_bytes == 0
