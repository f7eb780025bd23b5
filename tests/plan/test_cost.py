"""What an iteration in which nobody is called costs, in exact numbers that do not move with the machine's load."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from fastrunner import EMAHook, EpochBasedRunner, EvalHook, IterBasedRunner, TensorboardLoggerHook
from fastrunner.bench.tax import NEVER, NoopModel, NoopOptimizer

FIRST, LAST = 60, 160  # of the iterations that are looked at; nothing is due between them

# Python functions and C functions an iteration calls, the loop's included. A bare loop calls the first four of each.
BARE = {"train_step": 1, "zero_grad": 1, "<lambda>": 1, "clipped_step": 1}
PLAN = {"quiet": 1}
C_CALLS = {"perf_counter": 2, "append": 1, "len": 1, "copy": 1}
LOADER = {"__next__": 1}  # IterLoader's


class Watched(NoopModel):
    """Counts calls between its train_steps number FIRST and LAST, and what is left of allocations."""

    def __init__(self, allocations: bool):
        super().__init__()
        self.seen = SimpleNamespace(count=0)  # writing to a module itself calls more than is to be counted
        self.allocations, self.python, self.c = allocations, Counter(), Counter()

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.seen.count += 1
        if self.seen.count == FIRST:
            self.begin()
        elif self.seen.count == LAST:
            self.end()
        return self.outputs

    def begin(self):
        if self.allocations:
            gc.collect()
            self.blocks = sys.getallocatedblocks()
        else:
            sys.setprofile(self.profile)

    def end(self):
        if self.allocations:
            self.blocks = sys.getallocatedblocks() - self.blocks
        else:
            sys.setprofile(None)

    def profile(self, frame, event, arg):
        if event == "call":
            self.python[frame.f_code.co_name] += 1
        elif event == "c_call":
            self.c[arg.__name__] += 1


def everything():
    evaluation = EvalHook([{}], interval=NEVER, by_epoch=False, evaluate=lambda results: {})
    return [EMAHook(), evaluation, TensorboardLoggerHook(interval=NEVER, by_epoch=False)]


def watch(kind, allocations=False, hooks=()):
    model = Watched(allocations)
    optimizer = NoopOptimizer(model.parameters(), lr=0.1)
    length = dict(max_iters=200) if kind is IterBasedRunner else dict(max_epochs=1)
    runner = kind(model, optimizer=optimizer, logger=logging.Logger("quiet", logging.CRITICAL), **length)
    runner.register_training_hooks(
        dict(policy="step", step=[NEVER], by_epoch=False, warmup="linear", warmup_iters=20),
        dict(grad_clip=dict(max_norm=1.0)),
        dict(interval=1000, by_epoch=False, save_last=False),
        dict(interval=1000, hooks=[dict(type="TextLoggerHook", by_epoch=False)]),
    )
    for hook in hooks:
        runner.register_hook(hook)
    runner.run([[{}] * 200], [("train", 1)])
    return model


def an_iteration(counts: Counter) -> dict[str, float]:
    """Calls an iteration, without those that only the ends of the watch made."""
    return {name: count / (LAST - FIRST) for name, count in counts.items() if count >= LAST - FIRST}


@pytest.mark.parametrize(("kind", "loader"), [(EpochBasedRunner, {}), (IterBasedRunner, LOADER)], ids=["epoch", "iter"])
def test_calls_of_an_iteration(kind, loader):
    model = watch(kind)
    assert an_iteration(model.python) == {**BARE, **PLAN, **loader}
    c = an_iteration(model.c)
    c.pop("next", None)  # how the loader goes on
    assert c == C_CALLS


def test_an_average_costs_one_call_more_and_what_is_not_due_none():
    calls = an_iteration(watch(EpochBasedRunner, hooks=everything()).python)
    expected = {**BARE, **PLAN, "average_at": 1, "step": 1}
    del expected["clipped_step"]  # the step takes clip and average together
    assert calls == expected


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_what_an_iteration_leaves_behind_until_the_next_log(kind):
    """A row, the copy of log_vars in it, and two times: 4 blocks, or 5 with the dict's own table."""
    blocks = watch(kind, allocations=True).blocks / (LAST - FIRST)
    assert 4 <= blocks < 5.1
