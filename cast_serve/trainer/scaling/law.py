"""Loss against tokens and size: the law, its fit, and how sure the fit is.

    L(N, D) = E + A / N^alpha + B / D^beta        several sizes
    L(D)    = E + B / D^beta                      one size: A = 0

N parameters, D tokens, L nats per token (Hoffmann et al. 2022, arXiv 2203.15556, approach 3): the
Huber loss of the residuals of log L is minimised by L-BFGS from a grid of starts. The form is the
one of dense pretraining; docs/scaling-law.md says what is open for sparse models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from cast_serve.trainer.errors import RunError

# Residuals of log L beyond it count linearly: Hoffmann et al. use the same.
HUBER_DELTA = 1e-3
# Each term of the law needs as many different settings to be told from E.
MIN_SETTINGS = 3
EXPONENTS = (0.01, 5.0)

_Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run.

    Attributes:
        loss: of the finished model, nats per token.
        dense_loss: of its dense model on the same text, None where that is not known.
    """

    name: str
    parameters: int
    tokens: int
    loss: float
    dense_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Law:
    """The fitted constants, in Hoffmann et al.'s letters; A and alpha are 0 for one size."""

    E: float
    B: float
    beta: float
    A: float = 0.0
    alpha: float = 0.0

    def floor(self, parameters: int) -> float:
        """What no number of tokens gets below: E + A / N^alpha."""
        return self.E + self.A / parameters**self.alpha

    def loss(self, parameters: int, tokens: float) -> float:
        return self.floor(parameters) + self.B / tokens**self.beta

    def tokens_for(self, loss: float, parameters: int) -> float:
        """Tokens that reach `loss`; infinite where `loss` is not above the floor."""
        gap = loss - self.floor(parameters)
        if gap <= 0:
            return math.inf
        log_tokens = (math.log(self.B) - math.log(gap)) / self.beta
        return math.exp(log_tokens) if log_tokens < 700 else math.inf


def fit(runs: Sequence[Run]) -> Law:
    """The law of `runs`: of tokens alone where all have one size, else of both.

    Raises:
        RunError: too few runs, budgets or sizes to determine it.
    """
    require_determined(runs)
    problem = _Problem.of(runs)
    return problem.law(problem.best(problem.grid()))


def bootstrap(runs: Sequence[Run], law: Law, *, resamples: int, seed: int) -> list[Law]:
    """Laws of `resamples` samples of the runs, each drawn with replacement.

    A draw that leaves the law undetermined is drawn again, so with few runs the laws differ less
    than those of new runs would. So is one of a single size where `law` is of several: its floor
    would be that size's alone.
    """
    draw = np.random.default_rng(seed)
    several = len({run.parameters for run in runs}) > 1
    laws: list[Law] = []
    while len(laws) < resamples:
        sample = [runs[place] for place in draw.integers(len(runs), size=len(runs))]
        same_terms = (len({run.parameters for run in sample}) > 1) == several
        if same_terms and _why_undetermined(sample) is None:
            problem = _Problem.of(sample)
            laws.append(problem.law(problem.best(problem.near(law))))
    return laws


def interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The percentile interval of bootstrapped values; an infinity among them is kept."""
    tail = (1 - confidence) / 2
    # "nearest": interpolation next to an infinity would give NaN.
    low, high = np.quantile(values, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def require_determined(runs: Sequence[Run]) -> None:
    """Raise RunError unless `runs` are enough, and different enough, for a fit."""
    count = 5 if len({run.parameters for run in runs}) > 1 else 3
    if len(runs) < count + 1:
        raise RunError(
            f"{len(runs)} runs cannot fit a law of {count} constants; give {count + 1} or more"
        )
    if why := _why_undetermined(runs):
        raise RunError(f"the runs do not determine the law: {why}")


def _why_undetermined(runs: Sequence[Run]) -> str | None:
    budgets, sizes = len({run.tokens for run in runs}), len({run.parameters for run in runs})
    if budgets < MIN_SETTINGS:
        return f"{budgets} different token budgets; give {MIN_SETTINGS} or more"
    if 1 < sizes < MIN_SETTINGS:
        return f"{sizes} different sizes; give one, or {MIN_SETTINGS} or more"
    return None


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The fit in the unknowns (e, b, beta[, a, alpha]) with E = exp(e).

    log D and log N are centred, so that b and a are the logs of terms at the runs' middle: in
    Hoffmann's own unknowns b and beta are nearly one direction, and L-BFGS crawls along it.
    """

    log_loss: _Array
    log_tokens: _Array
    log_size: _Array | None
    middle: tuple[float, float]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "_Problem":
        tokens = np.log([run.tokens for run in runs])
        sizes = np.log([run.parameters for run in runs])
        several = len({run.parameters for run in runs}) > 1
        middle = float(tokens.mean()), float(sizes.mean())
        return cls(
            log_loss=np.log([run.loss for run in runs]),
            log_tokens=tokens - middle[0],
            log_size=sizes - middle[1] if several else None,
            middle=middle,
        )

    @property
    def bounds(self) -> list[tuple[float, float]]:
        low, high = float(self.log_loss.min()), float(self.log_loss.max())
        term = (low - 15, high + 5)
        terms = [term, EXPONENTS] * (1 if self.log_size is None else 2)
        return [(low - 10, high), *terms]

    def grid(self) -> list[tuple[float, ...]]:
        """Starts: E from nearly none to nearly all of the least loss, and five exponents each."""
        shares, exponents = (0.1, 0.5, 0.8, 0.95, 0.99), (0.1, 0.3, 0.5, 1.0, 2.0)
        alphas = (0.0,) if self.log_size is None else exponents
        return [self._start(*each) for each in product(shares, exponents, alphas)]

    def near(self, law: Law) -> list[tuple[float, ...]]:
        """Starts from the fit of all runs, and from one of the grid: from an E near 0, where
        exp(e) is flat, there is no way back.
        """
        start = [math.log(law.E), math.log(law.B) - law.beta * self.middle[0], law.beta]
        if self.log_size is not None:
            start += [math.log(law.A) - law.alpha * self.middle[1], law.alpha]
        return [tuple(start), self._start(0.8, 0.5, 0.5)]

    def _start(self, share: float, beta: float, alpha: float) -> tuple[float, ...]:
        """Unknowns with E a share of the least loss, and the mean of log L met in the middle."""
        floor = share * float(np.exp(self.log_loss.min()))
        rest = math.log(float(np.exp(self.log_loss.mean())) - floor)
        if self.log_size is None:
            return math.log(floor), rest, beta
        half = rest - math.log(2)
        return math.log(floor), half, beta, half, alpha

    def best(self, starts: list[tuple[float, ...]]) -> _Array:
        """The unknowns of the lowest minimum that L-BFGS finds from `starts`."""
        bounds = self.bounds
        low, high = np.array(bounds).T
        found = [
            minimize(
                self.objective,
                np.clip(start, low, high),
                jac=True,
                bounds=bounds,
                method="L-BFGS-B",
                options={"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9},
            )
            for start in starts
        ]
        return min(found, key=lambda result: result.fun).x

    def objective(self, unknowns: _Array) -> tuple[float, _Array]:
        """Mean Huber loss of log L in units of HUBER_DELTA, and its gradient."""
        e, b, beta = unknowns[:3]
        terms = [np.full_like(self.log_tokens, e), b - beta * self.log_tokens]
        if self.log_size is not None:
            terms.append(unknowns[3] - unknowns[4] * self.log_size)
        exponents = np.stack(terms)
        largest = exponents.max(axis=0)
        parts = np.exp(exponents - largest)
        total = parts.sum(axis=0)
        residual = (largest + np.log(total) - self.log_loss) / HUBER_DELTA
        slope = np.clip(residual, -1, 1)
        value = np.where(abs(residual) <= 1, residual**2 / 2, abs(residual) - 0.5)
        weight = slope * parts / total / HUBER_DELTA
        gradient = [weight[0], weight[1], -weight[1] * self.log_tokens]
        if self.log_size is not None:
            gradient += [weight[2], -weight[2] * self.log_size]
        return float(value.mean()), np.array([part.mean() for part in gradient])

    def law(self, unknowns: _Array) -> Law:
        e, b, beta, *size = map(float, unknowns)
        constants = {"E": math.exp(e), "B": math.exp(b + beta * self.middle[0]), "beta": beta}
        if size:
            a, alpha = size
            constants |= {"A": math.exp(a + alpha * self.middle[1]), "alpha": alpha}
        return Law(**constants)
