"""Runs for test_exact_resume: small, with dropout, momentum and random augmentation, on every kind of loader.

As a script: ``python resume_runs.py KIND BACKEND WORKERS WORK_DIR FOLDER`` trains and is killed by SIGKILL on the way.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastrunner import (
    ArrayDataset,
    CheckpointHook,
    ClosureHook,
    EMAHook,
    EpochBasedRunner,
    FusedSGD,
    IterBasedRunner,
    build_dataloader,
)

KINDS = {"epoch": EpochBasedRunner, "iter": IterBasedRunner}
N, BATCH, EPOCHS = 23, 4, 3
LENGTH = -(-N // BATCH)  # batches an epoch, the last of them smaller
BREAK, SAVED = 10, 8  # the run breaks in that iteration; the newest checkpoint was written after so many
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)
AUGMENT = [
    dict(type="RandomCrop", size=16, padding=2),
    dict(type="RandomFlip"),
    dict(type="Cutout", size=4),
    dict(type="Normalize", mean=128, std=64),
    dict(type="Layout", order="CHW"),
]


class Noisy(Dataset):
    """Images with noise from each of the global generators."""

    def __init__(self, noise: bool = True) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict:
        image = torch.from_numpy(IMAGES[i]).permute(2, 0, 1) / 64.0 - 2
        if self.noise:
            image = image * random.random() + np.random.rand() + 0.1 * torch.randn(3, 1, 1)
        return dict(img=image, gt_label=i)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)

    def train_step(self, data_batch, optimizer=None, **kwargs):
        x = nn.functional.dropout(data_batch["img"].float().mean(dim=(1, 2)) / 16, 0.5)
        loss = self.layer(x).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(x))


def make_loader(backend: str, workers: int, folder: str):
    if backend == "arrays":
        dataset = ArrayDataset(dict(img=IMAGES, gt_label=np.arange(N)), AUGMENT)
    elif backend == "dali":
        files = sorted(Path(folder).glob("*.jpg"), key=lambda path: int(path.stem.lstrip("x")))
        entries = [(str(path), number) for number, path in enumerate(files)]
        dataset = dict(type="ImageList", entries=entries, pipeline=dict(type="ClassificationTrain", size=16))
    elif backend == "foreign":
        # Its workers' random numbers are torch's affair, see docs: noise only where there are none.
        return DataLoader(Noisy(noise=workers == 0), BATCH, shuffle=True, num_workers=workers)
    else:
        dataset = Noisy()
    options = dict(persistent_workers=True) if backend == "torch persistent" else {}
    return build_dataloader(dataset, BATCH, workers, seed=7, **options)


def train(kind: str, loader, work_dir: str, *, at_break=None, resume: str | None = None, early: bool = False):
    """Train; returns [(iteration, sample ids, loss)] and the weights with the averages and momenta.

    Args:
        at_break: called with the runner in the iteration ``BREAK``.
        early: let the next epoch's batches be made before this one is used up.
    """
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    model = Model()
    if resume is not None:
        torch.manual_seed(99)
    length = dict(max_epochs=EPOCHS) if kind == "epoch" else dict(max_iters=EPOCHS * LENGTH)
    runner = KINDS[kind](
        model, optimizer=FusedSGD(model.parameters(), lr=0.05, momentum=0.9), work_dir=work_dir, **length
    )
    runner.register_optimizer_hook(dict(grad_clip=dict(max_norm=1.0)))
    runner.register_hook(EMAHook(momentum=0.1))
    runner.register_hook(CheckpointHook(interval=4, by_epoch=False))
    trace = []

    def note(runner):
        trace.append((runner.iter, runner.data_batch["gt_label"].tolist(), runner.outputs["loss"].item()))
        if at_break is not None and runner.iter == BREAK:
            at_break(runner)

    runner.register_hook(ClosureHook("after_train_iter", note), priority="LOWEST")
    if hasattr(loader, "prefetch_over_epoch_end"):
        loader.prefetch_over_epoch_end = early
    if resume is not None:
        runner.resume(resume)
    runner.run([loader], [("train", 1)])
    momenta = [runner.optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return trace, {**model.state_dict(), **{f"momentum.{i}": m for i, m in enumerate(momenta)}}


def kill(runner) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    kind, backend, workers, work_dir, folder = sys.argv[1:]
    torch.set_num_threads(1)
    train(kind, make_loader(backend, int(workers), folder), work_dir, at_break=kill)
