"""EvalHook is mmcv 1.7.2's but for the decisions that ``AsMmcv`` undoes (golden/evaluations.json).

What those decisions give is in tests/hooks/test_evaluation.py.
"""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
from golden import evaluations, scenarios

import fastrunner
from fastrunner import EvalHook
from fastrunner.hooks.logger.base import LoggerHook

GOLDEN = scenarios.golden("evaluations")


class AsMmcv(EvalHook):
    """Each method undoes one decision."""

    def _save_ckpt(self, runner, key_score):
        if key_score:  # a score of 0 is never the best
            EvalHook._save_ckpt(self, runner, key_score)

    def _before_training(self, runner):
        """Only where the interval fits too, named as if the epoch were over, and logged only by accident."""
        if self.initial_flag:
            self.initial_flag = False
            if self.start is not None and (runner.epoch if self.by_epoch else runner.iter) >= self.start:
                (self.after_train_epoch if self.by_epoch else self.after_train_iter)(runner)

    def after_train_iter(self, runner):
        """What training has gathered since the last log is forgotten."""
        if not self.by_epoch and self._should_evaluate(runner):
            for hook in runner._hooks:
                if isinstance(hook, LoggerHook):
                    hook.after_train_iter(runner)
            runner.log_buffer.clear()
            self._evaluate_now(runner)

    def due(self, runner):
        return runner.iter


API = SimpleNamespace(**{name: getattr(fastrunner, name) for name in fastrunner.__all__})
API.EvalHook = AsMmcv


@pytest.mark.parametrize("name", evaluations.CASES)
def test_evaluations_are_mmcvs(name):
    expected, ours = copy.deepcopy(GOLDEN[name]), scenarios.play("evaluations", name, API)
    if name.startswith("iter"):  # the epoch of an iteration is another decision: see test_events.py
        for result in (expected, ours):
            result["records"] = [re.sub(r'"epoch": \d+, ', "", line) for line in result["records"]]
    if name.endswith("begun before"):  # mmcv removes a file and writes another of the same name; ours replaces it
        (removed,) = (k for k, line in enumerate(expected["console"][:6]) if "was removed" in line)
        del expected["console"][removed]
    assert ours == expected


@pytest.mark.parametrize("undone", ["_save_ckpt", "_before_training", "after_train_iter"])
def test_the_decisions_are_needed(undone):
    """A difference that is gone should leave the list."""
    methods = {name: method for name, method in vars(AsMmcv).items() if callable(method) and name != undone}
    API.EvalHook = type("Without", (EvalHook,), methods)
    try:
        assert any(scenarios.play("evaluations", name, API) != GOLDEN[name] for name in GOLDEN if "epoch" in name)
    finally:
        API.EvalHook = AsMmcv
