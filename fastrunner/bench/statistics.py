"""Who is faster, and how sure is that: differences of two cases over processes and rounds, with bootstrap intervals.

Samples are nested: a case runs in several processes (whose memory lies differently, which alone moves times by
percents), each of which is timed in several rounds. Two cases are compared within a round, where they met the same
weather:

    d[p][r] = log(case[p][r] / base[p][r])        difference = exp(median over p of median over r of d) - 1

The interval is a bootstrap over processes (rounds are not drawn again: their spread is in that of the processes'
medians already), with expanded percentiles: a percentile bootstrap of n processes is too narrow by the factor
z / t_{n-1} * sqrt((n - 1) / n), so its percentiles are moved out:

    alpha' / 2 = Phi(-sqrt(n / (n - 1)) * t_{1 - alpha / 2, n - 1})
Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, The American Statistician 69, pp. 371-386,
https://arxiv.org/abs/1411.5279; the formula is that of ``ExpandProbs`` in its author's R package, resample 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
# Student's t, 97.5 %, for 1, 2, 3, ... degrees of freedom; any table of it.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
# Below that no winner is named, however narrow the interval: two builds of one program differ by as much through the
# addresses at which their code happens to lie (Mytkowicz et al. 2009, Producing Wrong Data Without Doing Anything
# Obviously Wrong, ASPLOS).
LEAST = 0.005
FEW = 5  # processes, below which a bootstrap is not enough
TOO_WIDE = 0.5  # an interval that is wider than this says nothing: the machine was too noisy

Samples = Sequence[Sequence[float]]  # [process][round], nanoseconds


@dataclass(frozen=True)
class Change:
    """By how much a case's time differs from a base's, as a share of the base's: 0.05 is 5 % slower.

    Attributes:
        median, low, high: the difference, and the 95 % interval.
        median_ns, low_ns, high_ns: the same in nanoseconds.
    """

    median: float
    low: float
    high: float
    median_ns: float
    low_ns: float
    high_ns: float

    @property
    def verdict(self) -> str:
        """ "slower", "faster", "no difference", or "too noisy" where the interval says nothing."""
        if self.low > LEAST:
            return "slower"
        if self.high < -LEAST:
            return "faster"
        return "too noisy" if self.high - self.low > TOO_WIDE else "no difference"

    def summary(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def change(case: Samples, base: Samples, seed: int = 0) -> Change:
    """The difference of two cases that were timed in the same processes' turns and rounds.

    Raises:
        ValueError: not the same number of processes or rounds, or none.
    """
    a, b = (np.asarray(samples, dtype=np.float64) for samples in (case, base))
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f"samples [process][round] of equal shape are needed, got {a.shape} and {b.shape}")
    ratio = _interval(np.log(a / b), seed)
    nanoseconds = _interval(a - b, seed)
    return _change(ratio, nanoseconds)


def unpaired(case: Samples, base: Samples, seed: int = 0) -> Change:
    """The difference of two cases that were timed at different times, e.g. in two records.

    Raises:
        ValueError: no samples.
    """
    a, b = (np.asarray(samples, dtype=np.float64) for samples in (case, base))
    if a.ndim != 2 or b.ndim != 2 or not a.size or not b.size:
        raise ValueError(f"samples [process][round] are needed, got {a.shape} and {b.shape}")
    ratio = _spread(np.log(a), seed, np.log(b))
    nanoseconds = _spread(a, seed, b)
    return _change(ratio, nanoseconds)


def _change(log_ratio: tuple[float, float, float], ns: tuple[float, float, float]) -> Change:
    median, low, high = (float(np.expm1(x)) for x in log_ratio)
    return Change(median, low, high, *ns)


def in_words(change: float) -> str:
    """A difference as a share, or as a multiple where it is large: "+12.3%", "8.8 x"."""
    return f"{change:+.1%}" if change < 1 else f"{1 + change:.1f} x"


def middle(samples: Samples) -> float:
    """The median over processes of the median over rounds, nanoseconds."""
    return float(np.median(np.median(np.asarray(samples), axis=1)))


def _interval(deltas: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    return _spread(deltas, seed, None)


def _spread(values: NDArray[np.float64], seed: int, base: NDArray[np.float64] | None) -> tuple[float, float, float]:
    """``(median, low, high)`` of ``values``, or of ``values`` less ``base``."""
    rng = np.random.default_rng(seed)
    point = float(np.median(np.median(values, axis=1)))
    drawn = _resampled(values, rng)
    fewest = values.shape[0] if values.shape[0] > 1 else values.shape[1]
    if base is not None:
        point -= float(np.median(np.median(base, axis=1)))
        drawn = drawn - _resampled(base, rng)
        fewest = min(fewest, base.shape[0] if base.shape[0] > 1 else base.shape[1])
    tail = expanded_tail(fewest)
    low, high = (float(x) for x in np.quantile(drawn, [tail, 1 - tail]))
    if fewest < FEW:  # no draw of so few lies further out than the most extreme of them: Student's interval does
        half = _t975(fewest - 1) * sqrt(fewest / (fewest - 1)) * float(drawn.std()) if fewest > 1 else inf
        low, high = min(low, point - half), max(high, point + half)
    return point, min(low, point), max(high, point)


def _t975(freedom: int) -> float:
    return T975[freedom - 1] if freedom <= len(T975) else NormalDist().inv_cdf(0.975)


def _resampled(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """The estimate for RESAMPLES draws of processes with replacement; of rounds, where there is one process.

    The mean over processes stands for their median: that of a handful would take a handful of values only.
    """
    units = np.median(values, axis=1) if values.shape[0] > 1 else values[0]
    drawn = units[rng.integers(len(units), size=(RESAMPLES, len(units)))]
    return np.asarray(drawn.mean(axis=1) if values.shape[0] > 1 else np.median(drawn, axis=1))


def expanded_tail(n: int) -> float:
    """The percentile, below 0.025, that makes a bootstrap of ``n`` units an interval of 95 %.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    if n == 1:
        return 0.0
    return NormalDist().cdf(-sqrt(n / (n - 1)) * _t975(n - 1))


def winner(cases: Mapping[str, Samples]) -> tuple[str | None, str]:
    """``(name, sentence)``: the fastest case if it is faster than each other one beyond the interval, else None.

    Raises:
        ValueError: no cases.
    """
    if not cases:
        raise ValueError("no cases")
    first, *others = sorted(cases, key=lambda name: middle(cases[name]))
    if not others:
        return None, f"{first} is alone: nothing to compare it with"
    level = [name for name in others if change(cases[name], cases[first]).verdict != "slower"]
    if level:
        return None, f"no winner: {first} and {', '.join(level)} cannot be told apart here"
    second = change(cases[others[0]], cases[first])
    return first, f"{first} is first: the next, {others[0]}, takes {in_words(second.low)} to {in_words(second.high)}"
