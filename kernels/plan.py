"""Plan: which kernel and config runs one layer at each number of tokens M."""

from dataclasses import dataclass

from cast_serve.kernels.registry import LAYOUT_NAMES, NAMED

# Where plans may change kernel: a plan is measured at these M, and M in between take the next one
# up. 8 is the N of an mma instruction; vLLM captures its decode graphs at multiples of it.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Up to `max_M` tokens, or any number where it is None: the kernel and its config, by name."""

    max_M: int | None
    kernel: str
    config: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows by ascending max_M; the last one has None.

    Raises:
        ValueError: the rows are no such table, or name a kernel that there is not.
    """

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        bounds = [row.max_M for row in self.rows]
        inner = [bound for bound in bounds[:-1] if bound is not None]
        ascending = all(low < high for low, high in zip([0, *inner], inner, strict=False))
        if not bounds or bounds[-1] is not None or len(inner) != len(bounds) - 1 or not ascending:
            raise ValueError(f"max_M of a plan's rows ascend from 1 and end in null, got {bounds}")
        for row in self.rows:
            if row.kernel not in NAMED:
                raise ValueError(f"no kernel {row.kernel!r}; there are {', '.join(NAMED)}")

    @classmethod
    def of(cls, choices: dict[int, tuple[str, str]]) -> "Plan":
        """From M -> (kernel, config), ascending: runs of equal choices become one row."""
        rows: list[Row] = []
        for M, (kernel, config) in choices.items():
            if rows and (rows[-1].kernel, rows[-1].config) == (kernel, config):
                rows.pop()
            rows.append(Row(max_M=M, kernel=kernel, config=config))
        last = rows.pop()
        rows.append(Row(max_M=None, kernel=last.kernel, config=last.config))
        return cls(rows=tuple(rows))

    @classmethod
    def from_json(cls, rows: list[list[int | str | None]]) -> "Plan":
        """From what `to_json` gives.

        Raises:
            ValueError: it is something else.
        """
        parsed = []
        for row in rows:
            match row:
                case [int() | None as max_M, str() as kernel, str() as config]:
                    parsed.append(Row(max_M=max_M, kernel=kernel, config=config))
                case _:
                    raise ValueError(f"a plan's row is [max_M or null, kernel, config], got {row}")
        return cls(rows=tuple(parsed))

    def to_json(self) -> list[list[int | str | None]]:
        return [[row.max_M, row.kernel, row.config] for row in self.rows]

    def choice(self, M: int) -> Row:
        """The row with the smallest max_M >= M."""
        return next(row for row in self.rows if row.max_M is None or row.max_M >= M)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The metadata layouts that the rows need, in the order of LAYOUT_NAMES."""
        used = {NAMED[row.kernel].metadata for row in self.rows}
        return tuple(layout for layout in LAYOUT_NAMES if layout in used)
