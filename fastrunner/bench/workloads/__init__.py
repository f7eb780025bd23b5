"""What the bench trains: tables of models, data sets and loaders. A new one is a line here, a function beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Subset

from ...data import ArrayDataset, Digits, Photos, build_dataloader
from .models import cnn, mlp

# name -> factory(channels, size, classes): uint8 images (N, channels, size, size) -> scores (N, classes)
MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {"cnn": cnn, "mlp": mlp}


@dataclass(frozen=True)
class Data:
    """A data set with two splits: how it is opened, what its images are, and who can read it, the default first."""

    open: Callable[[str], Any]
    channels: int
    size: int
    loaders: tuple[str, ...]


DATA = {
    "photos": Data(Photos, 3, 64, ("dali", "dataloader")),
    "digits": Data(Digits, 1, 8, ("memory", "dataloader")),
}
LOADERS = ("dali", "dataloader", "memory")


def make_loader(dataset: Any, loader: str, *, batch_size: int, num_workers: int, train: bool, seed: int) -> Any:
    """A source of batches. Training shuffles and drops the last, incomplete batch, so that all iterations are alike."""
    if loader == "memory":  # one gather a batch: nothing that a thread could do meanwhile
        dataset, num_workers = ArrayDataset({"img": dataset.images, "gt_label": dataset.labels}), 0
    if loader == "dataloader":
        dataset = Subset(dataset, range(len(dataset)))  # hides the data set's own loader
    return build_dataloader(dataset, batch_size, num_workers, shuffle=train, seed=seed, drop_last=train)


__all__ = ["DATA", "LOADERS", "MODELS", "Data", "make_loader"]
