"""Resuming, where it has gone wrong before: each test is a defect that was found and mended."""

from __future__ import annotations

import enum
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastrunner import (
    CheckpointHook,
    ClosureHook,
    EMAHook,
    EpochBasedRunner,
    FusedSGD,
    Hook,
    IterBasedRunner,
    build_dataloader,
)

KINDS = [EpochBasedRunner, IterBasedRunner]


class Points(Dataset):
    def __init__(self):
        self.x = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Dropout(TinyModel):
    def train_step(self, data_batch, optimizer=None, **kwargs):
        return super().train_step(nn.functional.dropout(data_batch, 0.5, training=self.training))

    def val_step(self, data_batch, optimizer=None, **kwargs):
        return super().train_step(data_batch)


def make(kind, work_dir="out", model=None, epochs=3, hooks=(), checkpoint=None, epoch_length=6):
    torch.manual_seed(0)
    model = model or Dropout()
    length = dict(max_epochs=epochs) if kind is EpochBasedRunner else dict(max_iters=epochs * epoch_length)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), work_dir=work_dir, **length)
    runner.register_optimizer_hook({})
    for hook in (*hooks, CheckpointHook(**(checkpoint or dict(interval=4, by_epoch=False)))):
        runner.register_hook(hook)
    return runner


def weights(runner):
    return [p.tolist() for p in runner.model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make_loader", [lambda: build_dataloader(Points(), 2, 0, seed=3), lambda: batches(6)])
def test_dropout_draws_the_same_after_a_resume_in_the_middle_of_an_epoch(kind, make_loader):
    whole = make(kind, "whole")
    whole.run([make_loader()], [("train", 1)])
    resumed = make(kind, "resumed")
    torch.manual_seed(99)
    resumed.resume("whole/iter_8.pth")
    resumed.run([make_loader()], [("train", 1)])
    assert weights(resumed) == weights(whole)


def test_starting_a_foreign_loader_in_the_middle_leaves_the_generator_alone():
    from fastrunner.data.loader import start_epoch

    state = torch.get_rng_state()
    next(start_epoch(DataLoader(Points(), batch_size=2, shuffle=True), 0, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_model_may_be_resumed_again_with_its_averages():
    def go(model, epochs, resume=None):
        hook = EMAHook(momentum=0.1, warm_up=1)
        runner = make(EpochBasedRunner, model=model, epochs=epochs, hooks=[hook], checkpoint=dict(interval=1))
        if resume:
            runner.resume(resume)
        runner.run([batches(6)], [("train", 1)])
        return weights(runner)

    def model():
        torch.manual_seed(7)
        return TinyModel()

    whole = go(model(), 4)
    used = model()
    go(used, 2)
    assert go(used, 4, "out/epoch_2.pth") == whole


class Mode(str, enum.Enum):
    A = "a"


class Stateful(Hook):
    def __init__(self):
        self.loaded = None

    def state_dict(self):
        return {"best": np.float64(0.5)}

    def load_state_dict(self, state):
        self.loaded = state


def test_what_is_saved_can_be_read():
    hook = Stateful()
    runner = make(IterBasedRunner, hooks=[hook], epochs=1)
    runner.meta = {"version": torch.__version__, "mode": Mode.A, "flag": True}
    runner.register_hook(
        ClosureHook("before_train_iter", lambda r: r.optimizer.param_groups[0].update(lr=np.float64(0.1)))
    )
    runner.run([build_dataloader(Points(), 2, 0, seed=np.int64(3))], [("train", 1)])
    hook = Stateful()
    again = make(IterBasedRunner, hooks=[hook], epochs=1)
    again.resume("out/latest.pth")
    assert again.meta["mode"] == "a"
    assert again.meta["flag"] is True
    assert type(again.optimizer.param_groups[0]["lr"]) is float
    assert hook.loaded == {"best": 0.5}


def test_an_error_is_not_hidden_by_a_close_that_raises(caplog):
    class Closes(Hook):
        closed = 0

        def close(self):
            Closes.closed += 1
            raise OSError("disk full")

    runner = make(IterBasedRunner, hooks=[Closes(), Closes()])
    runner.register_hook(ClosureHook("before_train_iter", lambda r: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        runner.run([batches()], [("train", 1)])
    assert Closes.closed == 2
    assert "division by zero" in caplog.text
    fine = make(IterBasedRunner, hooks=[Closes()])
    with pytest.raises(OSError, match=r"Closes\.close raised OSError: disk full"):
        fine.run([batches()], [("train", 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_before_the_first_iteration_of_a_resumed_run(kind):
    whole = make(kind, "whole")
    whole.run([batches(6)], [("train", 1)])
    for stage in ("before_run", "before_train_epoch" if kind is EpochBasedRunner else "before_epoch"):
        stopped = make(kind, f"stopped_{stage}")
        stopped.resume("whole/iter_8.pth")
        stopped.register_hook(ClosureHook("before_run", lambda r: r.stop("now")))
        stopped.run([batches(6)], [("train", 1)])
        assert stopped.iter == 8
        again = make(kind, "again")
        again.resume(f"stopped_{stage}/latest.pth")
        again.run([batches(6)], [("train", 1)])
        assert (again.epoch, again.iter) == (whole.epoch, whole.iter)
        assert weights(again) == weights(whole)


def val_epochs(runner):
    seen = []
    runner.register_hook(ClosureHook("after_val_epoch", lambda r: seen.append(r.epoch)))
    return seen


def test_a_val_pass_that_was_stopped_is_done_again():
    first = make(EpochBasedRunner, checkpoint=dict(interval=5), epochs=2)
    first.register_hook(ClosureHook("after_val_iter", lambda r: r.stop("now")))
    first.run([batches(6), batches(3)], [("train", 1), ("val", 1)])
    second = make(EpochBasedRunner, checkpoint=dict(interval=5), epochs=2)
    seen = val_epochs(second)
    second.resume("out/latest.pth")
    second.run([batches(6), batches(3)], [("train", 1), ("val", 1)])
    assert seen == [1, 2]


def test_the_val_pass_after_the_last_epoch_is_not_lost():
    first = make(EpochBasedRunner, checkpoint=dict(interval=1), epochs=1)
    first.register_hook(ClosureHook("before_val_epoch", lambda r: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        first.run([batches(6), batches(3)], [("train", 1), ("val", 1)])
    second = make(EpochBasedRunner, checkpoint=dict(interval=1), epochs=1)
    seen = val_epochs(second)
    second.resume("out/epoch_1.pth")
    second.run([batches(6), batches(3)], [("train", 1), ("val", 1)])
    assert seen == [1]
    assert second.iter == 6


def test_hooks_put_into_the_list_are_called():
    calls = []

    class Late(Hook):
        def after_train_iter(self, runner):
            calls.append(runner.iter)

    def put(runner):
        if runner.epoch == 0:
            runner._hooks.append(Late())

    runner = EpochBasedRunner(TinyModel(), max_epochs=2)
    runner.register_hook(ClosureHook("before_train_epoch", put))
    runner.run([batches(4)], [("train", 1)])
    assert calls == list(range(8))


def test_extra_state_of_any_kind_is_saved():
    class Extra(TinyModel):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            self.extra = state

    make(IterBasedRunner, model=Extra(), epochs=1).run([batches(6)], [("train", 1)])
    again = make(IterBasedRunner, model=Extra(), epochs=1)
    again.resume("out/latest.pth")
    assert again.model.extra == {"a": 1}


def test_no_worker_outlives_a_run():
    before = multiprocessing.active_children()
    runner = make(IterBasedRunner, epochs=1)
    runner.run([build_dataloader(Points(), 2, 1, seed=3)], [("train", 1)])
    assert multiprocessing.active_children() == before
    assert runner.data_loader.position == 6


def test_a_second_run_saves_into_the_same_folder():
    runner = make(IterBasedRunner, checkpoint=dict(interval=6, by_epoch=False, out_dir="elsewhere"), epochs=1)
    runner.run([batches(6)], [("train", 1)])
    runner._max_iters = 12
    runner.run([batches(6)], [("train", 1)])
    assert sorted(os.listdir("elsewhere/out")) == ["iter_12.pth", "iter_6.pth", "latest.pth"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_hook_saves_before_the_run_is_its_beginning(kind):
    whole = make(kind, hooks=[save_before_run("first")])
    whole.run([batches(6)], [("train", 1)])
    again = make(kind)
    again.resume("first/first.pth")
    again.run([batches(6)], [("train", 1)])
    assert again.iter == whole.iter == 18
    assert weights(again) == weights(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_hook_saves_before_a_resumed_run_is_where_that_begins(kind):
    def loader():
        return build_dataloader(Points(), 2, 0, seed=3)

    first = make(kind, "first")
    first.register_hook(ClosureHook("after_train_iter", lambda r: r.stop("now") if r.iter == 4 else None))
    first.run([loader()], [("train", 1)])
    second = make(kind, "second", hooks=[save_before_run("second")])
    second.resume("first/latest.pth")
    second.run([loader()], [("train", 1)])
    third = make(kind, "third")
    third.resume("second/first.pth")
    third.run([loader()], [("train", 1)])
    assert third.iter == second.iter
    assert weights(third) == weights(second)


def save_before_run(folder):
    return ClosureHook("before_run", lambda r: r.save_checkpoint(folder, "first.pth", create_symlink=False))


def test_a_refused_file_leaves_the_model_alone():
    runner = make(IterBasedRunner)
    before = weights(runner)
    torch.save({"state_dict": {"layer.weight": torch.ones(1, 2)}, "meta": {}}, "bare.pth")
    with pytest.raises(KeyError, match="no epoch and iter in its meta"):
        runner.resume("bare.pth")
    assert weights(runner) == before


def test_an_oserror_from_a_hook_keeps_its_file_name():
    runner = make(IterBasedRunner)
    runner.register_hook(ClosureHook("before_run", lambda r: Path("nowhere").read_text()))
    with pytest.raises(FileNotFoundError) as info:
        runner.run([batches()], [("train", 1)])
    assert info.value.filename == "nowhere"


@pytest.mark.parametrize("kind", KINDS)
def test_with_another_workflow_each_loader_goes_on_where_that_of_its_mode_was(kind):
    def loader(seed):
        return build_dataloader(Points(), 2, 0, seed=seed)

    first = make(kind, "first")
    first.register_hook(ClosureHook("after_train_iter", lambda r: r.stop("now") if r.iter == 7 else None))
    first.run([loader(3), loader(4)], [("train", 1), ("val", 1)])
    second = make(kind, "second")
    second.resume("first/latest.pth")
    train = loader(5)
    seen = []
    second.register_hook(ClosureHook("before_train_iter", lambda r: seen.append(r.data_batch)))
    with pytest.warns(UserWarning, match="each loader goes on where the one of the same mode was"):
        second.run([train], [("train", 1)])
    whole = loader(3)
    whole.seek(1, 2)
    assert train.seed == 3
    assert torch.equal(seen[0], next(iter(whole)))
    assert (second.epoch, second.iter) == ((3, 18) if kind is EpochBasedRunner else (2, 18))
