"""What a runner refuses: the type of the error, and that its message names the thing and the remedy."""

from __future__ import annotations

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

from fastrunner import (
    ClosureHook,
    EpochBasedRunner,
    Hook,
    HookError,
    IterBasedRunner,
    build_runner,
)


def make(kind=IterBasedRunner, **kwargs):
    kwargs.setdefault("max_iters" if kind is IterBasedRunner else "max_epochs", 2)
    model = kwargs.pop("model", None) or TinyModel()
    return kind(model, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(model=nn.Linear(1, 1)), TypeError, r"Linear has no train_step.*fastrunner\.supervised\(model, loss_fn\)"),
        (dict(model=nn.DataParallel(TinyModel())), TypeError, "DataParallel hides the train_step of the TinyModel"),
        (dict(batch_processor=3), TypeError, "batch_processor must be callable"),
        (dict(optimizer=3), TypeError, r"optimizer must be a torch\.optim\.Optimizer, got int"),
        (dict(optimizer=dict(a=3)), TypeError, r"optimizer\['a'\] must be"),
        (dict(optimizer=dict(type="SGD")), TypeError, "build_optimizer makes one from a config"),
        (dict(logger="log"), TypeError, r"logger must be a logging\.Logger or None, got str"),
        (dict(meta=[]), TypeError, "meta must be a dict"),
        (dict(work_dir=1), TypeError, "work_dir must be a str"),
        (dict(max_iters=1, max_epochs=1), ValueError, "Only one of"),
        (dict(max_iters=0), ValueError, "max_iters must be > 0, got 0"),
        (dict(max_iters=-3), ValueError, "max_iters must be > 0, got -3"),
        (dict(max_iters=1.5), TypeError, "max_iters must be an int"),
    ],
)
def test_constructor(arguments, error, says):
    with pytest.raises(error, match=says):
        make(**arguments)


def test_a_batch_processor_and_a_train_step_are_one_too_many():
    with (
        pytest.warns(DeprecationWarning, match="batch_processor is deprecated"),
        pytest.raises(RuntimeError, match="cannot be both available"),
    ):
        make(batch_processor=lambda *a, **k: None)


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
@pytest.mark.parametrize(
    ("loaders", "workflow", "error", "says"),
    [
        ([[1]], [("trian", 1)], ValueError, 'runner has no method named "trian"'),
        ([[1]], [("train", 0)], ValueError, r"the count of workflow entry \('train', 0\) must be > 0"),
        ([[1]], [("train", "1")], TypeError, "must be an int"),
        ([[1]], [(1, "train")], TypeError, "the mode of a workflow entry must be a str"),
        ([[1]], ["train"], TypeError, 'must be a pair like \\("train", 1\\)'),
        ([[1]], "train", TypeError, "workflow must be a list"),
        ([[1]], [("train", 1), ("val", 1)], ValueError, "the workflow has 2 entries, but there are 1 data loaders"),
        ([[1]], [("val", 1)], ValueError, 'has no "train" entry'),
        ([[]], [("train", 1)], ValueError, r"data loader 0 \(for 'train'\) is empty"),
        ([[1], []], [("train", 1), ("val", 1)], ValueError, r"data loader 1 \(for 'val'\) is empty"),
        ([iter([1])], [("train", 1)], TypeError, "must be an iterable with a length"),
        ([1], [("train", 1)], TypeError, "must be an iterable with a length"),
        (([1],), [("train", 1)], TypeError, "data_loaders must be a list"),
    ],
)
def test_run(kind, loaders, workflow, error, says):
    runner = make(kind)
    with pytest.raises(error, match=says):
        runner.run(loaders, workflow)
    assert (runner.epoch, runner.iter) == (0, 0)


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_run_needs_a_length(kind):
    with pytest.raises(ValueError, match="must be set: give it to the runner"):
        kind(TinyModel()).run([batches()], [("train", 1)])


def test_lists_from_json_and_yaml_are_fine_as_workflow_entries():
    runner = make(EpochBasedRunner)
    runner.run([batches(), batches()], [["train", 1], ["val", 1]])
    assert (runner.epoch, runner.iter) == (2, 6)


