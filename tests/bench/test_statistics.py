"""Verdicts on synthetic clocks: nothing here reads a real one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from fastrunner.bench import statistics
from fastrunner.bench.statistics import change, expanded_tail, middle, unpaired, winner

ROOT = Path(__file__).parents[2]
SHAPE = (6, 6)  # processes, rounds: the defaults of --sessions and --rounds


def clock(rng, factor=1.0, weather=None):
    """Times as a machine gives them: weather that all cases share (10 %), processes (1 %) and rounds (2 %) of their
    own, one round in twenty disturbed by half."""
    weather = np.ones(SHAPE) if weather is None else weather
    own = np.exp(rng.normal(0, 0.01, (SHAPE[0], 1))) * np.exp(rng.normal(0, 0.02, SHAPE))
    return 1e6 * factor * weather * own * np.where(rng.random(SHAPE) < 0.05, 1.5, 1.0)


def test_a_a_says_no_difference_and_five_percent_is_found():
    """Of 200 comparisons: at least 19 of 20 of a case with itself, at least 9 of 10 planted slowdowns."""
    rng = np.random.default_rng(7)
    same = slower = 0
    for _ in range(200):
        weather = np.exp(rng.normal(0, 0.1, SHAPE))
        base = clock(rng, weather=weather)
        same += change(clock(rng, weather=weather), base).verdict == "no difference"
        slower += change(clock(rng, 1.05, weather), base).verdict == "slower"
    assert same >= 190
    assert slower >= 180


def test_recorded_samples():
    """The same of real samples: those of the newest record, judged again."""
    paths = sorted((ROOT / "benchmarks" / "records").glob("*_verdicts.json"))
    if not paths:
        pytest.skip("there is no record: python benchmarks/bench_verdicts.py --record")
    spec = importlib.util.spec_from_file_location("bench_verdicts", ROOT / "benchmarks" / "bench_verdicts.py")
    bench_verdicts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_verdicts)
    record = json.loads(paths[-1].read_text())
    found = bench_verdicts.verdicts(record["sessions_ns"])
    assert len(found["no difference"]) >= 20
    assert len(found["slower"]) >= 10
    assert bench_verdicts.report(found)


def test_a_a_of_two_records():
    """Records of different days share no weather: 10 % of it makes the interval wide, not the verdict wrong."""
    rng = np.random.default_rng(8)
    verdicts = [unpaired(clock(rng), clock(rng)).verdict for _ in range(100)]
    assert verdicts.count("no difference") >= 95
    assert sum(unpaired(clock(rng, 1.1), clock(rng)).verdict == "slower" for _ in range(50)) >= 45


def test_two_processes_need_a_wide_interval():
    """With 2 processes Student's t has 1 degree of freedom: 12.7 standard errors."""
    base, case = np.ones((2, 5)) * 100.0, np.array([[101.0] * 5, [103.0] * 5])
    found = change(case, base)
    deltas = np.log([1.01, 1.03])
    half = 12.706 * deltas.std(ddof=1) / np.sqrt(2)
    expected = np.expm1([deltas.mean() - half, deltas.mean() + half])
    np.testing.assert_allclose([found.low, found.high], expected, rtol=0.05)  # the bootstrap's own noise
    assert found.verdict == "no difference"


def test_exact_differences():
    base = np.arange(1.0, 31.0).reshape(5, 6)
    found = change(2 * base, base)
    assert (found.median, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert found.verdict == "slower"
    assert change(base, 2 * base).verdict == "faster"
    assert found.summary()["verdict"] == "slower"
    assert middle(base) == np.median(np.median(base, axis=1))


def test_tiny_differences_name_nobody():
    """0.4 % without any noise is below what the place of code in memory does."""
    base = np.full((5, 3), 1000.0)
    assert change(1.004 * base, base).verdict == "no difference"
    assert change(1.006 * base, base).verdict == "slower"


def test_hopeless_noise_is_called_so():
    rng = np.random.default_rng(0)
    base = np.exp(rng.normal(0, 1.5, SHAPE))
    assert change(np.exp(rng.normal(0, 1.5, SHAPE)), base).verdict == "too noisy"


def test_one_process_resamples_rounds():
    found = change([[11.0, 12.0, 13.0, 12.0, 11.5, 12.5]], [[10.0] * 6])
    assert 0.1 <= found.low <= found.median <= found.high <= 0.3


def test_same_samples_same_interval():
    rng = np.random.default_rng(3)
    a, b = clock(rng), clock(rng)
    assert change(a, b) == change(a, b)


def test_expanded_tail():
    """n = 10: t = 2.262, so Phi(-2.262 * sqrt(10 / 9)) = Phi(-2.384) = 0.0086."""
    assert expanded_tail(10) == pytest.approx(0.0086, abs=1e-4)
    assert expanded_tail(1) == 0.0
    assert expanded_tail(10_000) == pytest.approx(0.025, abs=1e-3)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        expanded_tail(0)


def test_winner():
    rng = np.random.default_rng(4)
    base = clock(rng)
    first, sentence = winner({"a": base, "b": 1.2 * base, "c": 1.5 * base})
    assert first == "a"
    assert sentence.startswith("a is first: the next, b,")
    first, sentence = winner({"a": base, "b": 1.5 * base, "c": 1.001 * base})
    assert first is None
    assert sentence == "no winner: a and c cannot be told apart here"
    assert winner({"a": base})[0] is None
    with pytest.raises(ValueError, match="no cases"):
        winner({})


@pytest.mark.parametrize("bad", [[], [[]], [1.0, 2.0]])
def test_bad_samples(bad):
    with pytest.raises(ValueError, match="samples"):
        change(bad, bad)
    with pytest.raises(ValueError, match="samples"):
        unpaired(bad, [[1.0]])
    with pytest.raises(ValueError, match="equal shape"):
        statistics.change([[1.0, 2.0]], [[1.0]])
