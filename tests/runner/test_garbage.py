"""Python's collector is given back as it was found, and garbage does not pile up."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
from runner.helpers import TinyModel, batches

from fastrunner import FusedSGD, IterBasedRunner
from fastrunner.runner import garbage
from fastrunner.runner.garbage import Garbage


@pytest.fixture(autouse=True)
def as_it_was():
    gc.collect()
    yield
    gc.unfreeze()
    gc.enable()


def run(monkeypatch, model=None, iters=600, fail=False):
    monkeypatch.setattr(garbage, "WARM_UP_S", 0.0)
    model = model or TinyModel()
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=iters)
    runner.register_training_hooks(None, {}, None, None)
    runner.run([batches()], [("train", 1)])


class Frozen(TinyModel):
    seen = 0

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.seen = self.seen or gc.get_freeze_count()  # counts by walking through all of them
        return super().train_step(data_batch, optimizer, **kwargs)


def test_the_heap_is_frozen_during_the_run_and_given_back(monkeypatch):
    before, model = (gc.isenabled(), gc.get_threshold()), Frozen()
    run(monkeypatch, model)
    assert model.seen > 10_000
    assert gc.get_freeze_count() == 0
    assert (gc.isenabled(), gc.get_threshold()) == before


class Breaks(Frozen):
    def train_step(self, data_batch, optimizer=None, **kwargs):
        if gc.get_freeze_count():
            raise KeyboardInterrupt
        return super().train_step(data_batch, optimizer, **kwargs)


def test_it_is_given_back_when_a_run_breaks(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, Breaks())
    assert gc.get_freeze_count() == 0


def test_what_the_user_froze_or_switched_off_stays(monkeypatch):
    gc.freeze()
    frozen = gc.get_freeze_count()
    run(monkeypatch)
    assert gc.get_freeze_count() == frozen
    gc.unfreeze()
    gc.disable()
    model = Frozen()
    run(monkeypatch, model)
    assert model.seen == 0
    assert not gc.isenabled()


class Cyclic(TinyModel):
    """Leaves a reference cycle in every iteration."""

    def __init__(self):
        super().__init__()
        self.most, self.alive = 0, weakref.WeakSet()

    def train_step(self, data_batch, optimizer=None, **kwargs):
        class Node:
            pass

        node = Node()
        node.me = node
        self.alive.add(node)
        self.most = max(self.most, len(self.alive))
        return super().train_step(data_batch, optimizer, **kwargs)


def cycle():
    class Node:
        pass

    node = Node()
    node.me = node
    return weakref.ref(node)


@pytest.mark.parametrize("ago", [0.0, 2 * garbage.JUST_S], ids=["swept just now", "swept long ago"])
def test_what_an_earlier_run_left_is_swept(monkeypatch, ago):
    left = cycle()
    gc.collect(1)  # what is left may be young: it is to be old
    left = [cycle(), left]
    gc.freeze()
    gc.unfreeze()  # puts everything into the oldest generation, as time would
    monkeypatch.setattr(Garbage, "last_sweep", time.perf_counter() - ago)
    run(monkeypatch, Collected(left))


class Collected(TinyModel):
    """Its third iteration, behind the first look after warm-up, sees whether anything is left."""

    def __init__(self, left):
        super().__init__()
        self.left, self.calls = left, 0

    def train_step(self, data_batch, optimizer=None, **kwargs):
        self.calls += 1
        if self.calls == 600:
            assert [ref() for ref in self.left] == [None, None]
            assert gc.get_freeze_count() > 10_000
        return super().train_step(data_batch, optimizer, **kwargs)


def test_a_first_run_looks_through_nothing_old(monkeypatch):
    sizes = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: sizes.append((generation, len(gc.get_objects(2)))))
    monkeypatch.setattr(Garbage, "last_sweep", None)
    run(monkeypatch)
    assert sizes[0][0] == 1
    assert [count < 1000 for generation, count in sizes if generation == 2] == [True]


def test_cycles_are_collected_as_soon_as_without_us(monkeypatch):
    ours, plain = Cyclic(), Cyclic()
    run(monkeypatch, ours, iters=2000)
    monkeypatch.setattr(Garbage, "look", lambda self: None)
    run(monkeypatch, plain, iters=2000)
    assert 0 < ours.most <= plain.most + 1
