"""What a `data` entry names: a place to read text from and, in a mixture, its share of the tokens.

books.txt   shards/   wiki.parquet                 a file, or a folder of files
hub:org/name   hub:org/name:config@split           a data set of the hub, the split "train"
hub:./folder   hub:./folder@validation             one on disk, as `datasets` reads or saves it
books.txt=0.3                                      any of them with its weight
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cast_serve.trainer.errors import RunError

_HUB = "hub:"
_HUB_PARTS = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A data set as `datasets.load_dataset` takes it; `name` is a hub id or a local folder."""

    name: str
    config: str | None
    split: str

    @property
    def folder(self) -> Path | None:
        """The folder it names; None for a hub id, which is never `./x`, `/x` or `~/x`."""
        return Path(self.name).expanduser() if self.name.startswith((".", "/", "~")) else None


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of text; `weight` is None where sources are read in full, one after the other."""

    place: str
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.place:
            raise RunError("data: an entry is empty; give a file, a folder or hub:NAME")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise RunError(f"data: the weight of {self.place} is {self.weight:g}; give one above 0")
        if self.place.startswith(_HUB) and not _HUB_PARTS.fullmatch(self.place, len(_HUB)):
            raise RunError(
                f"data: {self.place!r} names no data set; write hub:org/name, hub:org/name:config, "
                "hub:org/name@split or hub:org/name:config@split"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read PLACE or PLACE=WEIGHT.

        A tail that is no number belongs to the place, and so does one of a path that exists:
        partitioned tables lie in folders such as year=2024.
        """
        if os.path.exists(os.path.expanduser(text.removeprefix(_HUB))):
            return cls(place=text)
        place, _, tail = text.rpartition("=")
        try:
            weight = float(tail) if place else None
        except ValueError:
            weight = None
        return cls(place=text) if weight is None else cls(place=place, weight=weight)

    @property
    def hub(self) -> HubName | None:
        """The data set it names; None for files."""
        match = _HUB_PARTS.fullmatch(self.place, len(_HUB))
        if not self.place.startswith(_HUB) or match is None:
            return None
        return HubName(name=match["name"], config=match["config"], split=match["split"] or "train")

    @property
    def path(self) -> Path:
        """The file or folder it names."""
        return Path(self.place)

    @property
    def name(self) -> str:
        """What to call it in the plan and in the output's provenance: no folder of this machine."""
        if self.hub is None:
            # Not resolve(): a hub snapshot's files are links to blobs named by their digest.
            return self.path.name or self.path.resolve().name
        folder = self.hub.folder
        if folder is None:
            return self.place
        return f"{_HUB}{folder.resolve().name}{self.place[len(_HUB) + len(self.hub.name) :]}"

    def identity(self) -> str:
        """The same text for ./x and x, so that either may resume a run of the other."""
        if self.hub is None:
            place = str(self.path.resolve())
        elif (folder := self.hub.folder) is not None:
            place = f"{_HUB}{folder.resolve()}{self.place[len(_HUB) + len(self.hub.name) :]}"
        else:
            place = self.place
        return place if self.weight is None else f"{place}={self.weight!r}"


def shares(sources: tuple[DataSource, ...]) -> tuple[float, ...] | None:
    """Weights scaled to a sum of 1; None where no source has one.

    Raises:
        RunError: some have a weight and others have none.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return None
    without = [source.place for source in sources if source.weight is None]
    if without:
        raise RunError(
            f"data: {without[0]} has no weight and others have one; write {without[0]}=WEIGHT, "
            "or leave all weights out to read every source in full"
        )
    return tuple(weight / sum(weights) for weight in weights)
