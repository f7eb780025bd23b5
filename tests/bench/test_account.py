"""Where iterations go: parts of made-up runs, and real ones of a recipe that calls everything and one that cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastrunner import supervised
from fastrunner.bench.account import LogClock, _After, account, whole_parts
from fastrunner.bench.runners import Task
from fastrunner.bench.runners.fastrunner import kept, settle, train
from fastrunner.hooks.logger.base import LoggerHook


def task(kind: str, folder, variant: str = "fused", epochs: int = 1) -> Task:
    torch.manual_seed(0)
    model = supervised(nn.Linear(6, 3), nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Task(kind, model, optimizer, 0.5, 4, folder, variant, epochs)


def batches(count: int) -> list[dict]:
    return [{"img": torch.randn(4, 6), "gt_label": torch.tensor([0, 1, 2, 0])} for _ in range(count)]


class Source(SimpleNamespace):
    def __len__(self) -> int:
        return 3


def test_parts_of_iterations_that_are_one_call():
    """100 ns for data, 1000 for the step; a log of 500 in iteration 1, an epoch's end of 4000 behind iteration 2."""
    lasts = [1100, 1600, 5100, 1100, 1100]
    asked = [sum(lasts[:i]) for i in range(6)]
    clock = SimpleNamespace(seen={1: (7_000, 7_500)})
    parts = whole_parts(Source(asked_ns=asked, given_ns=[at + 100 for at in asked]), clock, range(5))
    assert parts["data"] == [100] * 5
    assert parts["logging"] == [0, 500, 0, 0, 0]
    assert parts["step"] == [1000] * 5
    assert parts["rest"] == [0, 0, 4000, 0, 0]
    assert parts["hooks"] == [0] * 5


def test_the_clocks_are_called_where_the_logger_is():
    clock = LogClock(SimpleNamespace(due=lambda runner: 41))
    runner = SimpleNamespace(iter=30)
    clock.before_run(runner)
    assert clock.due(runner) == clock.after.due(runner) == 41
    runner.iter = 41
    clock.after_train_iter(runner)
    clock.after.after_train_iter(runner)
    ((at, (before, after)),) = clock.seen.items()
    assert at == 11
    assert before <= after
    assert isinstance(clock.after, _After)


@pytest.mark.parametrize("kind", ["iter", "epoch"])
def test_one_runner_trains_in_all_calls(kind, tmp_path):
    """Rounds of other lengths and log intervals go on with the same one."""
    work = task(kind, tmp_path)
    for length in (5, 3):
        work.log_interval = length
        train(work, batches(length))
    runner = kept(work, 1)
    assert runner.iter == 8
    assert [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)] == [3]
    settle(work, batches(8), 1.0)  # this recipe compiles nothing
    assert runner.iter == 8


@pytest.mark.parametrize("kind", ["iter", "epoch"])
def test_settling_ends_when_nothing_is_compiled(kind, tmp_path, monkeypatch):
    """Two passes of four batches at least, and as many more as there is something to wait for."""
    from fastrunner.step.choose import Step

    waits = iter([True, True, False])
    monkeypatch.setattr(Step, "compiling", property(lambda step: next(waits, False)))
    monkeypatch.setattr("fastrunner.bench.runners.fastrunner.AT_ONCE", ())
    work = task(kind, tmp_path)
    assert settle(work, batches(8), 60.0)
    assert kept(work, 1).iter == 4 * 3
    monkeypatch.setattr(Step, "compiling", property(lambda step: True))
    assert not settle(work, batches(8), 0.0)  # no time for more
    assert kept(work, 1).iter == 4 * 5


@pytest.mark.parametrize("kind", ["iter", "epoch"])
def test_an_account_of_a_recipe_with_hooks(kind, tmp_path):
    work = task(kind, tmp_path, epochs=4 if kind == "epoch" else 1)
    found = account(work, batches(8))
    assert not found["whole"]
    assert len(found["begins"]) == 8 * work.epochs - 3
    assert {"OptimizerHook", "TextLoggerHook"} <= set(found["hooks"])
    assert len(found["losses"]) == 2 * work.epochs
    assert "OptimizerHook" in found["plan"]
