"""LR hooks in a run: bad input, dicts of optimizers, the same hook twice, resuming, overriding. Values: the goldens."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from hooks import policy_runs
from hooks.policy_runs import RUNNERS, Idle, StopAfter

import fastrunner
from fastrunner import EpochBasedRunner, Hook, IterBasedRunner
from fastrunner.hooks.lr import LrUpdaterHook

LRS = (0.1, 0.02)
run = partial(policy_runs.run, "lr")


def make(*args, lrs=LRS, **kwargs):
    return policy_runs.make("lr", lrs, *args, **kwargs)


def build(policy, **kwargs):
    return getattr(fastrunner, f"{policy}LrUpdaterHook")(**kwargs)


# Bad input.


@pytest.mark.parametrize(
    ("policy", "kwargs", "error", "message"),
    [
        ("Fixed", dict(warmup="quadratic", warmup_iters=2), ValueError, "warmup must be None or one of .*'quadratic'"),
        ("Fixed", dict(warmup="linear"), ValueError, "needs warmup_iters > 0, got 0"),
        ("Fixed", dict(warmup="linear", warmup_iters=1e3), TypeError, "warmup_iters must be an int, got 1000.0"),
        ("Fixed", dict(warmup="exp", warmup_iters=5, warmup_ratio=0), ValueError, r"warmup_ratio must be in \(0, 1\]"),
        ("Fixed", dict(warmup="exp", warmup_iters=5, warmup_ratio="1e-3"), TypeError, "warmup_ratio .*yaml reads"),
        ("Step", dict(step="3"), TypeError, "step must be an int or a list of ints, got str"),
        ("Step", dict(step=True), TypeError, "step must be an int or a list of ints, got bool"),
        ("Step", dict(step=[4, -1]), ValueError, r"step must be positive, got \[4, -1\]"),
        ("Step", dict(step=3, gamma="0.1"), TypeError, "gamma must be a number"),
        ("Step", dict(step=3, min_lr="1e-3"), TypeError, "min_lr must be a number"),
        ("Exp", dict(gamma=None), TypeError, "gamma must be a number"),
        ("Poly", dict(power=float("inf")), ValueError, "power must be finite"),
        ("Inv", dict(gamma=0.1, power="1"), TypeError, "power must be a number"),
        ("CosineAnnealing", {}, ValueError, "give exactly one of min_lr and min_lr_ratio, got 0"),
        ("LinearAnnealing", dict(min_lr=0, min_lr_ratio=0), ValueError, "give exactly one of min_lr and min_lr_ratio"),
        ("FlatCosineAnnealing", dict(start_percent=75, min_lr=0), ValueError, r"start_percent must be .* got 75"),
        ("FlatCosineAnnealing", dict(start_percent=-0.1, min_lr=0), ValueError, "start_percent must be"),
        ("CosineRestart", dict(periods=5, min_lr=0), TypeError, "periods must be a list, got int"),
        ("CosineRestart", dict(periods=[5, 5], min_lr=0), ValueError, "there are 2 periods, 1 weights"),
        ("CosineRestart", dict(periods=[0], min_lr=0), ValueError, r"periods must be ints > 0, got \[0\]"),
        ("CosineRestart", dict(periods=[5], restart_weights=["1"], min_lr=0), TypeError, r"restart_weights\[0\] must"),
        ("Cyclic", dict(by_epoch=True), ValueError, "the Cyclic policy counts iterations"),
        ("Cyclic", dict(target_ratio=(3, 2, 1)), ValueError, "target_ratio must be"),
        ("Cyclic", dict(step_ratio_up=1.0), ValueError, r"step_ratio_up must be in \[0, 1\)"),
        ("Cyclic", dict(cyclic_times=0), ValueError, "cyclic_times must be an int > 0"),
        ("Cyclic", dict(gamma=0), ValueError, r"gamma must be in \(0, 1\]"),
        ("Cyclic", dict(anneal_strategy="sin"), ValueError, "anneal_strategy must be one of .*'sin'"),
        ("OneCycle", dict(max_lr=1, by_epoch=True), ValueError, "the OneCycle policy counts iterations"),
        ("OneCycle", dict(max_lr="1"), ValueError, "max_lr must be a number, a list or a dict"),
        ("OneCycle", dict(max_lr=1, total_steps=9.0), ValueError, "total_steps must be an int"),
        ("OneCycle", dict(max_lr=1, pct_start=1.5), ValueError, "pct_start must be"),
        ("OneCycle", dict(max_lr=1, div_factor=0), ValueError, "div_factor and final_div_factor must be > 0"),
        ("OneCycle", dict(max_lr=1, anneal_strategy="sin"), ValueError, "anneal_strategy must be one of"),
    ],
)
def test_bad_arguments_are_named(policy, kwargs, error, message):
    with pytest.raises(error, match=message):
        build(policy, **kwargs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(policy="cyclic", cyclic_times=7), "cyclic_times=7, but the run has only 6 iterations"),
        (dict(policy="OneCycle", max_lr=1.0, total_steps=5), "total_steps=5 is less than the 6 iterations of the run"),
        (dict(policy="OneCycle", max_lr=1.0, total_steps=10, pct_start=0.1), "too short for a way up"),
        (dict(policy="OneCycle", max_lr=[1.0]), "SGD has 2 param groups, but 1 values are given"),
        (dict(policy="CosineRestart", periods=[2], min_lr=0, by_epoch=False), r"periods=\[2\] are 2 iter.* run has 6"),
    ],
)
@pytest.mark.parametrize("kind", RUNNERS)
def test_what_does_not_fit_the_run_is_said_before_it_starts(kind, config, message):
    runner = make(kind)
    with pytest.raises(ValueError, match=message):
        run(runner, config)
    assert runner.iter == 0


def test_periods_in_epochs_are_compared_with_epochs():
    assert len(run(make(EpochBasedRunner), dict(policy="CosineRestart", periods=[3], min_lr=0))) == 6
    with pytest.raises(ValueError, match=r"periods=\[2\] are 2 epochs, but the run has 3"):
        run(make(EpochBasedRunner), dict(policy="CosineRestart", periods=[2], min_lr=0))


@pytest.mark.parametrize("policy", ["Fixed", "OneCycle"])
def test_a_runner_without_an_optimizer(policy):
    runner = IterBasedRunner(Idle(), max_iters=2)
    config = dict(policy=policy, by_epoch=False, **(dict(max_lr=1.0) if policy == "OneCycle" else {}))
    with pytest.raises(RuntimeError, match=f"{policy}LrUpdaterHook needs an optimizer; .* register no lr_config"):
        run(runner, config)


def test_behind_the_cycle():
    runner = make()
    runner.register_lr_hook(dict(policy="OneCycle", max_lr=1.0))
    hook = runner.hooks[0]
    hook.before_run(runner)
    runner._iter = 6
    with pytest.raises(ValueError, match="iteration 6 is behind the cycle of 6 iterations; give total_steps"):
        hook.before_train_iter(runner)


def test_a_length_that_is_not_known():
    hook, runner = build("CosineAnnealing", min_lr=0.0), make(IterBasedRunner)
    with pytest.raises(ValueError, match=r"CosineAnnealingLrUpdaterHook follows the length.* no max_epochs"):
        hook.get_lr(runner, 0.1)


def test_a_policy_by_epoch_in_a_run_by_iterations_warns():
    with pytest.warns(UserWarning, match="StepLrUpdaterHook has by_epoch=True .* lr will not change. Say by_epoch=Fa"):
        lrs = run(make(), dict(policy="step", step=[1]))
    assert lrs == [[0.1, 0.02]] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make(), dict(policy="step", step=[1], by_epoch=False))
        run(make(EpochBasedRunner), dict(policy="step", step=[1]))


def test_warmup_by_epoch_needs_epochs():
    config = dict(policy="fixed", warmup="linear", warmup_iters=1, warmup_by_epoch=True, by_epoch=False)
    with pytest.raises(ValueError, match="which only EpochBasedRunner has; give warmup_iters in iterations"):
        run(make(), config)
    lrs = run(make(EpochBasedRunner, lrs=(0.1, 0.1)), {**config, "warmup_ratio": 0.5})
    assert [lr for lr, _ in lrs] == pytest.approx([0.05, 0.075, 0.1, 0.1, 0.1, 0.1])  # an epoch of two iterations


# Optimizers.


def test_each_optimizer_of_a_dict_has_its_own_bases():
    model = Idle()
    optimizers = dict(a=torch.optim.SGD([model.w], lr=0.1), b=torch.optim.Adam([model.b], lr=0.02))
    lrs = run(make(optimizer=optimizers), dict(policy="OneCycle", max_lr=dict(a=1.0, b=[0.5]), pct_start=0.5))
    alone = run(make(), dict(policy="OneCycle", max_lr=[1.0, 0.5], pct_start=0.5))
    assert lrs == [dict(a=[a], b=[b]) for a, b in alone]
    with pytest.raises(KeyError, match="no value for the optimizer 'b', only for"):
        run(make(optimizer=optimizers), dict(policy="OneCycle", max_lr=dict(a=1.0)))


def test_a_dict_of_optimizers_without_epochs_keeps_its_lr():
    model = Idle()
    optimizers = dict(a=torch.optim.SGD([model.w], lr=0.1), b=torch.optim.Adam([model.b], lr=0.02))
    with pytest.warns(UserWarning, match="will not change"):
        lrs = run(make(optimizer=optimizers), dict(policy="step", step=[1], warmup="linear", warmup_iters=3))
    assert lrs == [dict(a=[0.1], b=[0.02])] * 6


def test_a_write_by_another_hook_lasts_until_the_next_iteration():
    class Meddler(Hook):
        def before_train_iter(self, runner):
            if runner.iter == 2:
                runner.optimizer.param_groups[1]["lr"] = 7.0

    runner = make()
    runner.register_hook(Meddler())
    assert run(runner, dict(policy="fixed", by_epoch=False)) == [[0.1, 0.02]] * 2 + [[0.1, 7.0]] + [[0.1, 0.02]] * 3


def test_a_group_added_during_the_run_keeps_its_lr():
    class Unfreeze(Hook):
        def after_train_iter(self, runner):
            if runner.iter == 2:
                runner.optimizer.add_param_group(dict(params=[torch.zeros(1, requires_grad=True)], lr=0.5))

    runner = make()
    runner.register_hook(Unfreeze())
    lrs = run(runner, dict(policy="exp", gamma=0.5, by_epoch=False))
    assert [len(row) for row in lrs] == [2, 2, 3, 3, 3, 3]
    assert [row[2] for row in lrs[2:]] == [0.5] * 4
    assert lrs[5][0] == 0.1 * 0.5**5


# Runs after runs.


@pytest.mark.parametrize(
    "config",
    [
        dict(policy="cyclic"),
        dict(policy="cyclic", cyclic_times=2, gamma=0.5),
        dict(policy="OneCycle", max_lr=1.0),
        dict(policy="OneCycle", max_lr=1.0, three_phase=True),
        dict(policy="CosineAnnealing", min_lr=0.0, by_epoch=False, warmup="linear", warmup_iters=2),
        dict(policy="fixed", warmup="exp", warmup_iters=2, warmup_by_epoch=True, epochs=True),
    ],
)
def test_a_hook_that_runs_twice_acts_as_a_new_one(config):
    config = dict(config)
    kind = EpochBasedRunner if config.pop("epochs", False) else IterBasedRunner
    twice, once = make(kind, length=4), make(kind, length=10)
    run(twice, config)
    hook = twice.hooks[0]
    again = make(kind, length=10)
    del hook.priority  # the same object in another runner, whose run is longer
    again.register_hook(hook, "VERY_HIGH")
    assert run(again, batches=3) == run(once, config, batches=3)  # and whose epochs are, too


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize(
    "config",
    [
        dict(policy="exp", gamma=0.5, by_epoch=False, warmup="linear", warmup_iters=5),
        dict(policy="cyclic"),
        dict(policy="OneCycle", max_lr=1.0),
    ],
)
def test_a_resumed_run_keeps_its_initial_lr(kind, config, tmp_path):
    whole = run(make(kind), config)

    first = make(kind, work_dir=str(tmp_path))
    first.register_hook(StopAfter(4))
    before = run(first, config)
    first.save_checkpoint(str(tmp_path), filename_tmpl="half.pth")
    second = make(kind, lrs=(9.0, 8.0))  # the config's lr has changed since: the checkpoint's counts
    second.resume(str(tmp_path / "half.pth"), map_location="cpu")
    after = run(second, config)
    assert before == whole[:4]
    assert before + after == whole
    assert [group["initial_lr"] for group in second.optimizer.param_groups] == [
        group["initial_lr"] for group in first.optimizer.param_groups
    ]


# What subclasses override.


def test_get_lr_of_a_subclass_is_asked_for_every_group():
    class Growing(fastrunner.FixedLrUpdaterHook):
        asked = 0

        def get_lr(self, runner, base_lr):
            self.asked += 1
            return super().get_lr(runner, base_lr) + self.asked

    runner = make(length=2, lrs=(0.5, 0.5))
    runner.register_hook(Growing(by_epoch=False))
    assert run(runner) == [[1.5, 2.5], [3.5, 4.5]]


def test_get_lr_of_the_object_counts():
    hook, runner = build("Fixed", by_epoch=False), make(length=1, lrs=(0.5, 0.5))
    answers = iter([1.0, 2.0])
    hook.get_lr = lambda runner, base_lr: next(answers)
    runner.register_hook(hook)
    assert run(runner) == [[1.0, 2.0]]


def test_formulas_are_asked_once_for_equal_bases(monkeypatch):
    from fastrunner.hooks import lr as module

    asked = []
    monkeypatch.setattr(module, "exp_value", lambda base, *_: asked.append(base) or base)
    run(make(length=1, lrs=(0.5, 0.5)), dict(policy="exp", gamma=0.1, by_epoch=False))
    assert asked == [0.5]


def test_the_other_methods_of_a_subclass_are_used():
    class Layers(fastrunner.ExpLrUpdaterHook):
        """Freezes the second group, starts the warm-up from 0, and writes a scale beside the lr."""

        def before_run(self, runner):
            super().before_run(runner)
            self.base_lr[0] = 1.0

        def get_regular_lr(self, runner):
            lrs = super().get_regular_lr(runner)
            lrs[1] = 0.0  # into the list that was returned
            return lrs

        def get_warmup_lr(self, cur_iters):
            return [lr * cur_iters for lr in self.regular_lr]

        def _set_lr(self, runner, lr_groups):
            super()._set_lr(runner, lr_groups)
            runner.optimizer.param_groups[0]["scale"] = lr_groups[0]

    runner = make(length=4)
    runner.register_hook(Layers(gamma=0.5, by_epoch=False, warmup="linear", warmup_iters=2))
    assert run(runner) == [[0.0, 0.0], [0.5, 0.0], [0.25, 0.0], [0.125, 0.0]]
    assert runner.optimizer.param_groups[0]["scale"] == 0.125


def test_the_base_alone_has_no_policy():
    with pytest.raises(NotImplementedError, match=r"LrUpdaterHook must define get_lr"):
        LrUpdaterHook().get_lr(make(), 0.1)


def test_counters_written_by_a_user_count():
    runner = make()
    runner.register_lr_hook(dict(policy="exp", gamma=0.5, by_epoch=False))
    runner._iter = 4
    assert [lr for lr, _ in run(runner)] == [0.1 * 0.5**4, 0.1 * 0.5**5]
