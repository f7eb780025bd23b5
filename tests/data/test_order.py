"""The order of samples: a permutation, DistributedSampler's split, and a function of nothing but its arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from fastrunner.data.order import EpochSampler, epoch_indices


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
    others = [epoch_indices(1000, seed=s, epoch=e) for s, e in ((1, 3), (2, 2), (2, 1))]
    assert not any(np.array_equal(first, other) for other in others)


def test_sampler_starts_anywhere_and_goes_on_by_itself():
    whole = EpochSampler(10, seed=5)
    epochs = [list(whole) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    other = EpochSampler(10, seed=5)
    other.seek(1, 4)
    assert list(other) == epochs[1][4:]
    assert list(other) == epochs[2]
    assert len(other) == 10


@pytest.mark.parametrize("arguments", [dict(num_samples=0), dict(num_samples=3, rank=2, world_size=2)])
def test_bad_input(arguments):
    with pytest.raises(ValueError, match=r"samples|rank"):
        epoch_indices(seed=0, epoch=0, **arguments)
