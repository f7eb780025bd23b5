"""What does an iteration cost where the core runs several in one call?

Model: Linear(8, 8) with SGD(momentum), batch 4, cross-entropy; IterBasedRunner.run with the default hooks over a list
of 1,000 batches.
Cases: aot one by one; aot in bursts, no log due (bursts of up to 128, cut at the plan's own looks and at epoch ends);
aot in bursts, a log every 50, spread over all iterations (bursts of up to 48).
Peer: a loop by hand with torch's fused=True SGD.
Bars, at one thread: one by one at most 12 us between due points, in bursts at most 9, either at least 15 times the loop
by hand.
Gate: tests/plan/test_bursts.py and tests/step/test_aot.py must be green first.

The library is compiled before the clock starts, and every case takes it from the cache. Cases take turns in one
process.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_step import Model, by_hand, labelled, sgd
from torch import nn

from fastrunner import Hook, IterBasedRunner
from fastrunner.bench import machine
from fastrunner.bench.measure import Window, interleaved
from fastrunner.step.aot import AotGraphStep

RECORDS = Path(__file__).resolve().parent / "records"
NEVER = 10**9
LEAD, TIMED = 1_100, 20_000  # iterations
BARS_US = {"one by one": 12.0, "bursts": 9.0}
OVER_HAND = 15.0


class Clock(Hook):
    """Looks at the clock behind iterations LEAD and LEAD + TIMED."""

    def __init__(self) -> None:
        self.ns: list[int] = []

    def due(self, runner: Any) -> int:
        return next((at for at in (LEAD, LEAD + TIMED) if at >= runner.iter), NEVER)

    def after_train_iter(self, runner: Any) -> None:
        self.ns.append(time.perf_counter_ns())


def by_runner(batches: list[Any], folder: str, log_interval: int, bursts: bool) -> tuple[float, list[str]]:
    """ns an iteration, and what the plan says."""
    torch.manual_seed(0)
    model = Model(nn.Linear(8, 8))
    logger = logging.Logger("bench_bursts", logging.INFO)
    logger.addHandler(logging.FileHandler(Path(folder) / "run.log"))
    iters = LEAD + TIMED + 2
    optimizer = sgd(model.parameters())
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=iters, work_dir=folder, logger=logger, step="aot")
    runner.register_training_hooks(
        {"policy": "step", "step": [NEVER], "by_epoch": False},
        {},
        {"interval": NEVER, "save_last": False},
        {"interval": log_interval, "hooks": [{"type": "TextLoggerHook"}]},
    )
    clock = Clock()
    runner.register_hook(clock)
    given = AotGraphStep.why_single
    AotGraphStep.why_single = given if bursts else "for comparison"
    try:
        runner.run([batches], [("train", 1)])
    finally:
        AotGraphStep.why_single = given
    lines = runner.step.explain() + ([] if runner._plan.bursts is None else [runner._plan.bursts.explain()])
    return (clock.ns[1] - clock.ns[0]) / TIMED, lines


def measure(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    batches = [labelled((4, 8), 8) for _ in range(1000)]
    explained: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def case(name: str, log_interval: int, bursts: bool) -> Callable[[], float]:
            def sample() -> float:
                took, explained[name] = by_runner(batches, folder, log_interval, bursts)
                return took

            return sample

        def hand() -> float:
            model = Model(nn.Linear(8, 8))
            window = Window(batches, 2000, None, 100)
            by_hand(model, sgd(model.parameters(), fused=True), None)(window)
            return window.ns_per_iter

        wait_for_library(batches, folder)
        cases = {
            "hand": hand,
            "one by one": case("one by one", NEVER, False),
            "bursts": case("bursts", NEVER, True),
            "bursts, a log every 50": case("bursts, a log every 50", 50, True),
        }
        samples = interleaved(cases, rounds)
    return {"samples_ns": samples, "explained": explained, "rounds": rounds}


def wait_for_library(batches: list[Any], folder: str) -> None:
    """Train until the library has been compiled, at most ten minutes."""

    class Looks(Hook):
        end = time.monotonic() + 600

        def due(self, runner: Any) -> int:
            return int(runner.iter) + 200

        def after_train_iter(self, runner: Any) -> None:
            if not any("being compiled" in line for line in runner.step.explain()):
                runner.stop("there it is")
            elif time.monotonic() > self.end:
                raise SystemExit("the library was not compiled within ten minutes")

    model = Model(nn.Linear(8, 8))
    logger = logging.Logger("quiet", logging.CRITICAL)
    optimizer = sgd(model.parameters())
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=NEVER, work_dir=folder, logger=logger, step="aot")
    runner.register_training_hooks(None, {})
    runner.register_hook(Looks())
    runner.run([batches], [("train", 1)])


def report(result: dict[str, Any]) -> bool:
    medians = {name: median(each) / 1e3 for name, each in result["samples_ns"].items()}
    met = True
    for name, each in result["samples_ns"].items():
        bar = BARS_US.get(name)
        verdict = "" if bar is None else f", at most {bar:g}: {'met' if medians[name] <= bar else 'MISSED'}"
        met = met and (bar is None or medians[name] <= bar)
        low, high = min(each) / 1e3, max(each) / 1e3
        print(f"{name:<24} median {medians[name]:7.2f}  min {low:7.2f}  max {high:7.2f} us{verdict}")
        for line in result["explained"].get(name, ()):
            print(f"    {line}")
    for name in ("one by one", "bursts"):
        ratio = medians["hand"] / medians[name]
        print(f"{name}: {ratio:.1f} times the loop by hand")
        met = met and ratio >= OVER_HAND
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    result = measure(arguments.rounds)
    met = report(result)
    if arguments.record:
        path = RECORDS / f"{arguments.date}_bursts.json"
        path.write_text(json.dumps(dict(machine=facts, bars_us=BARS_US, met=met, **result), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
