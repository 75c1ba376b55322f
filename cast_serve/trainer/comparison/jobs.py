"""The runs that a comparison consists of."""

from dataclasses import dataclass

from cast_serve.trainer.comparison.answers import Questions
from cast_serve.trainer.comparison.vary import Variation
from cast_serve.trainer.config import RunConfig

ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
TRAINED = ("dense", "fixed-mask", "sr-ste", "ast", "cast")
# METHOD:ONE-SHOT is pruned by the second before it is trained by the first.
PRUNED_FIRST = ("fixed-mask:wanda", "fixed-mask:sparsegpt", "cast:sparsegpt")
METHODS = (*ONE_SHOT, *TRAINED, *PRUNED_FIRST)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table. `method` is as on the command line; one-shot methods train nothing.

    `questions` are the same in every row; `variation` is what it has otherwise than the others.
    """

    method: str
    config: RunConfig
    questions: Questions
    variation: Variation | None = None

    @property
    def name(self) -> str:
        return self.config.output.name

    @property
    def trains(self) -> bool:
        return self.method not in ONE_SHOT

    @property
    def finished(self) -> bool:
        """The output is renamed to its name when it is whole."""
        return (self.config.output / "cast.json").is_file()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a command line asks for.

    Attributes:
        jobs: in the order of --methods; those of --only.
        in_part: --only was given, so there is no table.
        at_once: how many of them run at a time.
    """

    jobs: list[Job]
    in_part: bool
    at_once: int
