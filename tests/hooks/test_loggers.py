"""TensorBoard, Weights & Biases, the text logger's out_dir; packages that are missing."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
from runner.helpers import TinyModel, batches

from fastrunner import ClosureHook, EpochBasedRunner, FusedSGD, IterBasedRunner, TextLoggerHook
from fastrunner.hooks.logger import NOT_CARRIED


def make(kind, hooks, interval=2, work_dir="out", **kwargs):
    model = TinyModel()
    length = dict(max_epochs=2) if kind is EpochBasedRunner else dict(max_iters=6)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), work_dir=work_dir, **length,
                  **kwargs)  # fmt: skip
    runner.register_training_hooks(dict(policy="fixed"), log_config=dict(interval=interval, hooks=hooks))
    return runner


def scalars(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = event_accumulator.EventAccumulator(folder)
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_tensorboard_gets_what_the_log_says(kind):
    runner = make(kind, [dict(type="TensorboardLoggerHook")])
    losses = []
    runner.register_hook(ClosureHook("after_train_iter", lambda r: losses.append(r.outputs["loss"].item())))
    workflow = [("train", 1), ("val", 1)] if kind is EpochBasedRunner else [("train", 1)]
    runner.run([batches(4)] * len(workflow), workflow)
    found = scalars("out/tf_logs")
    steps = [2, 4, 6, 8] if kind is EpochBasedRunner else [2, 4, 6]
    at_val = [5, 9] if kind is EpochBasedRunner else []  # as in mmcv: iter + 1, after the epoch
    assert found["train/loss"] == pytest.approx(
        {step: (losses[step - 2] + losses[step - 1]) / 2 for step in steps},
        rel=1e-6,  # written as float32
    )
    assert sorted(found.get("val/loss", {})) == at_val
    assert found["learning_rate"] == pytest.approx(dict.fromkeys(steps + at_val, 0.1))
    assert found["momentum"] == pytest.approx(dict.fromkeys(steps + at_val, 0.9))
    assert not {"train/time", "train/data_time"} & found.keys()


def test_tensorboard_texts_log_dir_and_an_early_end():
    hook = dict(type="TensorboardLoggerHook", log_dir="elsewhere")
    runner = make(IterBasedRunner, [hook])

    def note(runner):
        runner.log_buffer.output["note"] = "hello"

    runner.register_hook(ClosureHook("after_train_iter", note))
    runner.register_hook(ClosureHook("after_train_iter", lambda r: 1 / 0 if r.iter == 3 else None), "LOWEST")
    with pytest.raises(ZeroDivisionError):
        runner.run([batches(4)], [("train", 1)])
    (logger,) = [h for h in runner.hooks if hasattr(h, "log_dir")]
    assert logger.writer is None  # closed, so all is on disk
    assert sorted(scalars("elsewhere")["train/loss"]) == [2, 4]


@pytest.fixture
def wandb(monkeypatch):
    fake = Mock()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.__spec__ = SimpleNamespace(name="wandb")  # importlib.util.find_spec asks a loaded module for it
    return fake


def test_wandb(wandb):
    runner = make(IterBasedRunner, [dict(type="WandbLoggerHook", init_kwargs=dict(project="p"),
                                         define_metric_cfg=dict(acc="max"))], interval=5)  # fmt: skip
    Path("out/run.py").write_text("pass")
    Path("out/weights.pth").touch()
    runner.run([batches(4)], [("train", 1)])
    wandb.init.assert_called_once_with(project="p")
    wandb.define_metric.assert_called_once_with("acc", summary="max")
    ((tags,), said) = wandb.log.call_args
    assert tags.keys() == {"train/loss", "learning_rate", "momentum"}
    assert said == dict(step=5, commit=True)
    assert wandb.Artifact.return_value.add_file.call_args_list == [call("out/run.py")] or [
        Path(c.args[0]).name for c in wandb.Artifact.return_value.add_file.call_args_list
    ] == ["run.py"]
    wandb.log_artifact.assert_called_once_with(wandb.Artifact.return_value)
    wandb.finish.assert_called_once_with()


def test_wandb_without_steps_and_artifacts(wandb):
    hook = dict(type="WandbLoggerHook", with_step=False, log_artifact=False, commit=False,
                define_metric_cfg=dict(acc="best of all"))  # fmt: skip
    runner = make(IterBasedRunner, [hook], interval=6)
    with pytest.warns(UserWarning, match="'best of all' of acc is none of"):
        runner.run([batches(4)], [("train", 1)])
    ((tags,), said) = wandb.log.call_args
    assert tags["global_step"] == 6
    assert said == dict(commit=False)
    assert not wandb.log_artifact.called


@pytest.mark.parametrize(("hook", "package"), [("WandbLoggerHook", "wandb"), ("TensorboardLoggerHook", "tensorboard")])
def test_a_missing_package_is_said_at_registration_and_others_can_be_registered(hook, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    runner = make(IterBasedRunner, [dict(type="TextLoggerHook")])
    with pytest.raises(ImportError, match=rf"{hook} needs the package '{package}', .*: pip install {package}, or take"):
        runner.register_logger_hooks(dict(interval=1, hooks=[dict(type=hook)]))
    runner.run([batches(4)], [("train", 1)])


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_loggers_that_are_not_carried_say_so_at_registration(name):
    runner = make(IterBasedRunner, [])
    with pytest.raises(ImportError, match=f"fastrunner does not carry MMCV's {name}"):
        runner.register_logger_hooks(dict(interval=1, hooks=[dict(type=name, init_kwargs={})]))


@pytest.mark.parametrize("keep_local", [True, False])
def test_text_logs_are_copied_out(keep_local, caplog):
    hook = dict(type="TextLoggerHook", out_dir="store", out_suffix=(".json", ".txt"), keep_local=keep_local)
    runner = make(IterBasedRunner, [hook], work_dir="work/name")
    Path("work/name/deep").mkdir()
    Path("work/name/deep/note.txt").write_text("a note")
    Path("work/name/.hidden.txt").write_text("not this")
    with caplog.at_level(logging.INFO):
        runner.run([batches(4)], [("train", 1)])
    records = f"{runner.timestamp}.log.json"
    assert len(Path("store/name", records).read_text().splitlines()) == 3
    assert Path("store/name/deep/note.txt").read_text() == "a note"
    assert not Path("store/name/.hidden.txt").exists()
    assert Path("work/name", records).exists() is keep_local
    assert "Text logs will be saved to store/name after the training process." in caplog.text


def test_an_out_dir_inside_the_work_dir_is_not_copied_into_itself():
    runner = make(IterBasedRunner, [dict(type="TextLoggerHook", out_dir="out/copies")])
    runner.run([batches(4)], [("train", 1)])
    runner._max_iters = 8
    runner.run([batches(4)], [("train", 1)])
    assert len(list(Path("out").rglob("*.log.json"))) == 2


def test_what_the_text_logger_refuses():
    with pytest.raises(ValueError, match="file_client_args"):
        TextLoggerHook(file_client_args=dict(backend="disk"))
    with pytest.raises(TypeError, match="out_dir must be a str"):
        TextLoggerHook(out_dir=3)
    with pytest.raises(ValueError, match="local folders only"):
        TextLoggerHook(out_dir="s3://x", file_client_args=dict(backend="petrel"))
