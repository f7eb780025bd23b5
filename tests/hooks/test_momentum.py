"""Momentum hooks in a run: bad input, dicts of optimizers, the same hook twice, resuming. Values: the goldens."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from hooks import policy_runs
from hooks.policy_runs import RUNNERS, Idle, StopAfter

import fastrunner
from fastrunner import Hook, IterBasedRunner
from fastrunner.hooks.momentum import MomentumUpdaterHook

MOMENTA = (0.9, 0.8)
run = partial(policy_runs.run, "momentum")


def make(*args, momenta=MOMENTA, **kwargs):
    return policy_runs.make("momentum", momenta, *args, **kwargs)


def parameter():
    return torch.zeros(1, requires_grad=True)


@pytest.mark.parametrize(
    ("policy", "kwargs", "error", "message"),
    [
        ("Step", dict(step="3"), TypeError, "step must be an int or a list of ints"),
        ("Step", dict(step=0), ValueError, "step must be positive"),
        ("Step", dict(step=1, min_momentum="0.1"), TypeError, "min_momentum must be a number"),
        ("Step", dict(step=1, warmup="cubic"), ValueError, "warmup must be None or one of"),
        ("Step", dict(step=1, warmup="linear"), ValueError, "needs warmup_iters > 0, got 0"),
        ("Step", dict(step=1, warmup_by_epoch=True), TypeError, "warmup_by_epoch"),
        ("CosineAnnealing", {}, ValueError, "give exactly one of min_momentum and min_momentum_ratio, got 0"),
        ("LinearAnnealing", dict(min_momentum=1, min_momentum_ratio=1), ValueError, "give exactly one of .* got 2"),
        ("Cyclic", dict(by_epoch=True), ValueError, "the Cyclic policy counts iterations"),
        ("Cyclic", dict(step_ratio_up=1.5), ValueError, "step_ratio_up must be in"),
        ("Cyclic", dict(cyclic_times=1.5), ValueError, "cyclic_times must be an int > 0"),
        ("Cyclic", dict(gamma="1"), TypeError, "gamma must be a number"),
        ("Cyclic", dict(anneal_strategy="sin"), ValueError, "anneal_strategy must be one of"),
        ("OneCycle", dict(by_epoch=True), ValueError, "the OneCycle policy counts iterations"),
        ("OneCycle", dict(base_momentum=1), ValueError, "base_momentum must be a float, a list or a dict, got 1"),
        ("OneCycle", dict(max_momentum="0.9"), ValueError, "max_momentum must be a float"),
        ("OneCycle", dict(pct_start=1), ValueError, "pct_start must be a float in"),
        ("OneCycle", dict(anneal_strategy="sin"), ValueError, "anneal_strategy must be one of"),
    ],
)
def test_bad_arguments_are_named(policy, kwargs, error, message):
    with pytest.raises(error, match=message):
        getattr(fastrunner, f"{policy}MomentumUpdaterHook")(**kwargs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(policy="cyclic", cyclic_times=7), "cyclic_times=7, but the run has only 6 iterations"),
        (dict(policy="OneCycle", pct_start=1 / 6), "too short for a way up"),
        (dict(policy="OneCycle", max_momentum=[0.9]), "SGD has 2 param groups, but 1 values are given"),
    ],
)
@pytest.mark.parametrize("kind", RUNNERS)
def test_what_does_not_fit_the_run_is_said_before_it_starts(kind, config, message):
    runner = make(kind)
    with pytest.raises(ValueError, match=message):
        run(runner, config)
    assert runner.iter == 0


@pytest.mark.parametrize("config", [dict(policy="OneCycle"), dict(policy="step", step=2, by_epoch=False)])
def test_an_optimizer_without_momentum(config):
    message = "the optimizer Adagrad has neither momentum nor betas in its param groups; drop momentum_config"
    with pytest.raises(ValueError, match=message):
        run(make(optimizer=torch.optim.Adagrad([parameter()])), config)
    optimizers = dict(g=torch.optim.Adam([parameter()]), d=torch.optim.Adagrad([parameter()]))
    with pytest.raises(ValueError, match="the optimizer d has neither"):
        run(make(optimizer=optimizers), config)


@pytest.mark.parametrize("policy", ["step", "OneCycle"])
def test_a_runner_without_an_optimizer(policy):
    config = dict(policy=policy, by_epoch=False, **(dict(step=2) if policy == "step" else {}))
    with pytest.raises(RuntimeError, match=r"MomentumUpdaterHook needs an optimizer; .* no momentum_config"):
        run(IterBasedRunner(Idle(), max_iters=2), config)


def test_in_a_run_by_iterations_it_counts_iterations():
    runner = make()
    lr, momentum = dict(policy="fixed"), dict(policy="step", step=[2], gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.register_training_hooks(lr, momentum_config=momentum)
        rows = run(runner)
    assert rows == [[0.9, 0.8]] * 2 + [[0.45, 0.4]] * 4
    with pytest.warns(UserWarning, match="StepMomentumUpdaterHook has by_epoch=True .* the momentum will not change"):
        assert run(make(), momentum) == [[0.9, 0.8]] * 6


def test_betas_keep_their_second():
    adam = torch.optim.Adam([parameter()], betas=(0.9, 0.97))
    rows = run(make(optimizer=adam), dict(policy="step", step=[3], gamma=0.5, by_epoch=False))
    assert rows == [[0.9]] * 3 + [[0.45]] * 3
    assert adam.param_groups[0]["betas"] == (0.45, 0.97)


def test_warmup_divides():
    # 0.8 / 0.5 at first and 0.8 / 0.75 half way, as mmcv's
    config = dict(policy="step", step=[9], by_epoch=False, warmup="linear", warmup_iters=2, warmup_ratio=0.5)
    assert [row[1] for row in run(make(length=3), config)] == [0.8 / 0.5, 0.8 / 0.75, 0.8]


def test_one_cycle_of_a_dict_of_optimizers():
    optimizers = dict(sgd=torch.optim.SGD([parameter()], lr=0.1), adam=torch.optim.AdamW([parameter()]))
    config = dict(policy="OneCycle", base_momentum=dict(sgd=0.7, adam=0.6), max_momentum=dict(sgd=0.9, adam=[0.8]))
    rows = run(make(optimizer=optimizers), config)
    alone = run(make(), dict(policy="OneCycle", base_momentum=[0.7, 0.6], max_momentum=[0.9, 0.8]))
    assert rows == [dict(sgd=[a], adam=[b]) for a, b in alone]
    assert optimizers["adam"].param_groups[0]["max_momentum"] == 0.8
    assert optimizers["adam"].param_groups[0]["betas"][1] == 0.999
    with pytest.raises(KeyError, match="no value for the optimizer 'adam', only for"):
        run(make(optimizer=optimizers), {**config, "base_momentum": dict(sgd=0.7)})


@pytest.mark.parametrize(
    "config",
    [dict(policy="cyclic"), dict(policy="OneCycle", three_phase=True), dict(policy="OneCycle", pct_start=0.5)],
)
def test_a_hook_that_runs_twice_acts_as_a_new_one(config):
    first = make(length=4)
    run(first, config)
    hook = first.hooks[0]
    del hook.priority
    again = make(length=10)  # the same object in another runner, whose run is longer
    again.register_hook(hook, "HIGH")
    assert run(again) == run(make(length=10), config)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (dict(policy="LinearAnnealing", min_momentum=0.5, by_epoch=False), {"initial_momentum"}),
        (dict(policy="cyclic"), {"initial_momentum"}),
        (dict(policy="OneCycle"), {"base_momentum", "max_momentum"}),
    ],
)
def test_a_resumed_run_keeps_its_base(kind, config, keys, tmp_path):
    whole = run(make(kind), config)

    first = make(kind, work_dir=str(tmp_path))
    first.register_hook(StopAfter(4))
    before = run(first, config)
    first.save_checkpoint(str(tmp_path), filename_tmpl="half.pth")
    second = make(kind, momenta=(0.1, 0.2))  # the config's momentum has changed since: the checkpoint's counts
    second.resume(str(tmp_path / "half.pth"), map_location="cpu")
    assert all(keys <= set(group) for group in second.optimizer.param_groups)
    assert before + run(second, config) == whole


def test_get_momentum_of_a_subclass_gets_the_group():
    class Named(fastrunner.OneCycleMomentumUpdaterHook):
        def get_momentum(self, runner, param_group):
            return super().get_momentum(runner, param_group) * param_group["share"]

    runner = make()
    for share, group in zip((1.0, 0.5), runner.optimizer.param_groups, strict=True):
        group["share"] = share
    runner.register_hook(Named())
    rows = run(runner)
    assert [b for _, b in rows] == [a * 0.5 for a, _ in rows]
    assert [a for a, _ in rows] == [a for a, _ in run(make(), dict(policy="OneCycle"))]


def test_a_momentum_key_that_a_user_writes_counts():
    class Lower(Hook):
        def after_train_iter(self, runner):
            for group in runner.optimizer.param_groups:
                group["base_momentum"] = group["max_momentum"] = 0.4

    runner = make()
    runner.register_hook(Lower())
    rows = run(runner, dict(policy="OneCycle"))
    assert rows[0] == [0.95, 0.95]
    assert rows[1:] == [[0.4, 0.4]] * 5


def test_the_base_alone_has_no_policy():
    with pytest.raises(NotImplementedError, match="MomentumUpdaterHook must define get_momentum"):
        MomentumUpdaterHook().get_momentum(make(), 0.9)
