"""Does a step that is slower than its data ever wait for it, in the middle of an epoch or at its end?

Random crop, mirroring, normalisation of 32 x 32 x 3 bytes on one thread, in batches of 64; the "step" is a wait for a
clock, which leaves the other core alone, several times as long as a batch takes to make. Both runners, the usual hooks.
Bars: data wait at most 1 % of the iteration (means); no iteration near an epoch's end (the last, and the first of the
next) slower than the median by more than 1 ms.
Gate: tests/data must be green first.
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
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from fastrunner import ArrayDataset, build_dataloader
from fastrunner.bench import machine
from fastrunner.bench.measure import StampedSource
from fastrunner.bench.tax import NEVER, NoopModel, NoopOptimizer
from fastrunner.bench.training import Plan, make_runner

RECORDS = Path(__file__).resolve().parent / "records"
STEP_S, BATCH = 0.004, 64
WAIT_BAR, END_BAR_MS = 0.01, 1.0
OPERATIONS = [
    dict(type="RandomCrop", size=32, padding=4),
    dict(type="RandomFlip"),
    dict(type="Normalize", mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]),
    dict(type="Layout", order="CHW"),
]


class SlowModel(NoopModel):
    """A step of constant length on a device of its own, as a GPU's is."""

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        time.sleep(STEP_S)
        return super().train_step(data_batch, optimizer, **kwargs)


def measure(kind: str, epochs: int, folder: Path) -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, (40 * BATCH, 32, 32, 3), dtype=np.uint8)
    loader = build_dataloader(ArrayDataset(dict(img=images, gt_label=np.arange(len(images))), OPERATIONS), BATCH, 1)
    plan = Plan(kind, num_iters=epochs * len(loader), epoch_length=len(loader), log_interval=NEVER)
    model = SlowModel()
    runner = make_runner(
        plan,
        model,
        NoopOptimizer(model.parameters(), lr=0.1),
        folder,
        logging.Logger("bench_data_wait", logging.WARNING),
        optimizer_config={"grad_clip": None},
        checkpoint_config={"interval": NEVER, "save_last": False},
    )
    source = Stamped(loader)
    runner.run([source], [("train", 1)])
    length = len(loader)
    iters = [after - before for before, after in pairwise(source.asked_ns)]
    waits = [given - asked for asked, given in zip(source.asked_ns, source.given_ns, strict=True)][: len(iters)]
    near = [ns for i, ns in enumerate(iters) if i >= length and (i % length in (0, length - 1))]
    warm = slice(length, None)
    return {
        "iter_ms": [ns / 1e6 for ns in iters[warm]],
        "wait_ms": [ns / 1e6 for ns in waits[warm]],
        "share": mean(waits[warm]) / mean(iters[warm]),
        "over_median_ms": [(ns - median(iters[warm])) / 1e6 for ns in near],
        "ready": mean(source.ready),
    }


class Stamped(StampedSource):
    """Lets the runner say that the next epoch may be made early, as it says to the loader itself."""

    @property
    def prefetch_over_epoch_end(self) -> bool:
        return bool(self._source.prefetch_over_epoch_end)

    @prefetch_over_epoch_end.setter
    def prefetch_over_epoch_end(self, allowed: bool) -> None:
        self._source.prefetch_over_epoch_end = allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    results, met = {}, True
    for kind in ("epoch", "iter"):
        with tempfile.TemporaryDirectory() as folder:
            found = results[kind] = measure(kind, arguments.epochs, Path(folder))
        ends = found["over_median_ms"]
        fits = found["share"] <= WAIT_BAR, max(ends) <= END_BAR_MS
        met = met and all(fits)
        print(
            f"{'met' if fits[0] else 'MISSED'}: {kind}: data wait {found['share']:.2%} of the iteration, at most "
            f"{WAIT_BAR:.0%}; median iteration {median(found['iter_ms']):.2f} ms, {found['ready']:.1f} batches ready\n"
            f"{'met' if fits[1] else 'MISSED'}: {kind}: near epoch ends at most {max(ends):.2f} ms over the median, "
            f"bar {END_BAR_MS:.0f}; median {median(ends):.2f}, {len(ends)} iterations; elsewhere at most "
            f"{max(found['iter_ms']) - median(found['iter_ms']):.2f}"
        )
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_data_wait.json"
        path.write_text(json.dumps(dict(machine=facts, met=met, results=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
