"""Small real models for uint8 images. They normalise on the device, so that a batch travels as bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """``body`` on normalised images.

        x = (img - 128) / 64

    Args:
        body: float images (N, C, H, W) -> scores (N, classes).
        channels_last: let images and weights lie channels last.
        amp_dtype: autocast to it; float32: no autocast.
    """

    def __init__(self, body: nn.Module, *, channels_last: bool = False, amp_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.body = body.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
        self.amp_dtype = amp_dtype

    def forward(self, img: Tensor) -> Tensor:
        """Scores, float32."""
        x = img.to(torch.float32, memory_format=self.memory_format).sub_(128).mul_(1 / 64)
        if self.amp_dtype == torch.float32:
            return self.body(x)  # type: ignore[no-any-return]
        with torch.autocast(img.device.type, dtype=self.amp_dtype):
            return self.body(x).float()  # type: ignore[no-any-return]


def cnn(channels: int, size: int, classes: int) -> nn.Module:
    """Three 3 x 3 convolutions (16, 32, 64) with batch norm, a global mean, a linear layer: 24,346 parameters for RGB
    and 10 classes. Each convolution halves the image, but for small ones not the first."""
    layers: list[nn.Module] = []
    for number, width in enumerate((16, 32, 64)):
        stride = 2 if number or size >= 32 else 1
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def mlp(channels: int, size: int, classes: int) -> nn.Module:
    """Two hidden layers of 128."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, 128),
        nn.ReLU(inplace=True),
        nn.Linear(128, 128),
        nn.ReLU(inplace=True),
        nn.Linear(128, classes),
    )
