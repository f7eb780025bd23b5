"""Statistics against brute force, clocks against loops whose times are known."""

from __future__ import annotations

import gc
import random
from functools import partial
from itertools import product
from math import comb
from types import SimpleNamespace

import pytest

from fastrunner.bench import measure
from fastrunner.bench.measure import (
    Difference,
    StampedSource,
    Timing,
    Window,
    difference,
    interleaved,
    order_statistic,
)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter_ns", clock)
    return clock


def test_timing():
    timing = Timing((5.0, 1.0, 3.0, 100.0, 4.0))
    assert (timing.median_ns, timing.min_ns, timing.mad_ns, timing.mean_ns) == (4.0, 1.0, 1.0, 22.6)
    assert timing.summary() == {
        "median_ns": 4.0, "mad_ns": 1.0, "min_ns": 1.0, "mean_ns": 22.6, "samples_ns": [5.0, 1.0, 3.0, 100.0, 4.0],
    }  # fmt: skip


@pytest.mark.parametrize("n", range(1, 13))
def test_order_statistic_by_enumeration(n):
    """Every pattern of samples below or above the true median is as likely as any other."""
    k, confidence = order_statistic(n)
    covered = sum(k <= sum(below) <= n - k for below in product((0, 1), repeat=n))
    assert confidence == pytest.approx(covered / 2**n)
    wider = sum(k + 1 <= sum(below) <= n - k - 1 for below in product((0, 1), repeat=n))
    assert wider / 2**n < 0.95  # no narrower interval would do
    assert confidence >= 0.95 or k == 1


def test_order_statistic_of_a_table():
    # Conover's table A3 and every textbook's: n -> k for at least 95 %
    assert {n: order_statistic(n)[0] for n in (6, 9, 12, 15, 20, 25, 31)} == {
        6: 1, 9: 2, 12: 3, 15: 4, 20: 6, 25: 8, 31: 10,
    }  # fmt: skip
    assert order_statistic(9)[1] == pytest.approx(1 - 2 * (comb(9, 0) + comb(9, 1)) / 2**9)


def test_interval_covers_as_often_as_it_says():
    random.seed(1)
    covered = 0
    for _ in range(2000):
        case = [random.expovariate(1.0) for _ in range(15)]  # skewed, as timings are; median ln 2
        delta = difference(case, [0.0] * 15)
        covered += delta.low_ns <= 0.6931 <= delta.high_ns
    # 96.5 % are expected for n = 15; 5 standard deviations of 2,000 tries are 2.1 %
    assert covered / 2000 > 0.944


def test_difference_is_paired_by_round():
    drift = [0.0, 50.0, 10.0, 400.0, 3.0, 90.0, 7.0]
    delta = difference([d + 5 for d in drift], drift)
    assert (delta.median_ns, delta.low_ns, delta.high_ns) == (5, 5, 5)
    assert not delta.contains_zero
    assert Difference(1, -1, 3, 0.95).contains_zero


@pytest.mark.parametrize(("case", "floor"), [([], []), ([1.0], [1.0, 2.0])])
def test_difference_needs_pairs(case, floor):
    with pytest.raises(ValueError, match="paired samples are needed"):
        difference(case, floor)


def test_interleaved_takes_turns():
    order: list[str] = []

    def case(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleaved({"a": lambda: case("a"), "b": lambda: case("b")}, rounds=3)
    assert "".join(order) == "abbaab"
    assert samples == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_window_times_whole_iterations_without_the_first_and_the_last(clock):
    window = Window(["x", "y"], num_iters=3)
    seen = []
    cost = iter([10_000, 7, 8, 9, 50_000])
    for batch in window:
        seen.append(batch)
        clock.now += next(cost)
    assert seen == ["x", "y", "x", "y", "x"]
    assert len(window) == len(seen)
    assert window.ns_per_iter == (7 + 8 + 9) / 3


def test_window_waits_for_the_device(clock):
    window = Window([0], num_iters=2, synchronize=lambda: setattr(clock, "now", clock.now + 100))
    for _ in window:
        clock.now += 1
    assert window.ns_per_iter == (2 + 100) / 2  # what was still running at the end belongs to the iterations


class SlowSource:
    """Gives three batches an epoch, each 20 ns after it was asked for."""

    seed = 3

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.sought: tuple[int, int] | None = None

    def __len__(self) -> int:
        return 3

    def seek(self, epoch: int, position: int) -> None:
        self.sought = (epoch, position)

    def __iter__(self):
        for batch in range(3):
            self.clock.now += 20
            yield batch
        self.clock.now += 300


def test_stamped_source(clock):
    inner = SlowSource(clock)
    source = StampedSource(inner)
    batches = []
    for _ in range(2):
        for batch in source:
            batches.append(batch)
            clock.now += 5
    assert batches == [0, 1, 2] * 2
    waits = [given - asked for asked, given in zip(source.asked_ns, source.given_ns, strict=True)]
    iterations = [b - a for a, b in zip(source.asked_ns, source.asked_ns[1:], strict=False)]
    assert waits == [20] * 6
    assert iterations == [25, 25, 325, 25, 25]  # the end of an epoch belongs to its last iteration
    source.seek(4, 2)
    assert (len(source), source.seed, inner.sought) == (3, 3, (4, 2))
    assert not hasattr(StampedSource([1]), "seek")


def test_stamped_source_synchronizes_where_it_was_told_to(clock):
    calls: list[int] = []
    source = StampedSource(range(5), lambda: calls.append(len(source.asked_ns)), frozenset((1, 4)))
    assert list(source) == [0, 1, 2, 3, 4]
    assert calls == [1, 4]


def test_garbage_is_swept_before_each_sample(monkeypatch):
    calls: list[str] = []
    fake = SimpleNamespace(**{name: partial(calls.append, name) for name in ("collect", "freeze", "unfreeze")})
    monkeypatch.setattr(measure, "gc", fake)
    interleaved({name: lambda: calls.append("sample") or 1.0 for name in "ab"}, rounds=2)
    assert calls == ["collect", "freeze", *["collect", "sample"] * 4, "unfreeze"]


def test_sweeping_is_as_before_when_a_case_fails():
    frozen = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, rounds=1)
    assert gc.get_freeze_count() == frozen
