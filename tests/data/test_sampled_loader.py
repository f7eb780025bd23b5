"""build_dataloader with a sampler of the user's own, and over streams."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from fastrunner import IterLoader, build_dataloader


class Noisy(Dataset):
    made = 0

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.made += 1
        return i, torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


CASES = {
    "random": lambda: dict(sampler=RandomSampler(range(10))),
    "weighted": lambda: dict(sampler=WeightedRandomSampler([1.0, 2.0] * 5, 10)),
    "distributed": lambda: dict(sampler=DistributedSampler(range(10), 1, 0, seed=1)),
    "batches": lambda: dict(batch_sampler=BatchSampler(RandomSampler(range(10)), 3, drop_last=False)),
}


def take(loader, count):
    return [(batch[0].tolist(), batch[1].tolist()) for _, batch in zip(range(count), loader, strict=False)]


def whole(case, workers, count, **options):
    torch.manual_seed(3)
    loader = IterLoader(build_dataloader(Noisy(), 3, workers, seed=4, **CASES[case](), **options))
    taken = take(loader, count)
    loader.close()
    return taken


@pytest.mark.parametrize("case", CASES)
def test_workers_change_nothing_and_epochs_differ(case):
    plain = whole(case, 0, 9)
    assert whole(case, 2, 9) == plain
    first = {i: noise for ids, noises in plain[:4] for i, noise in zip(ids, noises, strict=True)}
    second = {i: noise for ids, noises in plain[4:8] for i, noise in zip(ids, noises, strict=True)}
    assert plain[:4] != plain[4:8]
    assert all(first[i] != second[i] for i in first.keys() & second.keys())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_runs_the_sampler_and_makes_no_sample_twice(case, workers):
    wanted = whole(case, workers, 12)
    torch.manual_seed(3)
    stopped = IterLoader(build_dataloader(Noisy(), 3, workers, seed=4, **CASES[case]()))
    take(stopped, 6)
    state, generator = stopped.state_dict(), torch.get_rng_state()
    stopped.close()
    torch.manual_seed(8)
    source = build_dataloader(Noisy(), 3, workers, seed=9, **CASES[case]())
    torch.set_rng_state(generator)
    resumed = IterLoader(source)
    resumed.load_state_dict(state)
    assert take(resumed, 6) == wanted[6:]
    assert workers or source.dataset.made == sum(len(ids) for ids, _ in wanted[6:])


def test_seeding_is_an_option():
    torch.manual_seed(3)
    plain = [batch[1] for batch in DataLoader(Noisy(), 3, sampler=RandomSampler(range(10)))]
    torch.manual_seed(3)
    loader = build_dataloader(Noisy(), 3, 0, sampler=RandomSampler(range(10)), seed_samples=False)
    assert all(torch.equal(batch[1][:, 2], other[:, 2]) for batch, other in zip(loader, plain, strict=True))


def test_streams_are_torchs():
    class Stream(IterableDataset):
        def __len__(self):
            return 7

        def __iter__(self):
            return iter(range(7))

    loader = IterLoader(build_dataloader(Stream(), 3, 0))
    assert [next(loader).tolist() for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]
    assert len(loader) == 3


def test_what_torch_refuses_is_refused():
    with pytest.raises(ValueError, match="batch_sampler"):
        build_dataloader(Noisy(), 3, 0, batch_sampler=[[0]], sampler=[0])
