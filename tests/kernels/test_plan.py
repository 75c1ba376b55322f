import pytest

from cast_serve.kernels.plan import Plan, Row

DECODE, PREFILL = ("wgmma_sp", "a"), ("cusparselt", "default")
PLAN = Plan.of({1: DECODE, 8: DECODE, 512: PREFILL, 8192: PREFILL})


def test_equal_neighbours_are_one_row():
    assert PLAN.rows == (
        Row(max_M=8, kernel="wgmma_sp", config="a"),
        Row(max_M=None, kernel="cusparselt", config="default"),
    )


@pytest.mark.parametrize(
    ("M", "kernel"), [(1, "wgmma_sp"), (8, "wgmma_sp"), (9, "cusparselt"), (1 << 20, "cusparselt")]
)
def test_choice_is_the_smallest_row_that_holds_M(M, kernel):
    assert PLAN.choice(M).kernel == kernel


def test_json_round_trip():
    assert Plan.from_json(PLAN.to_json()) == PLAN


def test_layouts_are_in_a_fixed_order():
    other = Plan.of({1: PREFILL, 8: DECODE})
    assert PLAN.layouts == other.layouts == ("wgmma_sp", "cusparselt")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "end in null"),
        ([[8, "mma_sp", "a"]], "end in null"),
        ([[None, "mma_sp", "a"], [None, "mma_sp", "a"]], "end in null"),
        ([[8, "mma_sp", "a"], [8, "mma_sp", "b"], [None, "mma_sp", "a"]], "ascend"),
        ([[0, "mma_sp", "a"], [None, "mma_sp", "a"]], "ascend from 1"),
        ([[None, "marlin", "a"]], "no kernel 'marlin'; there are mma_sp, "),
        ([[None, "mma_sp"]], "row is"),
        ([["8", "mma_sp", "a"], [None, "mma_sp", "a"]], "row is"),
    ],
)
def test_what_is_no_plan_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(rows)
