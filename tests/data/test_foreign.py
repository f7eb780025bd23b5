"""Loaders of the user's own: an epoch is begun in its middle without loading what came before."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fastrunner import IterLoader
from fastrunner.data.loader import as_loader, start_epoch


class Numbers(Dataset):
    def __init__(self, n: int = 10) -> None:
        self.n, self.asked = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        self.asked.append(i)
        return i


class NumpySampler(Sampler):
    """As mmdet's GroupSampler: numpy's global generator decides."""

    def __len__(self):
        return 10

    def __iter__(self):
        return iter(np.random.permutation(10).tolist())


class Remembers(Sampler):
    """Its order follows from a counter of its own, which it can save."""

    def __init__(self):
        self.runs = 0

    def __len__(self):
        return 10

    def __iter__(self):
        self.runs += 1
        return iter(torch.randperm(10, generator=torch.Generator().manual_seed(self.runs)).tolist())

    def state_dict(self):
        return {"runs": self.runs}

    def load_state_dict(self, state):
        self.runs = state["runs"]


CASES = {
    "shuffle": lambda data: DataLoader(data, 2, shuffle=True),
    "generator": lambda data: DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "subset": lambda data: DataLoader(data, 2, sampler=SubsetRandomSampler(range(10))),
    "weighted": lambda data: DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "distributed": lambda data: DataLoader(data, 2, sampler=DistributedSampler(range(10), 1, 0, seed=1)),
    "numpy": lambda data: DataLoader(data, 2, sampler=NumpySampler()),
    "state_dict": lambda data: DataLoader(data, 2, sampler=Remembers()),
    "workers": lambda data: DataLoader(data, 2, shuffle=True, num_workers=2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop_at", [3, 8, 10])
def test_a_resumed_loader_gives_the_batches_that_were_to_come(case, stop_at, caplog):
    torch.manual_seed(1)
    np.random.seed(1)
    whole = IterLoader(CASES[case](Numbers()))
    taken = []
    for i in range(13):
        if i == stop_at:
            state = whole.state_dict()
            generators = torch.get_rng_state(), np.random.get_state()
        taken.append(next(whole).tolist())
    torch.manual_seed(2)
    dataset = Numbers()
    source = CASES[case](dataset)
    torch.set_rng_state(generators[0])
    np.random.set_state(generators[1])
    resumed = IterLoader(source)
    resumed.load_state_dict(state)
    with caplog.at_level(logging.INFO, "fastrunner"):
        rest = [next(resumed).tolist() for _ in range(13 - stop_at)]
    assert rest == taken[stop_at:]
    if case != "workers":
        assert len(dataset.asked) == 2 * (13 - stop_at)  # nothing that came before was loaded
    assert ("ran the sampler over 3 batches in " in caplog.text) == (stop_at % 5 == 3)


@pytest.mark.parametrize("case", ["generator", "state_dict"])
def test_a_loader_goes_on_between_epochs(case):
    whole = as_loader(CASES[case](Numbers()))
    list(whole.start(0))
    state = whole.state_at(1, 0)
    wanted = [batch.tolist() for batch in whole.start(1)]
    resumed = as_loader(CASES[case](Numbers()))
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed.start(1)] == wanted


def test_iterable_data_sets_are_walked(caplog):
    class Stream(IterableDataset):
        made = 0

        def __len__(self):
            return 6

        def __iter__(self):
            for i in range(6):
                self.made += 1
                yield i

    stream = Stream()
    with caplog.at_level(logging.INFO, "fastrunner"):
        assert next(start_epoch(DataLoader(stream, 2), 0, 2)).tolist() == [4, 5]
    assert stream.made == 6
    assert "made and dropped 2 batches in " in caplog.text


def test_a_source_that_can_seek_does_it_itself():
    class Seeks(list):
        seed = 3

        def seek(self, epoch, position):
            self.place = (epoch, position)

    source = Seeks([1, 2, 3])
    loader = as_loader(source)
    loader.prefetch_over_epoch_end = True  # it does not know
    assert not hasattr(source, "prefetch_over_epoch_end")
    source.prefetch_over_epoch_end = False
    loader.prefetch_over_epoch_end = True
    assert source.prefetch_over_epoch_end
    loader.start(2, 1)
    assert source.place == (2, 1)
    assert loader.state_dict() == {"epoch": 2, "position": 1, "seed": 3}
    loader.load_state_dict({"epoch": 0, "position": 2, "seed": np.int64(5)})
    assert source.seed == 5


def test_a_source_shorter_than_the_position_to_resume_at():
    class Shrinks(DistributedSampler):
        def __iter__(self):
            return iter([0, 1])

    for source, position in (([1, 2, 3], 4), (DataLoader(Numbers(8), 2, sampler=Shrinks(range(8), 1, 0)), 3)):
        with pytest.raises(ValueError, match=r"gave only [13] batches; resume with the data it was saved with"):
            start_epoch(source, epoch=0, position=position)
