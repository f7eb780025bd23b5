"""What does the runner add to an iteration whose step does nothing?

Floor: a bare loop with the same calls: train_step, zero_grad, backward, clip and step, the last three of them empty.
Cases: the runner with
  default        the hooks of register_training_hooks: step lr by iteration with warmup, OptimizerHook with grad_clip,
                 CheckpointHook, IterTimerHook, TextLoggerHook; between due points
  every 50       the same, and a log every 50 iterations to a file and to .log.json, spread over all iterations
  everything     default, EMAHook, an EvalHook and a TensorboardLoggerHook that are not due; between due points
  50 idle        default, and 25 hooks that override nothing, 25 that are not due; floor here: default; from iteration
                 1,100 on, with two of the points at which the plan looks up though nobody is due
Bars: default 1 us, every 50 4 us, everything 1.5 us; 50 idle: the interval of the difference holds zero.
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
from fastrunner.bench.tax import NEVER, hooks_tax, noop_tax

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


IDLE = "50 idle"
CASES = {  # name -> (iterations a round, log interval, further hooks, bar in us)
    "default": (180, None, tuple, 1.0),
    "every 50": (1000, 50, tuple, 4.0),
    "everything": (180, None, everything, 1.5),
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
            results[f"{runner}, {IDLE}"] = hooks_tax(
                runner, fifty_idle, num_iters=512, rounds=rounds, work_dir=Path(folder) / "work", logger=logger
            )
    return results


def report(results: dict[str, dict]) -> bool:
    met = True
    for name, result in results.items():
        tax, case_name = result["tax_us"], name.split(", ")[1]
        if case_name == IDLE:
            held, wanted = tax["low"] <= 0, "over none, within noise"
        else:
            bar = CASES[case_name][3]
            held, wanted = tax["median"] <= bar, f"at most {bar:g}"
        met = met and held
        print(f"{'met' if held else 'MISSED'}: {name}: {tax['median']:+.2f} us an iteration, {wanted}")
        print(
            f"  {tax['confidence']:.0%} sure: {tax['low']:+.3f} to {tax['high']:+.3f}; smallest against smallest "
            f"{tax['of_minima']:+.2f}; {result['rounds']} rounds of {result['iters_per_round']}"
        )
        for side in ("bare", "runner"):
            timing = result[side]
            print(
                f"  {side:<6} median {timing['median_ns'] / 1e3:6.2f}  MAD {timing['mad_ns'] / 1e3:5.2f}  "
                f"min {timing['min_ns'] / 1e3:6.2f}  max {max(timing['samples_ns']) / 1e3:6.2f} us"
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
