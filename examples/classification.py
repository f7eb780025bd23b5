"""What the example configs import: a small CNN in MODELS, and data sets that can be evaluated in DATASETS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastrunner import DATASETS, MODELS, Digits, Photos, supervised


class Scale(nn.Module):
    """Bytes to numbers around 0: a batch travels as bytes."""

    def forward(self, img: Tensor) -> Tensor:
        return (img.float() - 128) / 64


@MODELS.register_module()
def SmallCNN(channels: int, classes: int = 10, widths: tuple[int, ...] = (16, 32)) -> nn.Module:  # a type
    """Convolutions that halve the image, a global mean, a linear layer; cross-entropy."""
    layers: list[nn.Module] = [Scale()]
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, classes)]
    return supervised(nn.Sequential(*layers), nn.CrossEntropyLoss())


class Accuracy:
    """``evaluate`` as EvalHook calls it: ``results`` has the scores of every sample, in order."""

    labels: Tensor

    def evaluate(self, results: list[Tensor], logger: Any = None) -> dict[str, float]:
        predicted = torch.stack(results).argmax(1).cpu()
        return {"acc": (predicted == self.labels).float().mean().item()}


@DATASETS.register_module()
class ScoredDigits(Accuracy, Digits):
    pass


@DATASETS.register_module()
class ScoredPhotos(Accuracy, Photos):
    pass
