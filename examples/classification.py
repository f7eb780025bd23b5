"""What the example configs import: a small CNN in MODELS."""

from __future__ import annotations

from torch import Tensor, nn

from fastrunner import MODELS, supervised


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
