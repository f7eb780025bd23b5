"""MMCV's older way: a function that runs the model, in both runners, for training and validation."""

from __future__ import annotations

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn

from fastrunner import EpochBasedRunner, FusedSGD, IterBasedRunner


@pytest.mark.parametrize("kind", [EpochBasedRunner, IterBasedRunner])
def test_a_batch_processor_does_what_train_step_does(kind):
    modes = []

    def batch_processor(model, data_batch, train_mode, **kwargs):
        modes.append((train_mode, model.training, torch.is_grad_enabled()))
        loss = model(data_batch).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(data_batch))

    def train(model, processor):
        torch.manual_seed(0)
        nn.init.normal_(model.weight if processor else model.layer.weight)
        (model if processor else model.layer).bias.data.zero_()
        length = dict(max_epochs=2) if kind is EpochBasedRunner else dict(max_iters=6)
        runner = kind(model, processor, FusedSGD(model.parameters(), lr=0.1), **length)
        runner.register_optimizer_hook(dict(grad_clip=dict(max_norm=1.0)))
        runner.run([batches(), batches(1)], [("train", 1), ("val", 1)])
        return [p.tolist() for p in model.parameters()]

    expected = train(TinyModel(), None)
    with pytest.warns(DeprecationWarning, match="batch_processor is deprecated"):
        assert train(nn.Linear(2, 1), batch_processor) == expected
    assert set(modes) == {(True, True, True), (False, False, False)}
