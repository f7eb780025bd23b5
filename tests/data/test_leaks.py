"""Nothing stays behind: memory over epochs, threads and processes after a run, however it ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch
from runner.helpers import TinyModel
from torch.utils.data import TensorDataset

from fastrunner import (
    ArrayDataset,
    ClosureHook,
    EpochBasedRunner,
    IterBasedRunner,
    IterLoader,
    build_dataloader,
)

KINDS = [EpochBasedRunner, IterBasedRunner]


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def own_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastrunner-ring")]


def arrays(workers, n=64):
    return build_dataloader(ArrayDataset(dict(x=np.random.rand(n, 2).astype(np.float32))), 4, workers, seed=1)


def torchs(workers):
    return build_dataloader(TensorDataset(torch.rand(64, 2)), 4, workers, seed=1)


class Model(TinyModel):
    def train_step(self, data_batch, optimizer=None, **kwargs):
        return super().train_step(data_batch["x"] if isinstance(data_batch, dict) else data_batch[0])


@pytest.mark.parametrize("early", [False, True])
def test_memory_is_steady_over_100_epochs(early):
    dataset = ArrayDataset(dict(x=np.zeros((64, 4096), np.float32)))  # 256 kB a batch: a leak would be 100 MB
    loader = build_dataloader(dataset, 16, 2, seed=1)
    loader.prefetch_over_epoch_end = early
    endless = IterLoader(loader)
    sizes = []
    for epoch in range(100):
        for _ in range(len(loader)):
            next(endless)
        if epoch % 10 == 9:
            gc.collect()
            sizes.append(resident_bytes())
            assert len(own_threads()) <= 2
    endless.close()
    assert sizes[-1] - sizes[0] < 8 * 2**20  # two rings' worth: the allocator may keep some


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [arrays, torchs])
@pytest.mark.parametrize("ends", ["by itself", "stopped", "broken"])
def test_threads_and_processes_are_gone_after_a_run(kind, make, ends):
    def act(runner):
        assert own_threads() or multiprocessing.active_children()
        if runner.iter == 20 and ends == "broken":
            raise OSError("as if")
        if runner.iter == 20 and ends == "stopped":
            runner.stop("enough")

    length = dict(max_epochs=2) if kind is EpochBasedRunner else dict(max_iters=25)
    model = Model()
    runner = kind(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), work_dir="out", **length)
    runner.register_hook(ClosureHook("before_train_iter", act))
    loader = make(2)
    if ends == "broken":
        with pytest.raises(OSError, match="as if"):
            runner.run([loader], [("train", 1)])
    else:
        runner.run([loader], [("train", 1)])
    assert own_threads() == []
    assert multiprocessing.active_children() == []
    assert len(list(loader)) == 16  # and it works again
    loader.close()


def test_the_log_says_how_many_batches_lie_ready(caplog):
    model = Model()
    runner = EpochBasedRunner(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), work_dir="out", max_epochs=1
    )
    runner.register_training_hooks(
        dict(policy="fixed"), {}, None, dict(interval=8, hooks=[dict(type="TextLoggerHook", by_epoch=True)])
    )
    with caplog.at_level("INFO"):
        runner.run([arrays(1)], [("train", 1)])
    assert "data_ready: " in caplog.text
