"""What does the runner add to an iteration whose step does nothing?

Floor: a bare loop with the same calls: train_step, zero_grad, backward, clip and step, the last three of them empty.
Cases: the runner with
  default        the hooks of register_training_hooks: step lr by iteration with warmup, OptimizerHook with grad_clip,
                 CheckpointHook, IterTimerHook, TextLoggerHook; between due points
  every 50       the same, and a log every 50 iterations to a file and to .log.json, spread over all iterations
  everything     default, EMAHook, an EvalHook and a TensorboardLoggerHook that are not due; between due points
  50 idle        default, and 25 hooks that override nothing, 25 that are not due
Bars: default 1 us, every 50 4 us, everything 1.5 us; 50 idle: the interval of the difference to default holds zero.
Gate: tests/bench/test_tax.py and tests/plan must be green first. Peers: `python -m fastrunner.bench --against`.

Floor and case take turns in one process; a difference is taken within a round. One thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastrunner import EMAHook, EvalHook, Hook, TensorboardLoggerHook
from fastrunner.bench import machine
from fastrunner.bench.measure import difference
from fastrunner.bench.tax import NEVER, noop_tax

RECORDS = Path(__file__).resolve().parent / "records"


class NotDue(Hook):
    """A hook of a user's that acts once in a very long while."""

    def due(self, runner):
        return NEVER

    def after_train_iter(self, runner):
        pass


def everything():
    evaluation = EvalHook([{}], interval=NEVER, by_epoch=False, evaluate=lambda results: {})
    tensorboard = TensorboardLoggerHook(interval=NEVER, by_epoch=False)
    return [(EMAHook(), "NORMAL"), (evaluation, "LOW"), (tensorboard, "VERY_LOW")]


def fifty_idle():
    return [(kind(), priority) for kind in (Hook, NotDue) for priority in range(2, 100, 4)]


CASES = {  # name -> (iterations a round, log interval, further hooks, bar in us)
    "default": (180, None, tuple, 1.0),
    "every 50": (1000, 50, tuple, 4.0),
    "everything": (180, None, everything, 1.5),
    "50 idle": (180, None, fifty_idle, None),
}


def measure(rounds: int) -> dict[str, dict]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        logger = logging.Logger("bench_runner_tax", logging.INFO)
        logger.addHandler(logging.FileHandler(Path(folder) / "run.log"))
        for runner in ("iter", "epoch"):
            for name, (num_iters, log_interval, hooks, _) in CASES.items():
                results[f"{runner}, {name}"] = noop_tax(
                    runner,
                    num_iters=num_iters,
                    rounds=rounds,
                    work_dir=Path(folder) / "work",
                    logger=logger,
                    log_interval=log_interval,
                    hooks=hooks,
                )
    return results


def report(results: dict[str, dict]) -> bool:
    met = True
    for name, result in results.items():
        tax, bare, case = result["tax_us"], result["bare"], result["runner"]
        bar, verdict = CASES[name.split(", ")[1]][3], ""
        if bar is not None:
            verdict = "met: " if tax["median"] <= bar else "MISSED: "
        met = met and verdict != "MISSED: "
        print(f"{verdict}{name}: {tax['median']:+.2f} us an iteration" + (f", at most {bar:g}" if bar else ""))
        print(
            f"  {tax['confidence']:.0%} sure: {tax['low']:+.2f} to {tax['high']:+.2f}; smallest against smallest "
            f"{tax['of_minima']:+.2f}; {result['rounds']} rounds of {result['iters_per_round']}"
        )
        for side, timing in (("bare", bare), ("runner", case)):
            print(
                f"  {side:<6} median {timing['median_ns'] / 1e3:6.2f}  MAD {timing['mad_ns'] / 1e3:5.2f}  "
                f"min {timing['min_ns'] / 1e3:6.2f}  max {max(timing['samples_ns']) / 1e3:6.2f} us"
            )
    for runner in ("iter", "epoch"):
        idle, default = (results[f"{runner}, {name}"]["runner"]["samples_ns"] for name in ("50 idle", "default"))
        delta = difference(idle, default)
        verdict = "met" if delta.low_ns <= 0 else "MISSED"
        met = met and verdict == "met"
        print(
            f"{verdict}: {runner}, 50 idle hooks over none: {delta.median_ns:+.0f} ns, "
            f"{delta.confidence:.0%} sure: {delta.low_ns:+.0f} to {delta.high_ns:+.0f}"
        )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results = measure(arguments.rounds)
    met = report(results)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_runner_tax.json"
        bars = {name: bar for name, (*_, bar) in CASES.items()}
        path.write_text(json.dumps(dict(machine=facts, bars_us=bars, met=met, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
