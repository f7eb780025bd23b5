"""Twelve families of models, tiny, each with what makes its family hard to compile. ``ZOO``: name -> Family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Model(nn.Module):
    """train_step around a body that gives scores (..., classes)."""

    def __init__(self, body: nn.Module, amp: bool = False, lifts: bool = False) -> None:
        super().__init__()
        self.body, self.amp, self.lifts = body, amp, lifts

    def train_step(self, batch, optimizer=None, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.amp else nullcontext():
            scores = self.body(batch["x"])
        loss = F.cross_entropy(scores.float().flatten(0, -2), batch["y"].flatten())
        logged = loss.item() if self.lifts else loss.detach()
        acc = (scores.detach().argmax(-1) == batch["y"]).float().mean()
        return dict(loss=loss, log_vars=dict(loss=logged, acc=acc), num_samples=len(batch["y"]))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 10))


class Block(nn.Module):
    def __init__(self, width: int, depthwise: bool = False) -> None:
        super().__init__()
        groups = width if depthwise else 1
        self.body = nn.Sequential(
            nn.Conv2d(
                width, width, 3, padding=1, groups=groups
            ),  # its bias stands before a BatchNorm: no true gradient
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )

    def forward(self, x):
        return x + self.body(x)


def cnn(depthwise: bool = False, frozen: bool = False) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    if frozen:
        stem.requires_grad_(False)
        stem.train = lambda mode=True: stem  # MMCV's way: the frozen part stays in eval mode
        for module in stem.modules():
            module.training = False
    return nn.Sequential(stem, Block(8, depthwise), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.cls = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos = nn.Parameter(torch.randn(1, 5, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.body(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.pos)[:, 0])


class Gpt(nn.Module):
    """One causal block; the head is tied to the embedding; the MLP is checkpointed, with a dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 16))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        z = self.embedding(x)
        q, k, v = self.qkv(self.norm(z)).view(*x.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        z = z + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(z.shape))
        return self.head(z + checkpoint(self.mlp, z, use_reentrant=False))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(32, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 32)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.unused = nn.EmbeddingBag(32, 8, mode="mean"), nn.Linear(3, 3)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, x):
        return self.mlp(self.table(x))[:, None].expand(-1, x.shape[1], -1)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.decoder = nn.Linear(8, 16)

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = F.mse_loss(self.decoder(self.encoder(batch["x"])), batch["x"])
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["x"]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mid, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.embedding(x))))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 10)

    def forward(self, x):
        z = self.layer(x)
        return z * 2 if z.mean() > 0 else z


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def vectors(number: int, size: int = 8) -> dict[str, Any]:
    g = _generator(number)
    return dict(x=torch.randn(size, 16, generator=g), y=torch.randint(0, 10, (size,), generator=g))


def images(number: int, size: int = 6) -> dict[str, Any]:
    g = _generator(number)
    return dict(x=torch.randn(size, 3, 8, 8, generator=g), y=torch.randint(0, 10, (size,), generator=g))


def tokens(number: int, size: int = 4) -> dict[str, Any]:
    x = torch.randint(0, 32, (size, 5), generator=_generator(number))
    return dict(x=x, y=x.roll(1, 1))


@dataclass(frozen=True)
class Family:
    """How to make a model and a batch; ``below``: why it is no graph, as a part of the reason."""

    model: Callable[[], nn.Module]
    batch: Callable[..., dict[str, Any]]
    optimizer: Callable[..., Any] = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)
    clip: float | None = None
    rtol: float = 1e-5
    below: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def adamw(params):
    return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.1)


def two_groups(params):
    params = list(params)
    return torch.optim.SGD([dict(params=params[::2], lr=0.1), dict(params=params[1::2], weight_decay=1e-2)], lr=0.02, momentum=0.5, nesterov=True)  # fmt: skip # noqa: E501


ZOO = {
    "mlp": Family(lambda: Model(Mlp()), vectors, adamw, 0.5),
    "resnet": Family(lambda: Model(cnn()), images, clip=1.0),
    "resnet bf16": Family(lambda: Model(cnn(), amp=True), images, rtol=2e-2),
    "depthwise": Family(lambda: Model(cnn(depthwise=True)), images, two_groups),
    "vit": Family(lambda: Model(Vit()), images, adamw, 1.0),
    "gpt": Family(lambda: Model(Gpt(), lifts=True), tokens, adamw, 1.0),
    "lstm": Family(lambda: Model(Lstm()), tokens, lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=1e-2)),
    "recommender": Family(lambda: Model(Recommender()), tokens, clip=0.1),
    "autoencoder": Family(Autoencoder, vectors, adamw),
    "tied": Family(lambda: Model(Tied()), tokens, lambda params: torch.optim.SGD(params, lr=0.1)),
    "frozen": Family(lambda: Model(cnn(frozen=True)), images, clip=0.5),
    "branch": Family(lambda: Model(Branch()), vectors, below="zoo.py:"),
}
