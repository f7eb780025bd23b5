"""The ring: order, memory that is not taken from its holder, errors, and threads that end."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from fastrunner.data.ring import HELD, Ring, allocate

SHAPES = {"x": ((3, 5), np.float32), "i": ((3,), np.int64)}


def fill(memory, job):
    memory["x"][:] = job
    memory["i"][:] = job
    return {name: torch.from_numpy(array) for name, array in memory.items()}


def make(fill=fill, *, num_threads=2, ahead=2):
    return Ring(lambda: allocate(SHAPES), fill, num_threads=num_threads, ahead=ahead)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastrunner-ring")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    gc.collect()
    assert threads() == []


def take(ring, count):
    got = []
    for _ in range(count):
        batch = ring.take()
        assert len(set(batch["x"].flatten().tolist())) == 1
        got.append(int(batch["i"][0]))
        assert got[-1] == batch["x"][0, 0]
    return got


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("ahead", [1, 4])
def test_batches_come_in_the_order_of_their_jobs(num_threads, ahead):
    ring = make(num_threads=num_threads, ahead=ahead)
    ring.start(range(200))
    assert take(ring, 200) == list(range(200))
    ring.start(range(7, 20))  # half-way: the rest is dropped
    assert take(ring, 3) == [7, 8, 9]
    ring.start(range(5))
    assert take(ring, 5) == list(range(5))
    ring.close()


def test_memory_goes_around():
    ring = make(num_threads=1, ahead=1)
    ring.start(range(40))
    addresses = set()
    for _ in range(40):
        batch = ring.take()
        addresses.add(batch["x"].data_ptr())
        assert batch["x"].data_ptr() % 64 == 0
        del batch
    assert len(addresses) <= ring.num_slots
    ring.close()


KEEP = [lambda batch: batch["x"], lambda batch: batch["x"][1:, 2], lambda batch: batch["x"].numpy()]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("keep", KEEP)
def test_who_keeps_a_batch_keeps_it(keep, view):
    def fill_view(memory, job):
        return {name: tensor[:] for name, tensor in fill({k: v[:2] for k, v in memory.items()}, job).items()}

    ring = make(fill_view if view else fill)
    ring.start(range(30))
    kept = [keep(ring.take()) for _ in range(30)]
    for number, part in enumerate(kept):
        assert (np.asarray(part) == number).all()
    ring.close()


def test_what_autograd_saved_is_kept_too():
    ring = make()
    ring.start(range(1, 10))
    weight = torch.ones(5, requires_grad=True)
    losses = [(ring.take()["x"] * weight).sum() for _ in range(9)]
    sum(losses).backward()
    assert weight.grad.tolist() == [3.0 * sum(range(1, 10))] * 5
    ring.close()


def test_threads_stop_ahead_of_a_slow_taker():
    made = []
    ring = make(lambda memory, job: made.append(job) or fill(memory, job), num_threads=1, ahead=2)
    ring.start(range(100))
    take(ring, 1)
    wait_for(lambda: len(made) == ring.num_slots)
    assert ring.num_ready == ring.num_slots - 1
    take(ring, 2)  # the first batches are nobody's now, but more than half of what can lie ready is left
    assert ring.num_ready == ring.num_slots - 3
    take(ring, 1)
    wait_for(lambda: len(made) == ring.num_slots + 3)
    assert made == list(range(ring.num_slots + 3))
    ring.close()
    assert HELD == 2


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_stats_tell_waiting_from_being_ready():
    ring = make(num_threads=1, ahead=2)
    ring.start(range(5))
    wait_for(lambda: ring.num_ready == 5)
    take(ring, 5)
    assert (ring.stats.batches, ring.stats.waited, ring.stats.ready) == (5, 0, 5 + 4 + 3 + 2 + 1)
    gate = threading.Event()
    slow = make(lambda memory, job: gate.wait() and fill(memory, job), num_threads=1)
    slow.start(range(1))
    threading.Timer(0.02, gate.set).start()
    take(slow, 1)
    assert slow.stats.waited == 1
    assert slow.stats.waited_s > 0
    ring.close()
    slow.close()


def explode_at(n):
    def filler(memory, job):
        if job == n:
            raise KeyError(f"job {n}")
        return fill(memory, job)

    return filler


def jobs_that_fail():
    yield from range(3)
    raise OSError("no more jobs")


def test_an_error_comes_when_its_batch_would():
    ring = make(explode_at(3))
    ring.start(range(10))
    assert take(ring, 3) == [0, 1, 2]
    with pytest.raises(KeyError, match="job 3"):
        ring.take()
    ring.close()
    ring = make()
    ring.start(jobs_that_fail())
    assert take(ring, 3) == [0, 1, 2]
    with pytest.raises(OSError, match="no more jobs"):
        ring.take()
    ring.close()


def test_nobody_waits_for_ever():
    ring = make()
    with pytest.raises(RuntimeError, match="not started"):
        ring.take()
    ring.start(range(1))
    take(ring, 1)
    with pytest.raises(RuntimeError, match="no further batch"):
        ring.take()
    ring.close()
    ring.close()


def test_a_ring_that_is_dropped_ends_its_threads_and_frees_its_memory():
    ring = make()
    ring.start(range(100))
    batch = ring.take()
    memory = weakref.ref(batch["x"].untyped_storage())
    running = threads()
    assert len(running) == 2
    del ring, batch
    for thread in running:
        thread.join(60)
        assert not thread.is_alive()
    assert memory() is None


def test_bad_counts():
    with pytest.raises(ValueError, match="must be >= 1, got 0 and 2"):
        make(num_threads=0)


@pytest.mark.cuda
def test_pinned_slots_wait_for_the_copies_out_of_them():
    shapes = {"x": ((64, 1 << 16), np.float32)}

    def filler(memory, job):
        memory["x"][:] = job
        return torch.from_numpy(memory["x"])

    ring = Ring(lambda: allocate(shapes, pinned=True), filler, num_threads=2, ahead=1, pinned=True)
    ring.start(range(50))
    copies = []
    for _ in range(50):
        batch = ring.take()
        assert batch.is_pinned()
        copies.append(batch.to("cuda", non_blocking=True))
    for number, copy in enumerate(copies):
        assert (copy == number).all()
    ring.close()
