"""AdamS on the shards of two processes against one process with whole weights."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import adams_sharded
import pytest
import torch
from adams_sharded import STEPS, WEIGHTS

pytestmark = pytest.mark.slow

SPARSE = [name for name, (_, input_dim) in WEIGHTS.items() if input_dim is not None]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    model = adams_sharded.build()
    optimizer = adams_sharded.make_optimizer(model)
    seen = adams_sharded.take_steps(model, optimizer, range(STEPS), place=lambda grad, _: grad)
    return {"seen": seen, "state": adams_sharded.whole_state(model, optimizer)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, adams_sharded.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def test_shards_are_as_meant(ranks):
    first, second = (rank["rows"] for rank in ranks)
    assert first == {"even": 3, "uneven": 3, "one_row": 1, "conv": 8, "norm": 4}
    assert second == {"even": 3, "uneven": 2, "one_row": 0, "conv": 8, "norm": 3}


def test_masks_change_on_the_way(whole):
    # Otherwise equal masks would say little.
    assert sum(bool(flips) for flips, *_ in whole["seen"]) > STEPS / 2


@pytest.mark.parametrize("run", ["state", "switched"])
def test_masks_and_weights_are_those_of_one_process(ranks, whole, run):
    """`state` was saved and loaded half-way, `switched` went through accelerate's swap."""
    for rank in ranks:
        for name in WEIGHTS:
            expected, found = whole["state"][name], rank[run][name]
            assert expected.keys() == found.keys()
            for key in expected.keys() - {"mask"}:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-7)
        for name in SPARSE:
            assert torch.equal(rank[run][name]["mask"], whole["state"][name]["mask"]), name


def test_diagnostics_are_of_all_shards_on_every_rank(ranks, whole):
    assert ranks[0]["seen"] == ranks[1]["seen"]
    for found, expected in zip(ranks[0]["seen"], whole["seen"], strict=True):
        assert found == pytest.approx(expected, rel=1e-6) if found[0] is not None else not found[0]


def test_loaded_masks_are_bytes(ranks):
    assert ranks[0]["mask_dtypes"] == [torch.bool] * len(SPARSE)


def test_full_state_dict_is_of_whole_tensors(ranks, whole):
    state = ranks[0]["state_dict"]["state"]
    for name, (shape, _) in WEIGHTS.items():
        assert state[name]["mu"].shape == shape
    for name in SPARSE:
        assert torch.equal(state[name]["mask"], whole["state"][name]["mask"])


def test_shards_that_cut_groups_are_refused_on_every_rank(ranks):
    for rank in ranks:
        assert rank["refusal"].startswith("h.0.c_fc.weight [12, 4]: 2 ranks cut dimension 0 into")
        assert "shards of 6, which cuts groups of 4" in rank["refusal"]
        assert "DDP" in rank["refusal"]
