"""The order of samples: a permutation, DistributedSampler's split, and a function of nothing but its arguments."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from fastrunner.data.order import BatchOrder, EpochSampler, epoch_indices, permute


@given(st.integers(1, 300), st.integers(1, 7), st.integers(0, 5), st.booleans(), st.booleans())
def test_ranks_together_see_what_distributed_sampler_gives(n, world_size, epoch, shuffle, drop_last):
    ranks = [
        epoch_indices(n, seed=3, epoch=epoch, rank=r, world_size=world_size, shuffle=shuffle, drop_last=drop_last)
        for r in range(world_size)
    ]
    theirs = [
        list(DistributedSampler(range(n), world_size, r, shuffle=False, drop_last=drop_last)) for r in range(world_size)
    ]
    if n < world_size and drop_last:  # torch repeats samples here; fewer samples than ranks leave nothing to share out
        assert all(len(rank) == 0 for rank in ranks)
        return
    assert [len(rank) for rank in ranks] == [len(rank) for rank in theirs]
    if not shuffle:
        assert [rank.tolist() for rank in ranks] == theirs
    seen = np.stack(ranks).T.reshape(-1)  # the global order
    assert set(seen[:n]) == set(range(n)) or drop_last
    assert len(set(seen)) == min(n, len(seen))


def test_pure_in_seed_and_epoch():
    first = epoch_indices(1000, seed=1, epoch=2)
    np.random.seed(99)  # the global generator has no say
    assert np.array_equal(first, epoch_indices(1000, seed=1, epoch=2))
    others = [epoch_indices(1000, seed=s, epoch=e) for s, e in ((1, 3), (2, 2), (2, 1), (-1, 2), (2**40, 2))]
    assert not any(np.array_equal(first, other) for other in others)


# How random it is.


@pytest.mark.parametrize("n", [3, 4, 5])
def test_small_orders_are_equally_frequent(n):
    orders = list(itertools.permutations(range(n)))
    keys = 20 * len(orders)
    seen = Counter(tuple(permute(np.arange(n), n, seed, 0).tolist()) for seed in range(keys))
    chi_square = sum((seen[order] - 20) ** 2 / 20 for order in orders)
    df = len(orders) - 1
    assert chi_square < df + 5 * np.sqrt(2 * df)  # five standard deviations above the mean


@pytest.mark.parametrize("n", [97, 1442, 4096])
def test_large_orders_show_no_pattern(n):
    orders = np.stack([permute(np.arange(n), n, 7, epoch) for epoch in range(100)])
    assert all(np.array_equal(np.sort(order), np.arange(n)) for order in orders)
    fixed = (orders == np.arange(n)).sum()  # one an order on average, as for random permutations
    followed = (np.diff(orders, axis=1) == 1).sum()
    assert abs(fixed - 100) < 50  # the sum of 100 counts that are nearly Poisson: five standard deviations
    assert abs(followed - 100) < 50
    neighbours = [np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders]
    epochs = [np.corrcoef(one, other)[0, 1] for one, other in itertools.pairwise(orders)]
    # standard error of the mean of 100 correlations of n numbers, each of mean -1/n: five of them
    assert abs(np.mean(neighbours) + 1 / n) < 5 / np.sqrt(100 * n)
    assert abs(np.mean(epochs)) < 5 / np.sqrt(99 * n)


# Batches.


@given(
    n=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_batches_are_the_epoch_cut_into_pieces(n, batch_size, world_size, drop_last, shuffle):
    for rank in range(world_size):
        order = BatchOrder(
            n, batch_size, seed=4, shuffle=shuffle, rank=rank, world_size=world_size, drop_last=drop_last
        )
        whole = epoch_indices(n, seed=4, epoch=3, shuffle=shuffle, rank=rank, world_size=world_size)
        got = [order.ids(3, position) for position in reversed(range(len(order)))][::-1]  # in any order
        pieces = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
        if drop_last and len(pieces[-1]) < batch_size:
            pieces.pop()
        assert [ids.tolist() for ids in got] == [piece.tolist() for piece in pieces]


@given(
    n=st.integers(1, 150),
    before=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    after=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    data=st.data(),
)
def test_another_number_of_ranks_goes_on_in_the_same_order(n, before, after, data):
    def world(geometry):
        batch_size, world_size = geometry
        return [BatchOrder(n, batch_size, seed=9, rank=r, world_size=world_size) for r in range(world_size)]

    def seen(order, start, epoch=2):
        return [order.ids(epoch, position).tolist() for position in range(start, order.num_batches(epoch))]

    first = world(before)
    position = data.draw(st.integers(0, len(first[0])))
    samples = {order.samples_before(2, position) for order in first}
    assert len(samples) == 1  # all ranks say the same
    done = min(samples.pop(), n)
    second = world(after)
    starts = {order.go_on(2, done) for order in second}
    assert len(starts) == 1
    start = starts.pop()
    rests = [list(itertools.chain(*seen(order, start))) for order in second]
    interleaved = [rests[i % len(rests)][i // len(rests)] for i in range(sum(map(len, rests)))]
    whole = epoch_indices(n, seed=9, epoch=2).tolist()
    assert interleaved[: n - done] == whole[done:]  # what follows are the samples that make the shares equal
    assert len(interleaved) - (n - done) < len(second)
    # A third run goes on from the second one's middle: what it has seen counts from the epoch's true beginning.
    if start < second[0].num_batches(2):
        assert second[0].samples_before(2, start + 1) == done + second[0].stride


def test_a_hundred_million_samples_take_no_memory():
    order = BatchOrder(100_000_000, 64, seed=1)
    ids = order.ids(0, 1_000_000)
    assert len(set(ids.tolist())) == 64
    assert ids.min() >= 0
    assert ids.max() < 100_000_000
    assert order._block[1].nbytes <= 32 * 1024
    places = np.array([0, 12_345_678, 99_999_999])
    assert len(set(permute(places, 100_000_000, 1, 0).tolist())) == 3


def test_the_sampler_runs_one_epoch_after_the_other():
    order = BatchOrder(10, 4, seed=5)
    sampler = EpochSampler(order)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs == [epoch_indices(10, seed=5, epoch=epoch).tolist() for epoch in range(3)]
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    assert len(sampler) == 10


@pytest.mark.parametrize("arguments", [dict(num_samples=0), dict(num_samples=3, rank=2, world_size=2)])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match=r"samples|rank"):
        epoch_indices(seed=0, epoch=0, **arguments)


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        BatchOrder(3, 0, seed=0)
    with pytest.raises(IndexError, match="no batch 2 in epoch 1: it has 2"):
        BatchOrder(3, 2, seed=0).ids(1, 2)
