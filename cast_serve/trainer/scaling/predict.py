"""A fit to an answer: the constants, and tokens for a target, each with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cast_serve.trainer.errors import RunError
from cast_serve.trainer.scaling.law import EXPONENTS, Law, Run, bootstrap, fit, interval

# Below it a bootstrap has few different samples to draw, and its intervals are a rough guide.
ENOUGH_RUNS = 6
# Runs that differ in their seed alone differ by a few thousandths.
LARGE_RESIDUAL = 0.03
# E as a share of the least loss; the fit ends where it has no more effect.
NO_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loss to reach with a model of some size; `gap` is what it is above the dense model."""

    parameters: int
    loss: float
    gap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Tokens for a target; infinite where it is below what any number of tokens reaches.

    Attributes:
        interval: of the bootstrapped laws' answers, infinite where a law says never.
        reachable_share: of the bootstrapped laws, how many reach the target at all.
    """

    target: Target
    floor: float
    tokens: float
    interval: tuple[float, float]
    reachable_share: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A fitted law with its bootstrap, and what follows."""

    runs: tuple[Run, ...]
    law: Law
    resampled: tuple[Law, ...]
    confidence: float
    prediction: Prediction | None

    @property
    def residual(self) -> float:
        """Root mean square of log(loss / fitted loss), how far off the law the runs lie."""
        squares = [
            math.log(run.loss / self.law.loss(run.parameters, run.tokens)) ** 2 for run in self.runs
        ]
        return math.sqrt(sum(squares) / len(squares))

    @property
    def warnings(self) -> list[str]:
        """What makes the answer less than it seems, a line each."""
        runs, law, said = self.runs, self.law, []
        if len(runs) < ENOUGH_RUNS:
            said.append(
                f"{len(runs)} runs: intervals of fewer than {ENOUGH_RUNS} are a rough guide at best"
            )
        if self.residual > LARGE_RESIDUAL:
            said.append(
                f"the runs lie {self.residual:.1%} off the law (root mean square): they do not "
                "follow it, or differ in more than tokens and size"
            )
        if law.E / min(run.loss for run in runs) < NO_FLOOR:
            said.append(
                "the runs show no floor: E is not told from 0, so a prediction far out is too "
                "hopeful"
            )
        for letter, value in {"beta": law.beta, **({"alpha": law.alpha} if law.A else {})}.items():
            if any(math.isclose(value, end, rel_tol=1e-3) for end in EXPONENTS):
                said.append(
                    f"{letter} = {value:.3g} is at the end of what is searched: the runs do not "
                    "determine it, because their loss hardly falls or their budgets are too close"
                )
        most, found = max(run.tokens for run in runs), self.prediction
        if found and math.isfinite(found.tokens) and found.tokens > 10 * most:
            said.append(
                f"{found.tokens:.3g} tokens are {found.tokens / most:.0f} times the longest run: "
                "an extrapolation that far is a guess"
            )
        return said

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of every constant of the law, by its letter."""
        return {
            letter: interval([getattr(law, letter) for law in self.resampled], self.confidence)
            for letter in letters(self.law)
        }

    def band(self, parameters: int, tokens: float) -> tuple[float, float]:
        """The interval of the loss of a run of `tokens`."""
        losses = [law.loss(parameters, tokens) for law in self.resampled]
        return interval(losses, self.confidence)


def letters(law: Law) -> tuple[str, ...]:
    return ("E", "B", "beta", "A", "alpha") if law.A else ("E", "B", "beta")


def choose_target(
    runs: Sequence[Run],
    *,
    loss: float | None,
    gap: float | None,
    dense_loss: float | None,
    parameters: int | None,
) -> Target | None:
    """What was asked for, for the largest model unless `parameters` says another.

    Raises:
        RunError: a gap is asked for and the dense model's loss is not known.
    """
    size = parameters or max(run.parameters for run in runs)
    if gap is None:
        return None if loss is None else Target(parameters=size, loss=loss)
    if dense_loss is None:
        known = [run.dense_loss for run in runs if run.parameters == size and run.dense_loss]
        if not known:
            raise RunError(
                f"target_gap: no run says the loss of the dense model of {size} parameters; "
                "give --dense-loss"
            )
        dense_loss = known[0]
    return Target(parameters=size, loss=dense_loss + gap, gap=gap)


def analyse(
    runs: Sequence[Run], target: Target | None, *, confidence: float, resamples: int, seed: int
) -> Analysis:
    """Fit, bootstrap and predict.

    Raises:
        RunError: the runs do not determine a law.
    """
    law = fit(runs)
    if target is not None and not law.A and target.parameters != runs[0].parameters:
        raise RunError(
            f"parameters: all runs have {runs[0].parameters}, so nothing is known of "
            f"{target.parameters}; give runs of three sizes or more"
        )
    resampled = bootstrap(runs, law, resamples=resamples, seed=seed)
    prediction = None
    if target is not None:
        tokens = [each.tokens_for(target.loss, target.parameters) for each in resampled]
        prediction = Prediction(
            target=target,
            floor=law.floor(target.parameters),
            tokens=law.tokens_for(target.loss, target.parameters),
            interval=interval(tokens, confidence),
            reachable_share=sum(map(math.isfinite, tokens)) / len(tokens),
        )
    return Analysis(
        runs=tuple(runs),
        law=law,
        resampled=tuple(resampled),
        confidence=confidence,
        prediction=prediction,
    )


def to_json(analysis: Analysis) -> dict[str, Any]:
    """results.json: plain numbers; null where tokens are infinite, which is "not reachable"."""
    law, found = analysis.law, analysis.prediction
    result: dict[str, Any] = {
        "law": "E + A/N^alpha + B/D^beta" if law.A else "E + B/D^beta",
        "constants": {letter: getattr(law, letter) for letter in letters(law)},
        "intervals": {letter: list(ends) for letter, ends in analysis.intervals().items()},
        "confidence": analysis.confidence,
        "resamples": len(analysis.resampled),
        "residual": analysis.residual,
        "runs": [
            {
                "name": run.name,
                "parameters": run.parameters,
                "tokens": run.tokens,
                "loss": run.loss,
                "fitted": law.loss(run.parameters, run.tokens),
                "dense_loss": run.dense_loss,
            }
            for run in analysis.runs
        ],
        "warnings": analysis.warnings,
    }
    if found is not None:
        result["target"] = {
            "parameters": found.target.parameters,
            "loss": found.target.loss,
            "gap": found.target.gap,
            "floor": found.floor,
            "reachable": math.isfinite(found.tokens),
            "tokens": _finite(found.tokens),
            "tokens_interval": [_finite(end) for end in found.interval],
            "reachable_share": found.reachable_share,
        }
    return result


def _finite(tokens: float) -> float | None:
    return tokens if math.isfinite(tokens) else None
