"""What does the runner add to an iteration whose step does nothing?

Floor: a bare loop with the same calls: train_step, zero_grad, backward, step, the last three of them empty.
Case: the runner with the default hooks of register_training_hooks: step lr with warmup, OptimizerHook, CheckpointHook,
IterTimerHook, TextLoggerHook. Between due points nothing is logged or saved in the timed iterations; the second figure
logs every 50 iterations to a file and to .log.json, and spreads that over all iterations.
Bar: at most 5 us an iteration between due points.
Gate: tests/bench/test_tax.py must be green first. (Peers come with the comparison of all runners.)

Floor and case take turns in one process; a difference is taken within a round.
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

from fastrunner.bench import machine
from fastrunner.bench.tax import noop_tax

RECORDS = Path(__file__).resolve().parent / "records"
BAR_US = 5.0
CASES = {  # name -> (iterations a round, log interval, whether the bar is for it)
    "between due points": (200, None, True),
    "log every 50": (1000, 50, False),
}


def measure(rounds: int) -> dict[str, dict]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        logger = logging.Logger("bench_runner_tax", logging.INFO)
        logger.addHandler(logging.FileHandler(Path(folder) / "run.log"))
        for runner in ("iter", "epoch"):
            for name, (num_iters, log_interval, _) in CASES.items():
                results[f"{runner}, {name}"] = noop_tax(
                    runner,
                    num_iters=num_iters,
                    rounds=rounds,
                    work_dir=Path(folder) / "work",
                    logger=logger,
                    log_interval=log_interval,
                )
    return results


def report(results: dict[str, dict]) -> bool:
    met = True
    for name, result in results.items():
        tax, bare, case = result["tax_us"], result["bare"], result["runner"]
        barred = CASES[name.split(", ")[1]][2]
        verdict = "" if not barred else "met: " if tax["median"] <= BAR_US else "MISSED: "
        met = met and verdict != "MISSED: "
        print(f"{verdict}{name}: {tax['median']:+.2f} us an iteration" + (f", at most {BAR_US:.0f}" if barred else ""))
        print(
            f"  {tax['confidence']:.0%} sure: {tax['low']:+.2f} to {tax['high']:+.2f}; smallest against smallest "
            f"{tax['of_minima']:+.2f}; {result['rounds']} rounds of {result['iters_per_round']}"
        )
        for side, timing in (("bare", bare), ("runner", case)):
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
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results = measure(arguments.rounds)
    met = report(results)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_runner_tax.json"
        path.write_text(json.dumps(dict(machine=facts, bar_us=BAR_US, met=met, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
