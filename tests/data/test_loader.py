"""IterLoader, seeking, and build_dataloader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastrunner import ArrayDataset, IterLoader, build_dataloader
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


def joined(loader):
    return [i for batch in loader for i in batch.tolist()]


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


def test_state_in_any_number_of_batches_and_ranks():
    whole = IterLoader(build_dataloader(Numbers(), 2, 0, seed=7))
    for _ in range(8):
        next(whole)
    state = whole.state_dict()
    assert state == {"epoch": 1, "position": 3, "samples": 6, "num_samples": 10, "seed": 7}
    rest = [next(whole).tolist() for _ in range(7)]
    same = IterLoader(build_dataloader(Numbers(), 2, 0, seed=1))
    same.load_state_dict(state)
    assert [next(same).tolist() for _ in range(7)] == rest
    assert same.state_dict() == whole.state_dict()
    wider = IterLoader(build_dataloader(Numbers(), 4, 0, seed=1))
    wider.load_state_dict(state)
    assert next(wider).tolist() == [*rest[0], *rest[1]]
    assert whole.state_dict(unused=1) == {**whole.state_dict(), "position": 4, "samples": 8}


def test_batches_of_another_size_go_on_again_within_their_first_batch():
    order = joined(build_dataloader(Numbers(), 2, 0, seed=7))
    wide = build_dataloader(Numbers(), 8, 0, seed=7)
    wide.load_state_dict(build_dataloader(Numbers(), 2, 0, seed=7).state_at(0, 2))
    state = wide.state_dict()
    assert (state["position"], state["samples"]) == (0, 4)
    for batch_size in (3, 8):
        again = build_dataloader(Numbers(), batch_size, 0, seed=7)
        again.load_state_dict(state)
        assert joined(again) == order[4:]
        again.load_state_dict(again.state_at(1, 0))  # and epochs that begin by themselves are whole
        assert sorted(joined(again)) == list(range(10))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbers, lambda n: ArrayDataset(dict(x=np.arange(n)))], ids=["torch", "arrays"])
def test_a_loader_at_work_takes_a_state_of_batches_of_another_size(kind, num_workers):
    def flat(batches):
        return [int(i) for batch in batches for i in (batch["x"] if isinstance(batch, dict) else batch)]

    order = flat(build_dataloader(kind(40), 2, 0, seed=7))
    loader = build_dataloader(kind(40), 4, num_workers, seed=7)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    loader.load_state_dict(build_dataloader(kind(40), 6, 0, seed=7).state_at(0, 3))  # 18 samples: position 4 as well
    assert flat(loader) == order[18:]
    loader.close()


def test_state_of_data_that_has_grown(caplog):
    state = build_dataloader(Numbers(10), 2, 0, seed=7).state_at(0, 3)
    loader = build_dataloader(Numbers(12), 2, 0, seed=7)
    loader.load_state_dict(state)
    assert "had 10 samples when this was saved, and has 12 now" in caplog.text
    assert (loader.epoch, loader.position) == (0, 3)


def test_each_iter_is_the_next_epoch_unless_a_seek_came_before():
    loader = build_dataloader(Numbers(), 5, 0, seed=7)
    epochs = epochs_of(loader, 3)
    loader.set_epoch(1)
    assert next(iter(loader)).tolist() == epochs[1][0]
    assert epochs_of(loader, 1) == [epochs[2]]
    loader.seek(1, 1)
    assert (loader.epoch, loader.position) == (1, 1)
    assert epochs_of(loader, 1) == [epochs[1][1:]]
    assert (loader.epoch, loader.position) == (1, 2)  # until somebody asks for the next
    loader.set_epoch(1)
    assert epochs_of(loader, 1) == [epochs[2]]
    with pytest.raises(ValueError, match="no batch 3 in epoch 1: an epoch has 2 batches"):
        loader.seek(1, 3)


def test_two_loops_over_one_loader():
    loader = build_dataloader(Numbers(), 2, 0, seed=7)
    alone = IterLoader(build_dataloader(Numbers(), 2, 0, seed=7))
    wanted = [next(alone).tolist() for _ in range(8)]
    one, other = IterLoader(loader), IterLoader(loader)
    taken = [(next(one).tolist(), next(other).tolist()) for _ in range(8)]
    assert taken == [(batch, batch) for batch in wanted]
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(RuntimeError, match=r"no longer valid: .* need a loader each"):
        next(first)


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
