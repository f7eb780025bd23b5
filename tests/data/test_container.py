"""DataContainer, collate and scatter: what MMCV's goldens do not say, and bad input."""

from __future__ import annotations

from collections import namedtuple
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastrunner import DataContainer, build_dataloader, collate, scatter
from fastrunner.data.container import scatter_kwargs

Pair = namedtuple("Pair", "image label")


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5), count=st.integers(1, 6))
def test_padding_keeps_every_value_and_adds_only_padding(sizes, count):
    batch = [DataContainer(torch.rand(3, *size), stack=True, padding_value=-1.0) for size in sizes]
    collated = collate(batch, samples_per_gpu=count)
    assert [len(group) for group in collated.data] == [len(batch[i : i + count]) for i in range(0, len(batch), count)]
    for i, (height, width) in enumerate(sizes):
        padded = collated.data[i // count][i % count]
        assert torch.equal(padded[:, :height, :width], batch[i].data)
        assert padded.eq(-1).sum() == padded.numel() - 3 * height * width


def test_a_data_loader_collates_strings_too():
    samples = [dict(img=DataContainer(torch.ones(1, 2, 2 + i), stack=True), name=f"{i}") for i in range(3)]
    (batch,) = DataLoader(samples, batch_size=3, collate_fn=partial(collate, samples_per_gpu=3))
    assert batch["img"].data[0].shape == (3, 1, 2, 4)
    assert batch["name"] == ["0", "1", "2"]


def test_build_dataloader_knows_containers():
    samples = [dict(img=DataContainer(torch.ones(1, 2, 2 + i), stack=True), y=i, pair=Pair(i, "a")) for i in range(4)]
    loader = build_dataloader(samples, samples_per_gpu=2, workers_per_gpu=0, num_gpus=2, shuffle=False)
    (batch,) = loader
    assert [tuple(part.shape) for part in batch["img"].data] == [(2, 1, 2, 3), (2, 1, 2, 5)]
    assert batch["y"].tolist() == [0, 1, 2, 3]
    assert batch["pair"].image.tolist() == [0, 1, 2, 3]
    (plain,) = build_dataloader([(torch.ones(2), 3)], 1, 0)
    assert (plain[0].shape, plain[1].tolist()) == ((1, 2), [3])


def test_container_tells_about_its_tensor():
    container = DataContainer(torch.zeros(2, 3))
    assert (container.size(), container.size(1), container.dim(), len(container)) == ((2, 3), 3, 2, 2)
    assert container.datatype == "torch.FloatTensor"
    assert repr(DataContainer([1])) == "DataContainer([1])"
    with pytest.raises(AttributeError, match="no attribute size for type <class 'list'>"):
        DataContainer([1]).size()


@pytest.mark.parametrize(
    ("batch", "error", "says"),
    [
        (3, TypeError, "a sequence of samples, got int"),
        ([DataContainer([1], stack=True)], TypeError, "only tensors can be stacked, got a list"),
        (
            [DataContainer(torch.ones(2, 1, 1), stack=True), DataContainer(torch.ones(3, 1, 1), stack=True)],
            ValueError,
            r"\(2, 1, 1\), \(3, 1, 1\).*last 2 dimensions",
        ),
        ([DataContainer(torch.ones(2), stack=True)], ValueError, "last 2 dimensions"),
    ],
)
def test_bad_batches(batch, error, says):
    with pytest.raises(error, match=says):
        collate(batch, samples_per_gpu=2)


def test_bad_pad_dims():
    with pytest.raises(ValueError, match="pad_dims must be None, 1, 2 or 3, got 4"):
        DataContainer(torch.ones(1), pad_dims=4)


def test_scatter_to_the_cpu_copies_nothing():
    image, metas = torch.ones(2, 3), [dict(name="a")]
    batch = dict(img=DataContainer([image]), metas=DataContainer([metas], cpu_only=True), pair=Pair(image, 3), n=4)
    (got,) = scatter(batch, [-1])
    assert got["img"] is image
    assert got["metas"] is metas
    assert got["pair"] == Pair(image, 3)
    assert type(got["pair"]) is Pair
    assert got["n"] == 4


def test_containers_for_other_devices_are_an_error():
    batch = collate([DataContainer(torch.ones(1, 1), stack=True) for _ in range(4)], samples_per_gpu=2)
    with pytest.raises(ValueError, match=r"2 entries cannot go to 1 device\(s\): collate\(batch, samples_per_gpu\)"):
        scatter(batch, [-1])
    with pytest.raises(ValueError, match="no list of entries"):
        scatter(DataContainer(torch.ones(1)), [-1])


def test_moving_looks_into_lists_tuples_and_dicts():
    batch = DataContainer([[torch.ones(1), (torch.ones(1), dict(a=torch.ones(1)), Pair(torch.ones(1), "x"))]])
    ((first, (second, third, pair)),) = scatter(batch, [torch.device("meta")])
    assert {first.device.type, second.device.type, third["a"].device.type, pair.image.device.type} == {"meta"}
    assert pair.label == "x"


def test_scatter_kwargs_gives_as_many_args_as_kwargs():
    assert scatter_kwargs((), {}, [-1]) == ((), ())
    assert scatter_kwargs((1,), {}, [-1]) == (((1,),), ({},))
    assert scatter_kwargs((), dict(a=1), [-1]) == (((),), (dict(a=1),))


@pytest.mark.cuda
def test_scatter_to_a_gpu():
    samples = [dict(img=DataContainer(torch.full((1, 2), i), stack=True, pad_dims=1)) for i in (1.0, 2.0)]
    loader = DataLoader(samples, batch_size=2, collate_fn=partial(collate, samples_per_gpu=2), pin_memory=True)
    (batch,) = loader
    assert batch["img"].data[0].is_pinned()
    (got,) = scatter(batch, [0])
    assert got["img"].device == torch.device("cuda", 0)
    assert got["img"].tolist() == [[[1.0, 1.0]], [[2.0, 2.0]]]
