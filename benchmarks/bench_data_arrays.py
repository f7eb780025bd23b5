"""How fast do arrays come out, cropped, flipped and normalised?

32 x 32 x 3 bytes in memory -> random crop with padding 4, mirroring, (v - mean) / std -> float32, channels first, in
batches of 256. Peer: torch's DataLoader with 2 workers over a data set that does the same in numpy, sample by sample.
Floor: ``memcpy`` of the bytes that come out, from one batch's memory to another's.
Bars: at least 15 times the peer, at least 30 % of memcpy.
Gate: tests/data/test_arrays.py must be green first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastrunner import ArrayDataset, IterLoader, build_dataloader
from fastrunner.bench import machine
from fastrunner.bench.measure import interleaved

RECORDS = Path(__file__).resolve().parent / "records"
BATCH, MEAN, STD = 256, [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
PEER_BAR, MEMCPY_BAR = 15.0, 0.30
OPERATIONS = [
    dict(type="RandomCrop", size=32, padding=4),
    dict(type="RandomFlip"),
    dict(type="Normalize", mean=MEAN, std=STD),
    dict(type="Layout", order="CHW"),
]


class Peer(Dataset[tuple[torch.Tensor, int]]):
    """The same, a sample at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.mean, self.scale = np.float32(MEAN), 1 / np.float32(STD)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left, flip = torch.randint(0, 9, (3,)).tolist()
        image = np.pad(self.images[index], ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
        image = image[:, ::-1] if flip < 4.5 else image
        image = (image.astype(np.float32) - self.mean) * self.scale
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), index


def seconds_a_batch(batches: Iterator[Any], count: int) -> float:
    """Of batches that are used by nobody; a step would take part of the cores."""
    for _ in islice(batches, count // 4):
        pass
    begin = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return (time.perf_counter() - begin) / count


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def copier() -> Any:
    memory = [np.zeros((BATCH, 3, 32, 32), np.float32) for _ in range(6)]  # as many as slots: beyond a core's cache

    def copy() -> float:
        begin = time.perf_counter()
        for i in range(60):
            np.copyto(memory[i % 6], memory[(i + 3) % 6])
        return (time.perf_counter() - begin) / 60

    return copy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="in the record's name (default: today)")
    arguments = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")

    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    dataset = ArrayDataset(dict(img=images, gt_label=np.arange(len(images))), OPERATIONS)
    loader = build_dataloader(dataset, BATCH, arguments.threads, drop_last=True)
    loader.prefetch_over_epoch_end = True
    ours = IterLoader(loader)
    peer = DataLoader(Peer(images), BATCH, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)

    def ours_alone() -> float:
        seconds = seconds_a_batch(ours, 300)
        ours.close()  # its threads would work on while others are timed
        return seconds

    cases = {
        "arrays": ours_alone,
        "DataLoader(2 workers)": lambda: seconds_a_batch(endless(peer), 12),
        "memcpy": copier(),
    }
    samples = interleaved(cases, arguments.rounds)
    for name, values in samples.items():
        print(
            f"{name:22} median {median(values) * 1e6:7.0f} us a batch, min {min(values) * 1e6:7.0f}, max "
            f"{max(values) * 1e6:7.0f}: {BATCH / median(values):9,.0f} images/s"
        )
    middle = {name: median(values) for name, values in samples.items()}
    times, share = middle["DataLoader(2 workers)"] / middle["arrays"], middle["memcpy"] / middle["arrays"]
    met = times >= PEER_BAR and share >= MEMCPY_BAR
    print(f"{'met' if times >= PEER_BAR else 'MISSED'}: {times:.1f} times the DataLoader, at least {PEER_BAR:.0f}")
    print(f"{'met' if share >= MEMCPY_BAR else 'MISSED'}: {share:.0%} of memcpy, at least {MEMCPY_BAR:.0%}")
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{arguments.date}_data_arrays.json"
        path.write_text(
            json.dumps(dict(machine=facts, times=times, share=share, met=met, samples_s=samples), indent=1) + "\n"
        )
        print(f"recorded in {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
