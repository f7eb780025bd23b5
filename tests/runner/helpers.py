"""Small parts for runner tests."""

from __future__ import annotations

import torch
from torch import nn


class TinyModel(nn.Module):
    """Linear(2, 1) whose loss is the mean square of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def train_step(self, data_batch, optimizer=None, **kwargs):
        loss = self.layer(data_batch).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(data_batch))

    val_step = train_step


def batches(n: int = 3, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 2, generator=generator) for _ in range(n)]
