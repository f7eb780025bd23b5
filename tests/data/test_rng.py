"""Numbers that follow from (seed, epoch, index), and generators that are put back as they were."""

from __future__ import annotations

import random

import numpy as np
import torch

from fastrunner.data.rng import (
    capture,
    from_plain,
    generators_kept,
    mix,
    plain,
    put_back,
    sample_seed,
    seed_sample,
    streams,
    uniforms,
)


def test_mix_is_splitmix64():
    # First outputs of SplitMix64 started from 1234567, as published with Rosetta Code's task "SplitMix64".
    states = np.uint64(1234567) + np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_uniforms_depend_on_seed_epoch_and_index_only():
    ids = np.array([7, 3, 100_000_000])
    numbers = uniforms(1, 2, ids, 5)
    assert np.array_equal(numbers[[1]], uniforms(1, 2, ids[[1]], 5))  # not on the neighbours
    for other in (uniforms(2, 2, ids, 5), uniforms(1, 3, ids, 5), uniforms(2, 1, ids, 5)):
        assert not np.isin(numbers, other).any()


def test_uniforms_are_uniform():
    numbers = uniforms(0, 0, np.arange(20_000), 5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # 5 standard errors of the mean of 20,000 uniform numbers, sqrt(1/12/20000) = 0.002
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.01
    correlations = np.corrcoef(np.vstack([numbers[:-1].T, numbers[1:].T])) - np.eye(10)
    assert np.abs(correlations).max() < 5 / np.sqrt(20_000)  # between columns, and between neighbouring samples


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_one_seed_and_many_are_the_same_numbers():
    indices = [0, 1, 7, 2**40]
    many = streams(5, 2, np.array(indices)).tolist()
    assert [sample_seed(5, 2, index) for index in indices] == many


def test_a_sample_is_seeded_by_seed_epoch_and_index():
    def drawn(*args):
        seed_sample(*args)
        return draw()

    first = drawn(1, 2, 3)
    assert drawn(1, 2, 3) == first
    numbers = [first, *(drawn(*args) for args in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (-1, 0, 2**40)))]
    assert len({number for row in numbers for number in row}) == 20


def test_generators_are_kept():
    random.gauss(0, 1)  # leaves a second number behind, which is part of the state
    np.random.randn()
    state = capture()
    wanted = draw()
    put_back(state)
    with generators_kept():
        seed_sample(0, 0, 0)
        draw()
    assert draw() == wanted
    put_back(from_plain(plain(state)))
    assert draw() == wanted
