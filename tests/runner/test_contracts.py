"""What projects built on MMCV override, write and read, and what it must then do; with the plan and without."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import (
    CheckpointHook,
    ClosureHook,
    EMAHook,
    EpochBasedRunner,
    FusedSGD,
    Hook,
    IterBasedRunner,
    IterTimerHook,
    LogBuffer,
    OptimizerHook,
    StepLrUpdaterHook,
    TextLoggerHook,
)

KINDS = [EpochBasedRunner, IterBasedRunner]


@pytest.fixture(params=["on", "off"], autouse=True)
def plan(request, monkeypatch):
    monkeypatch.setenv("FASTRUNNER_PLAN", request.param)


def make(kind, length=2, work_dir="out"):
    torch.manual_seed(0)
    model = TinyModel()
    limit = dict(max_epochs=length) if issubclass(kind, EpochBasedRunner) else dict(max_iters=3 * length)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), work_dir=work_dir, **limit)
    by_epoch = issubclass(kind, EpochBasedRunner)
    runner.register_training_hooks(
        dict(policy="step", step=[1] if by_epoch else [3], by_epoch=by_epoch),
        dict(grad_clip=dict(max_norm=0.5)),
        dict(interval=1, by_epoch=by_epoch),
        dict(interval=1, hooks=[dict(type="TextLoggerHook", by_epoch=by_epoch)]),
    )
    return runner


def weights(runner):
    return [p.tolist() for p in runner.model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_iter_of_ones_own(kind):
    """BEVFormer and MapTR: history of frames is put into the batch."""
    seen = []

    class Video(kind):
        def run_iter(self, data_batch, train_mode, **kwargs):
            seen.append((train_mode, self.iter))
            outputs = self.model.train_step(data_batch * 2, self.optimizer, **kwargs)
            self.log_buffer.update(outputs["log_vars"], outputs["num_samples"])
            self.outputs = outputs

    runner = make(Video)
    runner.run([batches(3)], [("train", 1)])
    assert seen == [(True, i) for i in range(6)]
    plain = make(kind, work_dir="plain")
    plain.run([[2 * batch for batch in batches(3)]], [("train", 1)])
    assert weights(runner) == weights(plain)


def test_a_train_of_ones_own():
    """bevfusion: the data set hears of each epoch."""
    told = []

    class Fusion(EpochBasedRunner):
        def train(self, data_loader, **kwargs):
            told.append(self._epoch)
            super().train(data_loader, **kwargs)

    runner = make(Fusion)
    runner.run([batches(3)], [("train", 1)])
    plain = make(EpochBasedRunner, work_dir="plain")
    plain.run([batches(3)], [("train", 1)])
    assert told == [0, 1]
    assert weights(runner) == weights(plain)


def test_a_train_written_from_nothing():
    """As in MMCV's own tutorials: the loop by hand, with call_hook."""

    class ByHand(EpochBasedRunner):
        def train(self, data_loader, **kwargs):
            self.model.train()
            self.mode = "train"
            self.data_loader = data_loader
            self._max_iters = self._max_epochs * len(self.data_loader)
            self.call_hook("before_train_epoch")
            for i, data_batch in enumerate(self.data_loader):
                self.data_batch = data_batch
                self._inner_iter = i
                self.call_hook("before_train_iter")
                self.run_iter(data_batch, train_mode=True, **kwargs)
                self.call_hook("after_train_iter")
                del self.data_batch
                self._iter += 1
            self.call_hook("after_train_epoch")
            self._epoch += 1

    runner = make(ByHand)
    runner.run([batches(3)], [("train", 1)])
    plain = make(EpochBasedRunner, work_dir="plain")
    plain.run([batches(3)], [("train", 1)])
    assert weights(runner) == weights(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_counters_written_before_a_run_are_where_it_starts(kind):
    runner = make(kind, length=3)
    runner._epoch, runner._iter = 1, 3
    iterations = []
    runner.register_hook(ClosureHook("before_train_iter", lambda r: iterations.append(r.iter)))
    runner.run([batches(3)], [("train", 1)])
    assert iterations == [3, 4, 5, 6, 7, 8]
    assert runner.current_lr() == pytest.approx([0.01])


@pytest.mark.parametrize("kind", KINDS)
def test_counters_and_limits_written_by_a_hook(kind):
    class Skips(Hook):
        def after_train_iter(self, runner):
            if runner.iter == 2:
                runner._iter = 10

    runner = make(kind, length=2)
    runner.register_hook(Skips())
    seen = []
    runner.register_hook(ClosureHook("before_train_iter", lambda r: seen.append(r.iter)))
    runner.run([batches(3)], [("train", 1)])
    assert seen[:3] == [0, 1, 2]
    assert seen[3:] == ([11, 12, 13] if kind is EpochBasedRunner else [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_that_grows_in_the_run(kind):
    runner = make(kind, length=1)
    name = "_max_epochs" if kind is EpochBasedRunner else "_max_iters"
    runner.register_hook(
        ClosureHook("after_train_iter", lambda r: setattr(r, name, 2 if kind is EpochBasedRunner else 6))
    )
    runner.run([batches(3)], [("train", 1)])
    assert runner.iter == 6


def test_a_limit_that_shrinks_in_the_run():
    """Nothing but the user's hook acts for a while, so the loop has no other reason to look up."""
    runner = IterBasedRunner(model := TinyModel(), optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=20)
    runner.register_training_hooks(dict(policy="fixed", by_epoch=False), {}, None, None)
    runner.register_hook(ClosureHook("after_train_iter", lambda r: setattr(r, "_max_iters", 6)))
    runner.run([batches(3)], [("train", 1)])
    assert runner.iter == 6


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_and_optimizer_after_construction(kind):
    runner = make(kind)
    torch.manual_seed(7)
    runner.model = other = TinyModel()
    runner.optimizer = FusedSGD(other.parameters(), lr=0.1, momentum=0.9)
    before = [p.clone() for p in other.parameters()]
    runner.run([batches(3)], [("train", 1)])
    assert not any(map(torch.equal, before, other.parameters()))
    saved = torch.load("out/latest.pth")["state_dict"]
    assert torch.equal(saved["layer.weight"], other.layer.weight)


def test_the_name_of_the_log_is_the_timestamp():
    """Training scripts give the runner their own, so that .log and .log.json belong together."""
    runner = make(EpochBasedRunner)
    runner.timestamp = "20240102_030405"
    runner.run([batches(3)], [("train", 1)])
    (logger,) = (hook for hook in runner.hooks if isinstance(hook, TextLoggerHook))
    assert logger.json_log_path.endswith("out/20240102_030405.log.json")
    with open(logger.json_log_path) as file:
        assert len(file.readlines()) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_ahead_of_the_optimizer_may_change_the_loss(kind):
    def double(runner):
        runner.outputs["loss"] = runner.outputs["loss"] * 2

    runner = make(kind)
    runner.hooks[1].grad_clip = None
    runner.register_hook(ClosureHook("after_train_iter", double), "HIGH")
    runner.run([batches(3)], [("train", 1)])
    plain = make(kind, work_dir="plain")
    plain.hooks[1].grad_clip = None
    for group in plain.optimizer.param_groups:
        group["lr"] = 0.2  # twice the loss is twice the lr, without clipping
    plain.run([batches(3)], [("train", 1)])
    for p, q in zip(runner.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # 2 g lr and g 2 lr round differently, over six updates


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_read_the_batch_the_outputs_the_gradients_and_the_lr(kind):
    data, seen = batches(3), []

    class Reads(Hook):
        def after_train_iter(self, runner):
            grads = [p.grad for p in runner.model.parameters()]
            norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in grads]))
            same = any(runner.data_batch is batch for batch in data)
            seen.append((same, "loss" in runner.outputs, norm.item(), runner.optimizer.param_groups[0]["lr"]))

    runner = make(kind)
    runner.register_hook(Reads())
    runner.run([data], [("train", 1)])
    assert [row[:2] for row in seen] == [(True, True)] * 6
    assert all(norm <= 0.5 + 1e-6 for _, _, norm, _ in seen)  # clipped
    assert [lr for *_, lr in seen] == pytest.approx([0.1] * 3 + [0.01] * 3)
    assert all(type(lr) is float for *_, lr in seen)
    assert not hasattr(runner, "data_batch")


@pytest.mark.parametrize("kind", KINDS)
def test_what_hooks_put_into_the_log_is_logged(kind):
    class Writes(Hook):
        def after_train_iter(self, runner):
            runner.log_buffer.update(dict(mine=float(runner.iter)), 1)

    runner = make(kind)
    runner.register_hook(Writes())
    lines = []
    runner.logger = Mock(wraps=runner.logger)
    runner.logger.info = lines.append
    runner.run([batches(3)], [("train", 1)])
    assert sum("mine: 4.0000" in line for line in lines) == 1


def test_hooks_with_a_mock_of_a_runner():
    """MMCV's users test their hooks, and its hooks, so: nothing but the documented attributes may be used."""
    model = TinyModel()
    runner = Mock(model=model, optimizer=FusedSGD(model.parameters(), lr=0.1), iter=0, epoch=0, inner_iter=0)
    runner._iter, runner._epoch, runner._inner_iter = 0, 0, 0
    runner._max_iters, runner._max_epochs, runner.max_iters, runner.max_epochs = 4, 2, 4, 2
    runner.rank, runner.world_size, runner.meta, runner.log_buffer = 0, 1, {}, LogBuffer()
    runner.data_loader, runner.resumed_buffers, runner.hooks, runner._hooks = [1, 2], {}, [], []
    runner.outputs = model.train_step(batches()[0])
    hooks = [OptimizerHook(dict(max_norm=1.0)), EMAHook(), IterTimerHook(), StepLrUpdaterHook(step=[1])]
    for hook in hooks:
        for stage in Hook.stages:
            getattr(hook, stage)(runner)
            runner.outputs = model.train_step(batches()[0])
    checkpoint = CheckpointHook(interval=1)
    runner.work_dir, runner.stop_reason, runner.finished_iters = "work/name", None, 1
    checkpoint.before_run(runner)
    checkpoint.after_train_epoch(runner)
    runner.save_checkpoint.assert_called_once()


def test_plain_namespaces_are_runners_enough_for_the_helpers():
    runner = SimpleNamespace(epoch=1, iter=5, inner_iter=2, _max_epochs=2, _max_iters=6, data_loader=[0] * 3)
    hook = Hook()
    assert hook.every_n_epochs(runner, 2)
    assert hook.every_n_iters(runner, 3)
    assert hook.every_n_inner_iters(runner, 3)
    assert hook.end_of_epoch(runner)
    assert hook.is_last_epoch(runner)
    assert hook.is_last_iter(runner)
    assert not any(hook.every_n_iters(runner, n) for n in (0, -1, 4))
