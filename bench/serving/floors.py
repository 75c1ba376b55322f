"""What 2:4 bf16 must at least gain over dense bf16: Llama-3.1-8B, one H100 or H200, no flags."""

from collections.abc import Iterable
from dataclasses import dataclass

from cast_serve.bench.serving.results import Ratios, Row, baseline_of

WEIGHTS = "weights_gib"
ENGINE, MODEL, GPUS = "sparse-bf16", "Llama-3.1-8B", ("H100", "H200")


@dataclass(frozen=True)
class Floor:
    """The least ratio of one column of one workload; `metric` is a field of Ratios."""

    workload: str
    metric: str
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.metric} of {self.workload}"


FLOORS = (
    Floor("c1", "tpot", 1.40),
    Floor("c16", "tpot", 1.35),
    Floor("c64", "tpot", 1.25),
    Floor("prefill-2048", "ttft", 1.25),
    Floor("c128", "output_tokens_per_s", 1.20),
    # At most 0.62 of the dense ones. They are the same in all workloads.
    Floor("c1", WEIGHTS, 1 / 0.62),
)


@dataclass(frozen=True)
class Judged:
    """A floor, and the ratio that was measured for it; `str` has both, to three digits."""

    floor: Floor
    ratio: float

    def __str__(self) -> str:
        sign = ">=" if self.met else "<"
        return f"{self.floor.name}: {self.ratio:.3f} {sign} {self.floor.ratio:.3f}"

    @property
    def met(self) -> bool:
        return self.ratio >= self.floor.ratio


def floor_of(row: Row, metric: str, gpu: str) -> Floor | None:
    """The floor that is set for a column of `row` on `gpu`, if any."""
    if row.key[:2] != (ENGINE, MODEL) or row.flags or not any(name in gpu for name in GPUS):
        return None
    for floor in FLOORS:
        if (floor.workload, floor.metric) == (row.workload, metric):
            return floor
    return None


def judge(rows: Iterable[Row], gpu: str) -> list[Judged]:
    """Every floor for which both rows are there."""
    rows = list(rows)
    judged = []
    for row in rows:
        ratios = Ratios.of(row, baseline_of(row, rows))
        for metric in vars(ratios):
            floor, ratio = floor_of(row, metric, gpu), getattr(ratios, metric)
            if floor is not None and ratio is not None:
                judged.append(Judged(floor, ratio))
    return judged
