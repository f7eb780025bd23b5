"""``register_*`` in every form that is accepted: None, a config, a hook; the priorities and the units are MMCV's."""

from __future__ import annotations

import pytest
from runner.helpers import TinyModel

from fastrunner import (
    CheckpointHook,
    EpochBasedRunner,
    FixedLrUpdaterHook,
    FusedSGD,
    Hook,
    IterBasedRunner,
    IterTimerHook,
    OptimizerHook,
    ProfilerHook,
    StepMomentumUpdaterHook,
    TextLoggerHook,
)
from fastrunner.config import ConfigDict

FORMS = {
    "lr": (dict(policy="fixed"), FixedLrUpdaterHook(), 10),
    "momentum": (dict(policy="step", step=[1]), StepMomentumUpdaterHook(step=[1]), 30),
    "optimizer": (dict(grad_clip=None), OptimizerHook(), 40),
    "checkpoint": (dict(interval=1), CheckpointHook(), 50),
    "profiler": (dict(profile_iters=1), ProfilerHook(), 50),
    "timer": (dict(type="IterTimerHook"), IterTimerHook(), 70),
}


def make(kind=EpochBasedRunner):
    model = TinyModel()
    length = dict(max_epochs=1) if kind is EpochBasedRunner else dict(max_iters=1)
    return kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1, momentum=0.9), **length)


@pytest.mark.parametrize("name", FORMS)
def test_none_a_dict_a_config_dict_a_hook(name):
    config, hook, priority = FORMS[name]
    register = f"register_{name}_hook"
    runner = make()
    getattr(runner, register)(None)
    assert runner.hooks == []
    before = dict(config)
    getattr(runner, register)(config)
    getattr(runner, register)(ConfigDict(config))
    hook.__dict__.pop("priority", None)
    getattr(runner, register)(hook)
    assert config == before
    assert [type(each) for each in runner.hooks] == [type(hook)] * 3
    assert [each.priority for each in runner.hooks] == [priority] * 3


@pytest.mark.parametrize("name", FORMS)
def test_what_is_no_hook_is_refused(name):
    with pytest.raises(TypeError, match=r"a hook must be a fastrunner\.Hook, got builtin_function_or_method"):
        getattr(make(), f"register_{name}_hook")(print)


def test_another_type_for_each_config():
    class MyCheckpointHook(CheckpointHook):
        pass

    runner = make()
    runner.register_checkpoint_hook(dict(type=MyCheckpointHook, interval=3))
    runner.register_optimizer_hook(dict(type="Fp16OptimizerHook", loss_scale=8.0))
    assert [type(hook).__name__ for hook in runner.hooks] == ["Fp16OptimizerHook", "MyCheckpointHook"]


@pytest.mark.parametrize("policy", ["step", "Step", "STEP"])
def test_policies_of_one_word_in_any_case(policy):
    runner = make()
    runner.register_lr_hook(dict(policy=policy, step=[1]))
    runner.register_momentum_hook(dict(policy=policy, step=[1]))
    assert [type(hook).__name__ for hook in runner.hooks] == ["StepLrUpdaterHook", "StepMomentumUpdaterHook"]


@pytest.mark.parametrize("policy", ["CosineAnnealing", "cosineannealing", "OneCycle", "onecycle"])
def test_policies_of_two_words_in_any_case(policy):
    options = dict(min_lr=0.0) if policy.lower() == "cosineannealing" else dict(max_lr=1.0)
    runner = make()
    runner.register_lr_hook(dict(policy=policy, **options))
    assert type(runner.hooks[0]).__name__.lower() == f"{policy.lower()}lrupdaterhook"


def test_loggers_as_configs_and_hooks_with_their_own_interval():
    runner = make()
    runner.register_logger_hooks(None)
    mine = TextLoggerHook(interval=3)
    runner.register_logger_hooks(
        dict(interval=7, hooks=[dict(type="TextLoggerHook"), dict(type="TextLoggerHook", interval=5), mine])
    )
    assert [(hook.interval, hook.priority) for hook in runner.hooks] == [(7, 90), (5, 90), (3, 90)]


def test_custom_hooks_one_or_many_with_priorities():
    class Mine(Hook):
        pass

    runner = make()
    runner.register_custom_hooks(None)
    runner.register_custom_hooks(dict(type="EMAHook", priority=45))
    runner.register_custom_hooks(Mine())
    runner.register_custom_hooks([Mine(), dict(type="EmptyCacheHook", priority="LOWEST"), dict(type=Mine, priority=0)])
    runner.register_custom_hooks((Mine(),))
    assert [hook.priority for hook in runner.hooks] == [0, 45, 50, 50, 50, 100]


def test_the_iteration_runner_counts_iterations_unless_it_is_told_otherwise():
    runner = make(IterBasedRunner)
    runner.register_training_hooks(
        dict(policy="fixed"), {}, dict(interval=1), dict(interval=1, hooks=[dict(type="TextLoggerHook")]),
        dict(policy="step", step=[1]),
    )  # fmt: skip
    counted = {type(hook).__name__: hook.by_epoch for hook in runner.hooks if hasattr(hook, "by_epoch")}
    assert counted == dict.fromkeys(
        ["FixedLrUpdaterHook", "StepMomentumUpdaterHook", "CheckpointHook", "TextLoggerHook"], False
    )
    runner = make(IterBasedRunner)
    logger = TextLoggerHook(by_epoch=True)
    runner.register_training_hooks(
        FixedLrUpdaterHook(by_epoch=False), OptimizerHook(), CheckpointHook(by_epoch=True),
        dict(interval=1, hooks=[logger, dict(type="TextLoggerHook", by_epoch=True)]), timer_config=None,
    )  # fmt: skip
    assert [hook.by_epoch for hook in runner.hooks if hasattr(hook, "by_epoch")] == [False, True, True, True]
    assert not any(isinstance(hook, IterTimerHook) for hook in runner.hooks)
