"""The plan calls what MMCV's plain dispatcher would call, in its order."""

from __future__ import annotations

import json
from subprocess import CalledProcessError
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrunner import ClosureHook, Hook, HookError
from fastrunner.plan.dispatch import STAGES, HookPlan, following, named

METHODS = [*Hook.stages, "before_epoch", "after_epoch", "before_iter", "after_iter"]


class Trace:
    def __init__(self):
        self.calls = []


def make_hook(name: str, on_class: set[str], on_instance: set[str]) -> Hook:
    """A hook that overrides some methods by its class and shadows others by instance attributes."""

    def by_class(method):
        return lambda self, runner: runner.calls.append((name, method, "class"))

    hook = type(name, (Hook,), {method: by_class(method) for method in on_class})()
    for method in on_instance:
        setattr(hook, method, lambda runner, method=method: runner.calls.append((name, method, "instance")))
    return hook


HOOKS_TO_TRY = st.lists(
    st.tuples(st.sets(st.sampled_from(METHODS), max_size=5), st.sets(st.sampled_from(METHODS), max_size=3)), max_size=6
)


@given(HOOKS_TO_TRY)
def test_the_plan_equals_asking_every_hook(specs):
    hooks = [make_hook(f"H{i}", *spec) for i, spec in enumerate(specs)]
    plan, planned, plain = HookPlan(hooks), Trace(), Trace()
    for stage in STAGES:
        plan.fire(getattr(plan, stage), planned)
        for hook in hooks:
            getattr(hook, stage)(plain)
    assert planned.calls == plain.calls


def test_only_hooks_that_act_are_in_the_tables():
    idle, busy = Hook(), make_hook("Busy", {"before_iter"}, set())
    plan = HookPlan([idle, busy])
    assert plan.before_train_iter == plan.before_val_iter == (busy.before_iter,)  # without the detour
    assert plan.after_train_iter == plan.before_run == ()


def test_mocks_and_closures_are_seen():
    hook = Hook()
    hook.after_train_iter = Mock()
    closure = ClosureHook("before_epoch", Mock())
    plan = HookPlan([hook, closure])
    plan.fire(plan.after_train_iter, "runner")
    hook.after_train_iter.assert_called_once_with("runner")
    plan.fire(plan.before_val_epoch, "runner")
    closure.before_epoch.assert_called_once_with("runner")


class Picky(Exception):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.b = b


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("k"),
        FileNotFoundError(2, "no", "f"),
        UnicodeDecodeError("utf8", b"x", 0, 1, "bad"),
        CalledProcessError(1, "cmd"),
        json.JSONDecodeError("m", "doc", 1),
        Picky(1, 2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_error_names_hook_and_stage_and_stays_what_it_was(error):
    def fail(runner):
        raise error

    class Failing(Hook):
        def after_iter(self, runner):
            raise error

    for hook in (Failing(), ClosureHook("after_iter", fail)):
        plan = HookPlan([hook])
        with pytest.raises(type(error)) as info:
            plan.fire(plan.after_train_iter, None)
        assert isinstance(info.value, HookError)
        assert info.value.__cause__ is error
        assert f"{type(hook).__name__}.after_train_iter raised {type(error).__name__}: {error}" == str(info.value)
        assert (info.value.hook, info.value.stage) == (type(hook).__name__, "after_train_iter")
        assert {k: v for k, v in vars(error).items() if k in vars(info.value)} == vars(error)


def test_control_flow_exceptions_pass_untouched():
    for kind in (KeyboardInterrupt, SystemExit):
        plan = HookPlan([ClosureHook("after_run", Mock(side_effect=kind))])
        with pytest.raises(kind) as info:
            plan.fire(plan.after_run, None)
        assert not isinstance(info.value, HookError)


def test_a_final_exception_type_still_gets_a_name():
    error = named(make_unsubclassable(), "Some", "before_run")
    assert isinstance(error, HookError)
    assert "Some.before_run" in str(error)


def make_unsubclassable() -> Exception:
    class Final(Exception):
        def __init_subclass__(cls):
            raise TypeError("final")

    return Final("no heirs")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda hooks: hooks.remove("b"), "abcd"),  # itself: c is not missed
        (lambda hooks: hooks.remove("c"), "abd"),
        (lambda hooks: hooks.remove("a"), "abcd"),  # one that was met: c is not missed
        (lambda hooks: hooks.append("e"), "abcde"),
        (lambda hooks: hooks.insert(2, "e"), "abecd"),
        (lambda hooks: hooks.insert(0, "e"), "abcd"),  # before those that were met: too late
        (lambda hooks: hooks.clear(), "ab"),
        (lambda hooks: hooks.reverse(), "ab"),
    ],
)
def test_a_list_that_changes_while_its_hooks_are_called(change, expected):
    hooks, met = list("abcd"), []
    for hook in following(hooks):
        met.append(hook)
        if hook == "b" and len(met) == 2:
            change(hooks)
    assert "".join(met) == expected
