"""What does the end of an epoch cost, with a loader in memory?

From the last batch of an epoch to the moment when the first of the next is asked for: hooks at the epoch's end and
start, a new order of samples, a new iterator. The step does nothing, no checkpoint is due, and nothing is logged.
Floor: the median iteration inside the epochs, which is subtracted.
Bar: under 1 ms. (mmcv 1.7.2 sleeps 2 s there.)
Gate: tests/runner must be green first.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastrunner import ArrayDataset, Digits, build_dataloader
from fastrunner.bench import machine
from fastrunner.bench.measure import StampedSource, Timing
from fastrunner.bench.tax import NEVER, NoopModel, NoopOptimizer
from fastrunner.bench.training import Plan, make_runner

RECORDS = Path(__file__).resolve().parent / "records"
BAR_US = 1000.0


def loaders() -> dict[str, Any]:
    digits = Digits("train")
    dataset = ArrayDataset({"img": digits.images, "gt_label": digits.labels})
    return {
        "a list": [{"img": digits.images[:32], "gt_label": digits.labels[:32]}] * 45,
        "digits, shuffled": build_dataloader(dataset, 32, 0, seed=0),
    }


def boundaries(kind: str, loader: Any, epochs: int, folder: Path) -> Timing:
    """Nanoseconds over the median iteration, for each epoch end of one run."""
    plan = Plan(kind, num_iters=epochs * len(loader), epoch_length=len(loader), log_interval=NEVER)
    model = NoopModel()
    runner = make_runner(
        plan,
        model,
        NoopOptimizer(model.parameters(), lr=0.1),
        folder,
        logging.Logger("bench_epoch_boundary", logging.WARNING),
        optimizer_config={"grad_clip": None},
        checkpoint_config={"interval": NEVER, "save_last": False},
    )
    source = StampedSource(loader)
    runner.run([source], [("train", 1)])
    # The next batch is asked for when the epoch's end is over, so all of it lies in the epoch's last iteration.
    iters = [after - before for before, after in pairwise(source.asked_ns)]
    ends = range(len(loader) - 1, len(iters), len(loader))
    inside = median(ns for i, ns in enumerate(iters) if i not in ends)
    return Timing(tuple(iters[i] - inside for i in ends))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results, met = {}, True
    for kind in ("epoch", "iter"):
        for name, loader in loaders().items():
            with tempfile.TemporaryDirectory() as folder:
                timing = boundaries(kind, loader, arguments.epochs, Path(folder))
            results[f"{kind}, {name}"] = timing.summary()
            fits = timing.median_ns / 1e3 < BAR_US
            met = met and fits
            print(
                f"{'met' if fits else 'MISSED'}: {kind}, {name}: median {timing.median_ns / 1e3:.0f} us, under "
                f"{BAR_US:.0f}; MAD {timing.mad_ns / 1e3:.0f}, min {timing.min_ns / 1e3:.0f}, "
                f"max {max(timing.samples_ns) / 1e3:.0f}, {len(timing.samples_ns)} epoch ends"
            )
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_epoch_boundary.json"
        path.write_text(json.dumps(dict(machine=facts, bar_us=BAR_US, met=met, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
