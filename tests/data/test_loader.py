"""IterLoader, seeking, and build_dataloader."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fastrunner import IterLoader, build_dataloader
from fastrunner.data.loader import start_epoch
from fastrunner.registry import DATASETS


class Numbers(Dataset):
    """Sample i is the number i; remembers what was asked for."""

    def __init__(self, n: int = 10) -> None:
        self.n, self.asked = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        self.asked.append(i)
        return i


def epochs_of(loader, count):
    return [[batch.tolist() for batch in loader] for _ in range(count)]


def test_iter_loader_over_a_list_counts_epochs_and_positions():
    loader = IterLoader(["a", "b", "c"])
    taken = [(next(loader), loader.epoch, loader.position) for _ in range(7)]
    assert taken == [("a", 0, 1), ("b", 0, 2), ("c", 0, 3), ("a", 1, 1), ("b", 1, 2), ("c", 1, 3), ("a", 2, 1)]
    assert len(loader) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("epoch", "position"), [(0, 0), (0, 3), (2, 1), (1, 4)])
def test_a_sought_loader_gives_what_the_uninterrupted_one_gives(epoch, position, num_workers):
    whole = IterLoader(build_dataloader(Numbers(), 2, 0, seed=7))
    batches = [next(whole).tolist() for _ in range(20)]
    dataset = Numbers()
    loader = IterLoader(build_dataloader(dataset, 2, num_workers, seed=7))
    loader.seek(epoch, position)
    start = epoch * 5 + position
    assert [next(loader).tolist() for _ in range(6)] == batches[start : start + 6]
    assert len(dataset.asked) <= 12  # nothing before the position was loaded


def test_the_end_of_an_epoch_is_a_position_too():
    whole = IterLoader(build_dataloader(Numbers(), 2, 0, seed=7))
    batches = [next(whole).tolist() for _ in range(7)]
    loader = IterLoader(build_dataloader(Numbers(), 2, 0, seed=7))
    loader.seek(0, 5)
    assert [next(loader).tolist() for _ in range(2)] == batches[5:7]
    assert loader.epoch == 1


def test_foreign_sources_are_walked_to_the_position_and_their_sampler_is_told_the_epoch():
    sampler = DistributedSampler(range(10), num_replicas=1, rank=0, shuffle=True, seed=1)
    loader = IterLoader(DataLoader(Numbers(), batch_size=2, sampler=sampler))
    batches = [next(loader).tolist() for _ in range(15)]
    assert batches[:5] != batches[5:10]  # set_epoch was called
    other = IterLoader(DataLoader(Numbers(), batch_size=2, sampler=DistributedSampler(range(10), 1, 0, seed=1)))
    other.seek(1, 2)
    assert [next(other).tolist() for _ in range(8)] == batches[7:]


def test_a_source_shorter_than_the_position_to_resume_at():
    with pytest.raises(ValueError, match="gave only 3 batches; resume with the data it was saved with"):
        start_epoch([1, 2, 3], epoch=0, position=4)


def test_a_source_that_lies_about_its_length():
    class Liar:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="gives no batch in epoch 1, though its length is 3"):
        next(IterLoader(Liar()))


def test_order_follows_torch_seed_unless_one_is_given():
    torch.manual_seed(11)
    first = epochs_of(build_dataloader(Numbers(), 5, 0), 2)
    torch.manual_seed(11)
    assert epochs_of(build_dataloader(Numbers(), 5, 0), 2) == first
    torch.manual_seed(12)
    assert epochs_of(build_dataloader(Numbers(), 5, 0), 2) != first
    assert epochs_of(build_dataloader(Numbers(), 5, 0, seed=11), 2) == first


def test_options():
    assert epochs_of(build_dataloader(Numbers(5), 2, 0, shuffle=False), 1) == [[[0, 1], [2, 3], [4]]]
    assert epochs_of(build_dataloader(Numbers(5), 2, 0, shuffle=False, drop_last=True), 1) == [[[0, 1], [2, 3]]]
    assert build_dataloader(Numbers(), 2, 0, num_gpus=2).batch_size == 4
    assert isinstance(build_dataloader(Numbers(), 2, 0), DataLoader)  # what EvalHook-like code checks for


def test_a_dict_is_built_and_a_data_set_may_bring_its_own_loader():
    class WithLoader(Numbers):
        def make_loader(self, **kwargs):
            return kwargs

    DATASETS.register_module(name="WithLoader", module=WithLoader, force=True)
    got = build_dataloader(dict(type="WithLoader", n=4), 3, 1, seed=5, drop_last=True)
    assert got == dict(batch_size=3, num_workers=1, shuffle=True, seed=5, rank=0, world_size=1, drop_last=True)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((Numbers(0), 2, 0), ValueError, "Numbers has no samples"),
        ((Numbers(), 0, 0), ValueError, "samples_per_gpu must be >= 1"),
        ((Numbers(), 2, -1), ValueError, "workers_per_gpu must be >= 0"),
        ((Numbers(), 2.0, 0), TypeError, "samples_per_gpu must be an int"),
        ((dict(type="Digit"), 2, 0), KeyError, "Digits"),
    ],
)
def test_bad_input(arguments, error, says):
    with pytest.raises(error, match=says):
        build_dataloader(*arguments)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [([], ValueError, "is empty"), (iter([1]), TypeError, "iterable with a length"), (7, TypeError, "with a length")],
)
def test_iter_loader_refuses(source, error, says):
    with pytest.raises(error, match=says):
        IterLoader(source)
