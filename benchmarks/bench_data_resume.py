"""How long does the first batch take after a resume deep inside a huge data set?

100,000,000 samples (rows of 8 bytes; they share their memory, the index does not), batches of 64, shuffled. A fresh
start: a new loader's first batch. A resume: a new loader that loads the state of position 1,000,000 and gives a batch.
Bars: at most 50 ms more than a fresh start; no sample is loaded that is not in a batch that came out or lies ready.
Floor: the fresh start.
Gate: tests/data must be green first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastrunner import ArrayDataset, IterLoader, build_dataloader
from fastrunner.bench import machine
from fastrunner.bench.measure import interleaved

RECORDS = Path(__file__).resolve().parent / "records"
SAMPLES, BATCH, POSITION = 100_000_000, 64, 1_000_000
BAR_MS = 50.0


class Counting(Dataset[int]):
    """Counts what is asked for."""

    made = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        Counting.made += 1
        return index


def first_batch(make: Callable[[], Any], state: dict[str, Any] | None) -> float:
    """Seconds until the first batch is there; the data set is open already."""
    begin = time.perf_counter()
    loader = IterLoader(make())
    if state is not None:
        loader.load_state_dict(state)
    next(loader)
    seconds = time.perf_counter() - begin
    loader.close()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")

    arrays = ArrayDataset(dict(x=np.broadcast_to(np.zeros((1, 8), np.uint8), (SAMPLES, 8))))
    loaders: dict[str, Callable[[], Any]] = {
        "arrays, 2 threads": lambda: build_dataloader(arrays, BATCH, 2, seed=0),
        "DataLoader, 0 workers": lambda: build_dataloader(Counting(), BATCH, 0, seed=0),
        "DataLoader, 2 workers": lambda: build_dataloader(Counting(), BATCH, 2, seed=0),
    }
    results: dict[str, Any] = {}
    met = True
    for name, make in loaders.items():
        state = make().state_at(0, POSITION)
        cases = {"fresh": lambda m=make: first_batch(m, None), "resumed": lambda m=make, s=state: first_batch(m, s)}
        samples = interleaved(cases, arguments.rounds)
        fresh, resumed = (median(samples[case]) * 1e3 for case in ("fresh", "resumed"))
        fits = resumed - fresh <= BAR_MS
        met, results[name] = met and fits, samples
        print(f"{'met' if fits else 'MISSED'}: {name}: first batch {fresh:.2f} ms fresh, {resumed:.2f} ms resumed")
    Counting.made = 0
    first_batch(loaders["DataLoader, 0 workers"], state)
    extra = Counting.made - BATCH
    met = met and extra == 0
    print(f"{'met' if extra == 0 else 'MISSED'}: {extra} samples loaded besides the batch that came out, at most 0")
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_data_resume.json"
        path.write_text(json.dumps(dict(machine=facts, met=met, extra=extra, samples_s=results), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
