"""Timings as samples, how sure they make us, and the clocks that stand in the way of a training loop.

A median is reported with the interval that holds the true median with the stated confidence, whatever the distribution:
the k-th smallest and the k-th largest of n samples, with k the largest for which

    1 - 2 * P(Binomial(n, 1/2) < k) >= 0.95
Source: order statistics, e.g. Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from time import perf_counter_ns
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Samples of one time, in nanoseconds, and what they say."""

    samples_ns: tuple[float, ...]

    @property
    def median_ns(self) -> float:
        return median(self.samples_ns)

    @property
    def min_ns(self) -> float:
        return min(self.samples_ns)

    @property
    def mean_ns(self) -> float:
        return sum(self.samples_ns) / len(self.samples_ns)

    @property
    def mad_ns(self) -> float:
        """Median absolute deviation from the median: half of the samples are closer than that."""
        middle = self.median_ns
        return median(abs(sample - middle) for sample in self.samples_ns)

    def summary(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "median_ns": self.median_ns,
            "mad_ns": self.mad_ns,
            "min_ns": self.min_ns,
            "mean_ns": self.mean_ns,
            "samples_ns": list(self.samples_ns),
        }


@dataclass(frozen=True)
class Difference:
    """``case - floor``, paired by round, in nanoseconds: median, and the interval that holds the true median."""

    median_ns: float
    low_ns: float
    high_ns: float
    confidence: float

    @property
    def contains_zero(self) -> bool:
        return self.low_ns <= 0 <= self.high_ns


def difference(case: Sequence[float], floor: Sequence[float]) -> Difference:
    """The difference of samples that were taken in the same rounds.

    Raises:
        ValueError: no samples, or not as many of one as of the other.
    """
    if len(case) != len(floor) or not case:
        raise ValueError(f"paired samples are needed, got {len(case)} and {len(floor)}")
    deltas = sorted(a - b for a, b in zip(case, floor, strict=True))
    k, confidence = order_statistic(len(deltas))
    return Difference(median(deltas), deltas[k - 1], deltas[-k], confidence)


def order_statistic(n: int, confidence: float = CONFIDENCE) -> tuple[int, float]:
    """``(k, confidence)``: the k-th smallest and largest of n samples enclose the median that often.

    With fewer than 6 samples even the smallest and the largest (k = 1) do so less often than 95 %; then the true
    confidence is returned.
    """
    k, tail = 1, 0.5**n  # tail: P(fewer than k of n samples are below the median)
    while k < (n + 1) // 2 and 1 - 2 * (tail + comb(n, k) * 0.5**n) >= confidence:
        tail += comb(n, k) * 0.5**n
        k += 1
    return k, 1 - 2 * tail


def interleaved(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of several cases, taken in turns, so that drift of the machine meets all of them alike.

    Args:
        cases: name -> function that returns one sample. Odd rounds call them in reverse order.
        rounds: samples of each case.
    """
    names = list(cases)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there already (all of torch) is not looked through again: 0.1 s a sweep
    try:
        for number in range(rounds):
            for name in reversed(names) if number % 2 else names:
                gc.collect()  # one case's garbage is not to be swept on another one's clock
                samples[name].append(cases[name]())
    finally:
        gc.unfreeze()
    return samples


class Window:
    """A source of batches that times the loop which consumes it; the loop itself contains no clock.

    The first batches warm up. The clock starts when the next one is asked for and stops when the last one is, so what
    is timed is ``num_iters`` whole iterations, whatever happens before and after the loop.

    Args:
        batches: used over and over.
        num_iters: iterations that are timed; the source is ``lead + 1`` batches longer.
        synchronize: waits for the device.
        lead: batches that are not timed, at the start.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        num_iters: int,
        synchronize: Callable[[], None] | None = None,
        lead: int = 1,
    ) -> None:
        self.num_iters, self._lead = num_iters, lead
        self._items = [batches[i % len(batches)] for i in range(num_iters + lead + 1)]
        self._synchronize = synchronize
        self._begin = self._end = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        yield from self._items[: self._lead]
        self._begin = self._now()
        yield from self._items[self._lead : -1]
        self._end = self._now()
        yield self._items[-1]

    def _now(self) -> int:
        if self._synchronize is not None:
            self._synchronize()
        return perf_counter_ns()

    @property
    def ns_per_iter(self) -> float:
        return (self._end - self._begin) / self.num_iters


class StampedSource:
    """A source of batches that notes when each batch was asked for and when it was given. Everything else is passed on.

    Cost: two readings of the clock an iteration, some 0.2 us; and 1 us where the source can tell what lies ready.

    Args:
        source: the loader.
        synchronize: waits for the device; called before the batches numbered in ``at`` are asked for.
    """

    def __init__(
        self, source: Any, synchronize: Callable[[], None] | None = None, at: frozenset[int] = frozenset()
    ) -> None:
        self._source, self._synchronize = source, synchronize
        self._at = at if synchronize is not None else frozenset()
        self.asked_ns: list[int] = []
        self.given_ns: list[int] = []
        self.ready: list[int] = []  # batches that lay ready when one was asked for, where the source can tell

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[Any]:
        asked, given = self.asked_ns, self.given_ns
        batches = iter(self._source)
        while True:
            if len(asked) in self._at and self._synchronize is not None:
                self._synchronize()
            ready = getattr(self._source, "num_ready", None)
            if ready is not None:
                self.ready.append(ready)
            asked.append(perf_counter_ns())
            try:
                batch = next(batches)
            except StopIteration:
                asked.pop()  # nothing was given: the time belongs to the end of the epoch
                return
            given.append(perf_counter_ns())
            yield batch
            del batch  # as our loaders do: freeing it is no part of the wait for the next one
