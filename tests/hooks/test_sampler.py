"""DistSamplerSeedHook tells samplers the epoch."""

from __future__ import annotations

import pytest
from runner.helpers import TinyModel, batches
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from fastrunner import DistSamplerSeedHook, EpochBasedRunner, IterBasedRunner


@pytest.mark.parametrize("in_batch_sampler", [False, True])
def test_the_sampler_knows_the_epoch(in_batch_sampler):
    data = batches(1, 8)[0]
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    if in_batch_sampler:
        loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    else:
        loader = DataLoader(data, batch_size=4, sampler=sampler)
    runner = EpochBasedRunner(TinyModel(), max_epochs=3)
    runner.register_hook(DistSamplerSeedHook())
    runner.run([loader], [("train", 1)])
    assert sampler.epoch == 2


def test_other_loaders_and_the_iteration_runner_are_fine():
    runner = IterBasedRunner(TinyModel(), max_iters=3)
    runner.register_hook(DistSamplerSeedHook())
    runner.run([batches()], [("train", 1)])
