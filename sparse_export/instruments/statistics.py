"""Estimates of paired ratios and differences, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from sparse_export.errors import UsageError

__all__ = [
    "Location",
    "Mean",
    "Ratio",
    "location",
    "log_location_interval",
    "mean_interval",
    "paired_ratio",
    "resolution",
]

MIN_ROUNDS = 4
_RHO = np.linspace(-0.9, 0.9, 25)
_OUTLIER_SIGMAS = 5.0
_MAX_OUTLIER_SHARE = 0.25
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two paired series, with its interval. str() writes all three numbers.

    Attributes:
        estimate: the ratio.
        low: end of the interval.
        high: end of the interval.
        n_rounds: number of pairs.
        n_outliers: pairs that were left out.
        autocorrelation: posterior mean of the AR(1) coefficient of the log-ratios, from round to round.
    """

    estimate: float
    low: float
    high: float
    n_rounds: int
    n_outliers: int
    autocorrelation: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of independent values.

    Attributes:
        mean: the mean.
        half_width: of its interval; None for a single value.
        n: number of values.
    """

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Location:
    """The undisturbed level of a series of positive values, in its unit.

    Attributes:
        estimate: the level.
        low: end of its interval.
        high: end of its interval.
    """

    estimate: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Mean:
    """Compute the mean of independent, roughly normal values and its Student t interval.

    Args:
        values: one at least.
        confidence: of the interval, between 0 and 1.

    Raises:
        UsageError: there are no values.
    """
    if not values:
        raise UsageError("There are no values to take a mean of.", do="Give one at least.")
    x = np.array(values, dtype=np.float64)
    half_width = None
    if x.size > 1:
        quantile = float(stdtrit(x.size - 1, 0.5 * (1.0 + confidence)))
        half_width = quantile * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Mean(mean=float(x.mean()), half_width=half_width, n=x.size)


def paired_ratio(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, confidence: float = 0.95
) -> Ratio:
    """Estimate a / b from values measured side by side; of times, above 1 means that b is faster.

    The ratio is that of an undisturbed round: the exponential of the location of log(a / b); see
    `log_location_interval`.

    Args:
        a: positive values, one a round, in the order of time.
        b: likewise, of the same rounds.
        confidence: of the interval, between 0 and 1.

    Raises:
        UsageError: fewer than 4 rounds, unequal lengths, or a value that is not a positive number.
    """
    if len(a) != len(b) or len(a) < MIN_ROUNDS:
        raise UsageError(
            f"A paired ratio of {len(a)} and {len(b)} rounds needs as many of each, {MIN_ROUNDS} at least.",
            do="Measure more rounds.",
        )
    if not 0.0 < confidence < 1.0:
        raise UsageError(
            f"The confidence is {confidence}, not between 0 and 1.", do="Give for instance 0.95."
        )
    both = np.array([a, b], dtype=np.float64)
    if not (np.isfinite(both).all() and (both > 0).all()):
        raise UsageError(
            f"The smallest value of a paired ratio is {both.min()}, the largest {both.max()}; "
            "all have to be positive and finite.",
            do="Measure longer blocks, so that the clock can resolve them.",
        )
    location, low, high, rho, n_outliers = log_location_interval(
        np.log(both[0] / both[1])[np.newaxis], confidence=confidence
    )
    return Ratio(
        estimate=math.exp(location[0]),
        low=math.exp(low[0]),
        high=math.exp(high[0]),
        n_rounds=len(a),
        n_outliers=int(n_outliers[0]),
        autocorrelation=float(rho[0]),
    )


def location(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Location:
    """Estimate the undisturbed level of a series, as `paired_ratio` of it and 1 does.

    Args:
        values: positive, one a round, in the order of time.
        confidence: of the interval, between 0 and 1.

    Raises:
        UsageError: as `paired_ratio`.
    """
    found = paired_ratio(values, np.ones(len(values)), confidence=confidence)
    return Location(estimate=found.estimate, low=found.low, high=found.high)


def resolution(control: Ratio) -> float:
    """Compute what a measurement cannot resolve.

    Args:
        control: the ratio of a candidate and its copy (A/A).

    Returns:
        The end of its interval that is farthest from 1, as a ratio above 1.
    """
    return max(control.high, 1.0 / control.low)


def log_location_interval(
    x_RN: np.ndarray, *, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Estimate the location of each of R series of N rounds.

    Rounds farther than 5 scaled median absolute deviations from the median of their series are left out,
    unless they are more than a quarter of it; the spread of the rest is widened by the share left out.

    The rest is modelled as an AR(1) series of unknown mean, variance and autocorrelation rho. With rho known,
    the mean is Student t around the generalised least squares estimate; the interval integrates that over
    the posterior of rho under the flat prior (Zellner and Tiao, "Bayesian analysis of the regression model
    with autocorrelated errors", JASA 59, 1964, section 2), on 25 points from -0.9 to 0.9. Unlike one plug-in
    estimate of rho, which short series bias downward, this keeps its coverage at 20 rounds; see
    `tests/instruments/test_statistics.py` for the figures, and for those of other methods.

    Args:
        x_RN: the series.
        confidence: of the interval, between 0 and 1.

    Returns:
        Location, low, high, autocorrelation and number of outliers, each (R,).
    """
    center = np.median(x_RN, axis=1, keepdims=True)
    away = np.abs(x_RN - center)
    inside = away <= _OUTLIER_SIGMAS * 1.4826 * np.median(away, axis=1, keepdims=True)
    inside |= inside.mean(axis=1, keepdims=True) < 1.0 - _MAX_OUTLIER_SHARE
    share = inside.mean(axis=1, keepdims=True)
    n_outliers = (~inside).sum(axis=1)
    kept_mean = (x_RN * inside).mean(axis=1, keepdims=True) / share
    residual_RN = np.where(inside, x_RN - kept_mean, 0.0) / share

    n = x_RN.shape[1]
    mean_RG, scale_RG, log_weight_RG = (np.empty((len(x_RN), len(_RHO))) for _ in range(3))
    first, last = residual_RN[:, :1], residual_RN[:, :-1]
    tiny = np.finfo(np.float64).tiny
    for g, rho in enumerate(_RHO):
        start = math.sqrt(1.0 - rho**2)
        y_RN = np.concatenate([start * first, residual_RN[:, 1:] - rho * last], axis=1)
        ones_N = np.full(n, 1.0 - rho)
        ones_N[0] = start
        information = float(ones_N @ ones_N)
        mean = y_RN @ ones_N / information
        squares = ((y_RN - mean[:, np.newaxis] * ones_N) ** 2).sum(axis=1) + tiny
        mean_RG[:, g] = mean
        scale_RG[:, g] = np.sqrt(squares / ((n - 1) * information))
        log_weight_RG[:, g] = math.log(start) - 0.5 * math.log(information) - 0.5 * (n - 1) * np.log(squares)
    weight_RG = np.exp(log_weight_RG - log_weight_RG.max(axis=1, keepdims=True))
    weight_RG /= weight_RG.sum(axis=1, keepdims=True)

    middle = kept_mean[:, 0]
    tail = 0.5 * (1.0 - confidence)
    location, low, high = (
        middle + _mixture_quantile(p, weight_RG, mean_RG, scale_RG, n - 1) for p in (0.5, tail, 1.0 - tail)
    )
    return location, low, high, weight_RG @ _RHO, n_outliers


def _mixture_quantile(
    p: float, weight_RG: np.ndarray, mean_RG: np.ndarray, scale_RG: np.ndarray, dof: int
) -> np.ndarray:
    """The p-quantile of each row's mixture of Student t distributions, by bisection."""
    reach = scale_RG.max(axis=1)
    low, high = mean_RG.min(axis=1) - reach, mean_RG.max(axis=1) + reach
    for bound, sign in ((low, -1.0), (high, 1.0)):
        step = reach.copy()
        while True:
            below = (weight_RG * stdtr(dof, (bound[:, np.newaxis] - mean_RG) / scale_RG)).sum(axis=1)
            short = (below > p) if sign < 0 else (below < p)
            if not short.any():
                break
            bound[short] += sign * step[short]
            step *= 2.0
    for _ in range(_BISECTIONS):
        between = 0.5 * (low + high)
        below = (weight_RG * stdtr(dof, (between[:, np.newaxis] - mean_RG) / scale_RG)).sum(axis=1)
        low, high = np.where(below < p, between, low), np.where(below < p, high, between)
    quantile: np.ndarray = 0.5 * (low + high)
    return quantile
