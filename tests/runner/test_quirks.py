"""MMCV's quirks, each kept or mended by decision (docs/mmcv-differences.md); those that no other test holds.

Elsewhere: events and counters (test_golden_events), checkpoints and max_keep_ckpts (test_golden_checkpoints,
hooks/test_folders), labels and shared ``ready`` of loggers, ETA (test_golden_logs), evaluation (hooks/test_evaluation),
policies (test_golden_policies), accumulation and fp16 (hooks/test_optimizer_*), averages (hooks/test_ema), endings
(test_endings), registry, config, checkpoint library (their own tests).
"""

from __future__ import annotations

import time
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

from fastrunner import (
    CheckpointHook,
    ClosureHook,
    DistSamplerSeedHook,
    EpochBasedRunner,
    EvalHook,
    Fp16OptimizerHook,
    FusedSGD,
    Hook,
    IterBasedRunner,
    IterTimerHook,
    LoggerHook,
    SyncBuffersHook,
    TextLoggerHook,
    dist,
)

KINDS = [EpochBasedRunner, IterBasedRunner]


def make(kind, length=2, work_dir="out", model=None, **kwargs):
    model = model or TinyModel()
    limit = dict(max_epochs=length) if kind is EpochBasedRunner else dict(max_iters=3 * length)
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    return kind(model, optimizer=optimizer, work_dir=work_dir, **limit, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_sleeps(kind, monkeypatch):
    slept = Mock()
    monkeypatch.setattr(time, "sleep", slept)
    runner = make(kind)
    runner.register_optimizer_hook({})
    runner.run([batches(2), batches(1)], [("train", 1), ("val", 1)])
    assert not slept.called


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_given_to_run_by_position_is_deprecated_and_counts(kind):
    runner = make(kind, length=1)
    with pytest.warns(DeprecationWarning, match="in run is deprecated"):
        runner.run([batches(3)], [("train", 1)], 2)
    assert runner.iter == (6 if kind is EpochBasedRunner else 2)


def test_the_loader_is_there_when_the_iteration_runner_begins():
    seen = []

    class Looks(Hook):
        def before_epoch(self, runner):
            seen.append(len(runner.data_loader))

    runner = make(IterBasedRunner)
    runner.register_hook(Looks())
    runner.run([batches(1), batches(4)], [("val", 1), ("train", 1)])
    assert seen == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_seeds_are_told_in_both_runners(kind):
    class Sampled(list):
        pass

    loader = Sampled(batches(3))
    loader.sampler = Mock()
    runner = make(kind)
    runner.register_hook(DistSamplerSeedHook())
    runner.run([loader], [("train", 1)])
    told = [call.args[0] for call in loader.sampler.set_epoch.call_args_list]
    assert told[-1] == 1
    assert set(told) == ({0, 1} if kind is EpochBasedRunner else {1})  # a sampler starts in epoch 0


def test_histories_do_not_grow_with_the_iteration_runner():
    runner = make(IterBasedRunner, length=2000)
    runner.register_hook(ClosureHook("after_train_iter", lambda r: r.log_buffer.update(dict(x=1.0))))
    runner.run([batches(3)], [("train", 1)])
    assert runner.iter == 6000
    assert len(runner.log_buffer.val_history["x"]) < 4000  # at least 1,000, and what waits to be looked at


@pytest.mark.parametrize(
    ("value", "scalar"),
    [
        (1, True), (1.5, True), (np.float32(2), True), (np.array(1.0), True), (torch.tensor(1.0), True),
        (torch.ones(1), True), (torch.ones(2), False), (np.ones(1), False), ("1", False),
    ],
)  # fmt: skip
def test_scalars(value, scalar):
    assert LoggerHook.is_scalar(value) is scalar


def test_files_know_the_checkpoint_before_them_and_the_runner_the_newest():
    """Kept: ``last_ckpt`` is written after the file, so that each file names the one before."""
    runner = make(EpochBasedRunner, meta=dict(seed=1))
    runner.register_hook(CheckpointHook(interval=1))
    runner.run([batches(3)], [("train", 1)])
    assert "hook_msgs" not in torch.load("out/epoch_1.pth")["meta"]
    assert torch.load("out/epoch_2.pth")["meta"]["hook_msgs"]["last_ckpt"].endswith("epoch_1.pth")
    assert runner.meta["hook_msgs"]["last_ckpt"].endswith("epoch_2.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_resume_meta_is_the_checkpoints(kind):
    """Kept: hooks go on writing where the interrupted run wrote."""
    make_name = dict(meta=dict(exp_name="first", seed=3))
    runner = make(kind, **make_name)
    runner.save_checkpoint("saved")
    again = make(kind, meta=dict(exp_name="second"))
    again.resume("saved/latest.pth")
    assert again.meta["exp_name"] == "first"
    assert again.meta["seed"] == 3
    assert again.meta["hook_msgs"] == {}


def test_only_a_leading_module_is_taken_off_names():
    """mmcv's default pattern has a bare dot: ``modulex...`` loses its first seven letters."""
    model = nn.Module()
    model.module_list = nn.ModuleList([nn.Linear(1, 1)])
    model.train_step = lambda *args, **kwargs: None
    runner = EpochBasedRunner(model, max_epochs=1)
    weights = {f"module.{name}": torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    torch.save(dict(state_dict=weights), "wrapped.pth")
    runner.load_checkpoint("wrapped.pth", strict=True)
    torch.save(dict(state_dict=model.state_dict()), "plain.pth")
    runner.load_checkpoint("plain.pth", strict=True)
    assert all((p == 7).all() for p in model.parameters())


def test_a_train_log_without_a_timer_is_called_val():
    """Kept: "train" means that ``time`` is there."""
    runner = make(EpochBasedRunner, length=1)
    runner.register_logger_hooks(dict(interval=1, hooks=[dict(type="TextLoggerHook")]))
    modes = []
    logger = runner.hooks[0]
    runner.register_hook(
        ClosureHook("after_train_iter", lambda r: (r.log_buffer.average(1), modes.append(logger.get_mode(r))))
    )
    runner.run([batches(2)], [("train", 1)])
    assert modes == ["val", "val"]


def test_the_last_logger_clears_on_every_rank(monkeypatch):
    """mmcv sets reset_flag in a method that runs on rank 0 alone."""
    runner = make(EpochBasedRunner, length=1)
    runner._rank = 1
    first, second = TextLoggerHook(interval=1), TextLoggerHook(interval=1)
    for hook in (IterTimerHook(), first, second):
        runner.register_hook(hook, "VERY_LOW")
    runner.run([batches(2)], [("train", 1)])
    assert (first.reset_flag, second.reset_flag) == (False, True)
    assert not runner.log_buffer.output


def test_counters_of_batch_norm_do_not_stop_the_averages(monkeypatch):
    """On today's torch mmcv divides them in place: an error with several ranks."""
    monkeypatch.setattr(dist, "get_dist_info", lambda: (0, 2))
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sent.append(tensor.mul_(2).clone()))
    model = TinyModel()
    model.norm = nn.BatchNorm1d(2)
    model.norm.num_batches_tracked.fill_(7)
    runner = make(EpochBasedRunner, length=1, model=model)
    runner.register_hook(SyncBuffersHook())
    runner.run([batches(1)], [("train", 1)])
    assert [tensor.tolist() for tensor in sent] == [[0.0, 0.0, 1.0, 1.0]]  # means and variances, each halved and summed
    assert model.norm.num_batches_tracked == 7


def test_nothing_of_ours_is_deprecated_in_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        runner = make(IterBasedRunner)
        runner.register_optimizer_hook(Fp16OptimizerHook())
        runner.model.fp16_enabled = False
        runner.register_hook(CheckpointHook(interval=1, by_epoch=False))
        runner.run([batches(3)], [("train", 1)])


def test_best_scores_of_numpy_can_be_read_back():
    """mmcv's own files with numpy numbers in meta fail on today's torch."""
    runner = make(EpochBasedRunner, meta=dict(hook_msgs=dict(best_score=np.float64(0.5), seen=np.arange(2))))
    runner.save_checkpoint("out")
    again = make(EpochBasedRunner)
    again.resume("out/latest.pth")
    assert again.meta["hook_msgs"] == dict(best_score=0.5, seen=[0, 1])


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (CheckpointHook(interval=1), "CheckpointHook has by_epoch=True .* it will save nothing. Say by_epoch=False"),
        (EvalHook([0], evaluate=len), "EvalHook has by_epoch=True .* it will evaluate nothing. Say by_epoch=False"),
    ],
)
def test_hooks_that_wait_for_epochs_which_never_come_say_so(hook, says):
    """In mmcv they do nothing, silently; by_epoch=True is the default."""
    runner = make(IterBasedRunner)
    runner.register_hook(hook)
    with pytest.warns(UserWarning, match=says):
        runner.run([batches(3)], [("train", 1)])
