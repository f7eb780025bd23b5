"""EmptyCacheHook, SyncBuffersHook, ClosureHook: when they act, and that they are not called when they do not."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import ClosureHook, EmptyCacheHook, EpochBasedRunner, IterBasedRunner, SyncBuffersHook
from fastrunner.hooks import empty_cache, sync_buffers


@pytest.mark.parametrize(
    ("switches", "epoch", "iter"),
    [
        ({}, 4, 1),  # after 2 train epochs and 2 val epochs; once after the iteration runner's loop
        (dict(before_epoch=True, after_epoch=False), 4, 1),
        (dict(after_epoch=False, after_iter=True), 2 * 3 + 2 * 2, 6 + 2),  # 3 train and 2 val batches; 3 + 1 twice
        (dict(after_epoch=False), 0, 0),
    ],
)
def test_empty_cache(switches, epoch, iter, monkeypatch):
    emptied = Mock()
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    runner = EpochBasedRunner(TinyModel(), max_epochs=2)
    runner.register_custom_hooks(dict(type="EmptyCacheHook", **switches))
    runner.run([batches(3), batches(2)], [("train", 1), ("val", 1)])
    assert emptied.call_count == epoch
    emptied.reset_mock()
    runner = IterBasedRunner(TinyModel(), max_iters=6)
    runner.register_hook(EmptyCacheHook(**switches))
    runner.run([batches(3), batches(2)], [("train", 3), ("val", 1)])
    assert emptied.call_count == iter


def test_an_idle_empty_cache_hook_is_not_called(monkeypatch):
    called = Mock()
    monkeypatch.setattr(empty_cache.EmptyCacheHook, "after_iter", lambda self, runner: called())
    runner = IterBasedRunner(TinyModel(), max_iters=6)
    runner.register_hook(EmptyCacheHook())
    runner.run([batches(3)], [("train", 1)])
    assert called.call_count == 0


@pytest.mark.parametrize(("distributed", "epoch", "iter"), [(True, 4, 1), (False, 0, 0)])
def test_sync_buffers(distributed, epoch, iter, monkeypatch):
    averaged = Mock()
    monkeypatch.setattr(sync_buffers, "allreduce_params", averaged)
    runner = EpochBasedRunner(TinyModel(), max_epochs=2)
    runner.register_hook(SyncBuffersHook(distributed))
    runner.run([batches(3), batches(2)], [("train", 1), ("val", 1)])
    assert averaged.call_count == epoch
    averaged.reset_mock()
    runner = IterBasedRunner(TinyModel(), max_iters=6)
    runner.register_hook(SyncBuffersHook(distributed))
    runner.run([batches(3)], [("train", 1)])
    assert averaged.call_count == iter


def test_closures_are_called_with_the_runner_at_their_stage():
    seen = []
    runner = EpochBasedRunner(TinyModel(), max_epochs=1)
    for stage in ("before_run", "before_epoch", "after_train_iter", "after_iter", "after_run"):
        runner.register_hook(ClosureHook(stage, lambda r, stage=stage: seen.append((stage, r.iter))))
    runner.run([batches(1), batches(1)], [("train", 1), ("val", 1)])
    assert seen == [
        ("before_run", 0), ("before_epoch", 0), ("after_train_iter", 0), ("after_iter", 0),
        ("before_epoch", 1), ("after_iter", 1), ("after_run", 1),
    ]  # fmt: skip


def test_a_closure_that_cannot_be():
    with pytest.raises(ValueError, match="'after_lunch' is not a stage of a hook; stages: before_run"):
        ClosureHook("after_lunch", print)
    with pytest.raises(TypeError, match="fn must be callable, got int"):
        ClosureHook("after_run", 3)
