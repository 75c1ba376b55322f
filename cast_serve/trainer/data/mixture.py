"""Which source each sequence of a run comes from, when sources are mixed by weight.

Item k of a source with share s is due at (k + u_k) / s, with u_k uniform in [0, 1) from the seed;
items are read in the order in which they are due. So every stretch of a run holds the sources in
their shares to within about an item each, in an order without a period.
"""

from collections.abc import Sequence

import numpy as np


class Mixture:
    """The order of `length` items; item i depends on shares, seed and i, not on `length`."""

    def __init__(self, shares: Sequence[float], *, length: int, seed: int) -> None:
        due, source, place = [], [], []
        for number, share in enumerate(shares):
            # By time length + len(shares), all sources together have more than `length` due.
            count = int(share * (length + len(shares))) + 2
            jitter = np.random.default_rng((seed, number)).random(count)
            due.append((np.arange(count) + jitter) / share)
            source.append(np.full(count, number, dtype=np.int32))
            place.append(np.arange(count))
        order = np.argsort(np.concatenate(due), kind="stable")[:length]
        self._source = np.concatenate(source)[order]
        self._place = np.concatenate(place)[order]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, number of the item within that source) of item `index`."""
        return int(self._source[index]), int(self._place[index])
