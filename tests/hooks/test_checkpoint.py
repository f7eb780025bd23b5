"""CheckpointHook beyond mmcv's goldens: stop(), what is on disk after errors, meta."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from runner.helpers import TinyModel, batches

from fastrunner import ClosureHook, EpochBasedRunner, FusedSGD, IterBasedRunner


def make(kind=IterBasedRunner, checkpoint=None, **kwargs):
    torch.manual_seed(0)
    model = TinyModel()
    kwargs.setdefault("max_iters" if kind is IterBasedRunner else "max_epochs", 4)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), work_dir="out", **kwargs)
    runner.register_training_hooks(None, {}, checkpoint or dict(interval=2))
    return runner


def at(iteration, do):
    return ClosureHook("after_train_iter", lambda runner: do(runner) if runner.iter + 1 == iteration else None)


@pytest.mark.parametrize("kind", [IterBasedRunner, EpochBasedRunner])
def test_a_stopped_run_is_saved_where_it_stopped_and_resumes_to_the_same_end(kind):
    whole = make(kind)
    whole.run([batches()], [("train", 1)])
    stopped = make(kind)
    stopped.register_hook(at(3 if kind is IterBasedRunner else 5, lambda r: r.stop("enough")))
    stopped.run([batches()], [("train", 1)])
    assert stopped.stop_reason == "enough"
    assert Path("out/latest.pth").readlink() == Path(f"iter_{stopped.iter}.pth")
    resumed = make(kind)
    resumed.resume("out/latest.pth")
    assert resumed.iter == stopped.iter
    resumed.run([batches()], [("train", 1)])
    assert (resumed.epoch, resumed.iter) == (whole.epoch, whole.iter)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_stopped_where_it_just_saved_does_not_save_twice():
    runner = make()
    runner.register_hook(at(2, lambda r: r.stop("enough")))
    runner.run([batches()], [("train", 1)])
    assert sorted(os.listdir("out")) == ["iter_2.pth", "latest.pth"]


def test_nothing_is_deleted_before_the_new_file_is_there(monkeypatch):
    from fastrunner.checkpoint import file

    runner = make(checkpoint=dict(interval=1, max_keep_ckpts=1))
    real, calls = file.write, []

    def full_at_the_third(checkpoint, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(checkpoint, path)

    monkeypatch.setattr(file, "write", full_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        runner.run([batches()], [("train", 1)])
    assert sorted(os.listdir("out")) == ["iter_2.pth", "latest.pth"]
    assert torch.load("out/latest.pth")["resume"]["counters"]["iter"] == 2
    assert runner.iter == 2  # the third iteration was not finished


def test_each_file_loads_safely_and_counts_what_is_done():
    runner = make(EpochBasedRunner, dict(interval=1, by_epoch=False), meta=dict(exp_name="x", seed=1))
    runner.run([batches()], [("train", 1)])
    for n in range(1, 13):
        content = torch.load(f"out/iter_{n}.pth", weights_only=True)
        assert content["resume"]["counters"] == dict(epoch=(n - 1) // 3, iter=n)
        # after the third batch the epoch's own hooks have not run yet: it is resumed at its end
        assert content["resume"]["loaders"] == [dict(epoch=(n - 1) // 3, position=(n - 1) % 3 + 1)]
        assert content["meta"]["exp_name"] == "x"


def test_filename_template_and_out_dir():
    runner = make(checkpoint=dict(interval=2, out_dir="elsewhere", filename_tmpl="model_{:04d}.pth", max_keep_ckpts=1))
    runner.run([batches()], [("train", 1)])
    assert sorted(os.listdir("elsewhere/out")) == ["latest.pth", "model_0004.pth"]


def test_a_misspelt_argument_is_found_before_the_first_save():
    runner = make(checkpoint=dict(intervall=2))
    with pytest.raises(KeyError, match="CheckpointHook has no intervall; did you mean interval instead"):
        runner.run([batches()], [("train", 1)])
    assert not list(Path("out").glob("*.pth"))

    class AnyArguments(IterBasedRunner):
        def save_checkpoint(self, out_dir, **kwargs):
            self.got = kwargs

    runner = AnyArguments(TinyModel(), work_dir="out", max_iters=4)
    runner.register_checkpoint_hook(dict(interval=4, by_epoch=False, mine=1))
    runner.run([batches()], [("train", 1)])
    assert runner.got["mine"] == 1