class Returns(TinyModel):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def train_step(self, data_batch, optimizer=None, **kwargs):
        return self.outputs(self.layer(data_batch)) if callable(self.outputs) else self.outputs

    val_step = train_step


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
@pytest.mark.parametrize(
    ("outputs", "error", "says"),
    [
        (None, TypeError, "must return a dict, got NoneType"),
        (lambda y: y.mean(), TypeError, "must return a dict, got Tensor"),
        (dict(log_vars=dict(a=1.0)), KeyError, "also need num_samples"),
        (dict(log_vars=[1.0], num_samples=1), TypeError, "log_vars must be a dict"),
        (dict(num_samples=1), KeyError, "returned no 'loss', only"),
        (dict(loss=1.0), TypeError, "the loss is a float, not a tensor"),
        (lambda y: dict(loss=y), ValueError, r"the loss has shape \(4, 1\), not one value.*loss\.mean\(\)"),
        (lambda y: dict(loss=y.mean().detach()), ValueError, "does not depend on any parameter"),
    ],
)
def test_train_step(kind, outputs, error, says):
    model = Returns(outputs)
    runner = make(kind, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    runner.register_training_hooks(None, optimizer_config={})
    with pytest.raises(error, match=says):
        runner.run([batches()], [("train", 1)])
    assert runner.iter == 0


def test_optimizer_hook_wants_one_optimizer():
    model = TinyModel()
    runner = make(model=model, optimizer=dict(a=torch.optim.SGD(model.parameters(), lr=0.1)))
    runner.register_optimizer_hook({})
    with pytest.raises(
        TypeError, match=r"OptimizerHook drives one optimizer, the runner has dict.*optimizer_config=None"
    ):
        runner.run([batches()], [("train", 1)])


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
@pytest.mark.parametrize("stage", ["before_run", "before_train_iter", "after_train_iter", "after_run"])
def test_a_hook_that_raises_is_named(kind, stage):
    class Broken(Hook):
        pass

    def fail(self, runner):
        raise LookupError("gone")

    setattr(Broken, stage, fail)
    runner = make(kind)
    runner.register_hook(Broken())
    with pytest.raises(LookupError, match=rf"Broken\.{stage} raised LookupError: gone") as info:
        runner.run([batches()], [("train", 1)])
    assert isinstance(info.value, HookError)
    assert type(info.value.__cause__) is LookupError


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda r: r.register_hook(print), TypeError, "must be a fastrunner.Hook.*ClosureHook"),
        (lambda r: [r.register_hook(h) for h in [Hook()] * 2], ValueError, "registered before"),
        (lambda r: r.register_hook(Hook(), priority="URGENT"), KeyError, "unknown priority 'URGENT'; known: HIGHEST"),
        (lambda r: r.register_hook(Hook(), priority=101), ValueError, "between 0 and 100"),
        (lambda r: r.register_hook(Hook(), priority=1.0), TypeError, "must be an int, a name or a Priority"),
        (lambda r: r.register_lr_hook(dict(policy="stp", step=1)), KeyError, "unknown policy 'stp'; known: .*Step"),
        (lambda r: r.register_lr_hook(dict(step=1)), ValueError, "the config of a LrUpdaterHook needs"),
        (lambda r: r.register_logger_hooks(dict(hooks=[])), KeyError, "log_config needs .*interval=50"),
        (
            lambda r: r.register_logger_hooks(dict(interval=1, hooks=[], hook=[])),
            KeyError,
            "log_config has no hook; did you mean hooks instead of hook",
        ),
        (lambda r: r.register_checkpoint_hook(dict(type="ChekpointHook")), KeyError, "CheckpointHook"),
        (lambda r: r.register_optimizer_hook(print), TypeError, "must be a fastrunner.Hook"),
        (lambda r: r.current_lr(), RuntimeError, "no optimizer"),
        (lambda r: r.save_checkpoint(".", meta=[]), TypeError, "meta must be a dict"),
        (lambda r: r.resume("nowhere.pth"), FileNotFoundError, r"nowhere\.pth"),
        (lambda r: ClosureHook("after_lunch", print), ValueError, "'after_lunch' is not a stage"),
        (lambda r: ClosureHook("after_run", 3), TypeError, "fn must be callable"),
    ],
)
def test_registering_and_reading(call, error, says):
    with pytest.raises(error, match=says):
        call(make())


@pytest.mark.parametrize(
    ("cfg", "error", "says"),
    [
        (dict(type="IterBasedRuner", max_iters=1), KeyError, "IterBasedRunner"),
        (dict(max_iters=1), KeyError, "type"),
        ([1], TypeError, "must be a dict"),
        (dict(type="IterBasedRunner", max_iter=1), TypeError, "max_iter"),
    ],
)
def test_build_runner(cfg, error, says):
    with pytest.raises(error, match=says):
        build_runner(cfg, dict(model=TinyModel()))


def test_configs_are_not_changed():
    lr, optimizer, checkpoint = dict(policy="step", step=1), dict(grad_clip=dict(max_norm=1.0)), dict(interval=1)
    log = dict(interval=1, hooks=[dict(type="TextLoggerHook")])
    before = repr((lr, optimizer, checkpoint, log))
    for kind in (EpochBasedRunner, IterBasedRunner):
        make(kind).register_training_hooks(lr, optimizer, checkpoint, log)
    assert repr((lr, optimizer, checkpoint, log)) == before
