"""TorchLoader: what torch's DataLoader does, plus a seek, plus samples that do not depend on the workers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastrunner import IterLoader, build_dataloader
from fastrunner.data.rng import capture


class Noisy(Dataset):
    """Sample i is i and noise from each global generator; knows which process made it."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        return dict(
            i=i, noise=torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), pid=os.getpid()
        )


class Together(Noisy):
    def __getitems__(self, indices: list[int]) -> list:
        return [self[i] for i in indices]


def take(loader, count):
    loader = IterLoader(loader)
    taken = [next(loader) for _ in range(count)]
    loader.close()
    return [(batch["i"].tolist(), batch["noise"].tolist()) for batch in taken]


@pytest.mark.parametrize("dataset", [Noisy(), Together()])
@pytest.mark.parametrize("options", [{}, dict(persistent_workers=True)])
def test_the_number_of_workers_changes_nothing(dataset, options):
    whole = take(build_dataloader(dataset, 4, 0, seed=7), 7)
    assert len({str(noise) for _, noise in whole}) == 7
    for workers in (1, 4):
        assert take(build_dataloader(dataset, 4, workers, seed=7, **options), 7) == whole
    assert take(build_dataloader(dataset, 4, 0, seed=8), 7) != whole


def test_a_sample_has_the_same_noise_in_any_batch_of_an_epoch():
    def by_sample(batch_size):
        batches = take(build_dataloader(Noisy(), batch_size, 0, seed=7), -(-10 // batch_size))
        return {i: noise for batch in batches for i, noise in zip(*batch, strict=True)}

    assert by_sample(2) == by_sample(5)


def test_without_workers_the_main_generators_stay_as_they_were():
    before = capture()
    loader = iter(build_dataloader(Noisy(), 4, 0, seed=7))
    next(loader)
    after = capture()
    assert before[0] == after[0]
    assert all(np.array_equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])


def test_seeding_is_an_option():
    torch.manual_seed(3)
    loader = build_dataloader(Noisy(), 4, 0, seed=7, seed_samples=False)
    got = [noise for batch in loader for noise in batch["noise"][:, 2].tolist()]
    torch.manual_seed(3)
    assert got == [torch.rand(()).item() for _ in range(10)]


@pytest.mark.parametrize("workers", [1, 2])
def test_where_it_may_the_next_epoch_is_made_early(workers):
    plain = take(build_dataloader(Noisy(), 2, 0, seed=7), 17)
    loader = build_dataloader(Noisy(), 2, workers, seed=7)
    loader.prefetch_over_epoch_end = True
    endless = IterLoader(loader)
    taken = [next(endless) for _ in range(17)]
    assert [(batch["i"].tolist(), batch["noise"].tolist()) for batch in taken] == plain
    pids = {pid for batch in taken for pid in batch["pid"].tolist()}
    assert len(pids) == workers  # the same processes in all four epochs
    assert (endless.epoch, endless.position) == (3, 2)
    loader.prefetch_over_epoch_end = False  # a hook has come: from the next epoch's end on nothing is made early
    rest = [next(endless)["i"].tolist() for _ in range(12)]
    assert rest == [i for i, _ in take(build_dataloader(Noisy(), 2, 0, seed=7), 29)[17:]]
    endless.close()
    assert multiprocessing.active_children() == []


def test_without_leave_every_epoch_has_workers_that_see_the_data_as_it_is():
    dataset = Noisy()
    loader = build_dataloader(dataset, 5, 1, seed=7)
    first = [batch["pid"][0].item() for batch in loader]
    second = [batch["pid"][0].item() for batch in loader]
    assert len(set(first)) == len(set(second)) == 1
    assert first != second
    stays = build_dataloader(dataset, 5, 1, seed=7, persistent_workers=True)
    assert len({batch["pid"][0].item() for _ in range(2) for batch in stays}) == 1


def test_idle_workers_do_not_outlive_their_epoch():
    loader = build_dataloader(Noisy(), 5, 2, seed=7)
    batches = list(loader)  # e.g. an evaluation's
    assert multiprocessing.active_children() == []
    assert len(batches) == 2
    endless = IterLoader(build_dataloader(Noisy(), 5, 1, seed=7))
    endless.prefetch_over_epoch_end = True
    for _ in range(3):
        next(endless)
    assert len(multiprocessing.active_children()) == 1
    endless.close()


def test_workers_are_gone_after_close_and_when_the_next_batch_brings_new_ones():
    loader = build_dataloader(Noisy(), 2, 2, seed=7, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="no longer valid"):
        next(batches)
    assert take(loader, 2) == take(build_dataloader(Noisy(), 2, 0, seed=7), 2)


class Explodes(Noisy):
    def __getitem__(self, i):
        if i == 5:
            raise ValueError(f"sample {i} is broken")
        return super().__getitem__(i)


class Ragged(Noisy):
    def __getitem__(self, i):
        return torch.zeros(2 + (i == 5))


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_different_shapes_are_an_error_in_the_main_thread(workers):
    with pytest.raises(RuntimeError, match="equal size"):
        list(build_dataloader(Ragged(), 2, workers, shuffle=False))
    assert multiprocessing.active_children() == []


class Dies(Noisy):
    def __getitem__(self, i):
        if i == 5 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_an_error_in_the_main_thread(workers):
    loader = build_dataloader(Explodes(), 2, workers, shuffle=False)
    with pytest.raises(ValueError, match="sample 5 is broken"):
        list(loader)
    assert multiprocessing.active_children() == []
    assert loader.position == 2  # the batch that failed comes next
    loader.seek(0, 3)
    assert [batch["i"].tolist() for batch in loader] == [[6, 7], [8, 9]]


def test_a_worker_that_is_killed_is_an_error_and_no_hang():
    loader = build_dataloader(Dies(), 2, 1, shuffle=False)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal|worker process of the loader died"):
        list(loader)
    assert time.monotonic() - begin < 60  # torch looks every 5 s; the margin is for a busy machine
    assert multiprocessing.active_children() == []


def test_it_is_a_dataloader_in_all_that_users_look_at():
    dataset = Noisy()
    loader = build_dataloader(dataset, 3, 0, num_gpus=2, collate_fn=list)
    assert isinstance(loader, DataLoader)
    assert loader.dataset is dataset
    assert loader.batch_size == 6
    assert loader.collate_fn is list
    assert len(loader.sampler) == 10
    assert [len(batch) for batch in loader] == [6, 4]  # batches as the collate function makes them: lists here


class InWorker(Noisy):
    files = ("a", "b")

    def __getitem__(self, i):
        info = get_worker_info()
        return i, info is not None and info.dataset.files == self.files


def test_a_worker_finds_the_data_set_in_its_info():
    assert all(found.all() for _, found in build_dataloader(InWorker(), 5, 1, multiprocessing_context="fork"))
