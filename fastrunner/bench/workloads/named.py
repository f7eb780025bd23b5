"""The comparison's workloads by name, from a factory of the user's, or from a config file.

A factory is ``pkg.module:function``; called without arguments it returns a :class:`Workload`, or a dict of its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...model.supervised import supervised
from .models import Network, cnn, mlp
from .networks import GPT, ViT, resnet18

SGD = {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"type": "AdamW", "lr": 3e-4, "weight_decay": 0.05}


class WorkloadError(ValueError):
    """A workload that is not there, or does not load; the message says what to do."""


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Args:
        make_model: -> a module with ``train_step``, on the CPU; the seed is set before.
        make_batches: (count, seed) -> that many batches in memory, all of one shape.
        optimizer: of torch, as build_optimizer reads it, without ``fused``.
        max_norm: of the gradients; None: they are not clipped.
        batch_size: samples a batch.
        make_dataset: -> a map-style data set, for ``--mode system``; None: it has none.
        loader: how fastrunner reads that data set: see ``make_loader``.
    """

    make_model: Callable[[], nn.Module]
    make_batches: Callable[[int, int], list[Any]]
    optimizer: Mapping[str, Any]
    max_norm: float | None = 0.5  # it bites, so a runner that does not clip has other weights
    batch_size: int = 32
    make_dataset: Callable[[], Any] | None = None
    loader: str = "dataloader"


def find(name: str) -> Workload:
    """A workload by its name, by ``pkg.module:function``, or by the path of a config file (``*.py``).

    Raises:
        WorkloadError: it is not there, does not import, or is none.
    """
    if name in NAMED:
        return NAMED[name]()
    if name.endswith((".py", ".yaml", ".yml", ".json")):
        return from_config(name)
    if ":" not in name:
        choices = ", ".join(NAMED)
        raise WorkloadError(f"unknown workload {name!r}; choose from {choices}, or name a factory pkg.module:function")
    return from_factory(name)


def from_factory(name: str) -> Workload:
    """The workload that ``pkg.module:function`` makes."""
    module, _, function = name.partition(":")
    sys.path[:0] = [""] if "" not in sys.path else []  # the current folder, as ``python -m`` looks there
    try:
        made = getattr(import_module(module), function)()
    except Exception as error:  # whatever a user's module raises
        raise WorkloadError(f"the workload {name} does not load: {type(error).__name__}: {error}") from error
    try:
        made = made if isinstance(made, Workload) else Workload(**made)
    except TypeError as error:
        raise WorkloadError(f"the workload {name} must return a Workload or a dict of its fields: {error}") from error
    return made


def from_config(path: str) -> Workload:
    """The model, data, optimizer and clip of a config that ``python -m fastrunner.train`` reads."""
    from ...registry import MODELS, build_from_cfg
    from ...train import build_loader, load_config

    try:
        cfg = load_config(path)
        loader = build_loader(cfg, "train", shuffle=True)
    except Exception as error:  # a config is executed: anything can come out of it
        raise WorkloadError(f"the config {path} does not load: {type(error).__name__}: {error}") from error
    clip = (cfg.get("optimizer_config") or {}).get("grad_clip") or {}
    optimizer = dict(cfg.optimizer)
    optimizer["type"] = optimizer["type"].removeprefix("Fused")  # each runner gets torch's, in its fused form
    return Workload(
        make_model=lambda: build_from_cfg(cfg.model, MODELS),
        make_batches=lambda count, seed: _repeat(list(islice(loader, count)), count),
        optimizer=optimizer,
        max_norm=clip.get("max_norm"),
        batch_size=cfg.data.samples_per_gpu,
        make_dataset=lambda: loader.dataset,
    )


def _repeat(batches: list[Any], count: int) -> list[Any]:
    return [batches[i % len(batches)] for i in range(count)]


def toy() -> Workload:
    """A linear layer of 8 x 8 on 4 rows: nothing but overhead."""

    def batches(count: int, seed: int) -> list[Any]:
        make = torch.Generator().manual_seed(seed)
        return [dict(img=_normal(4, 8, make), gt_label=_normal(4, 8, make)) for _ in range(count)]

    return Workload(lambda: supervised(nn.Linear(8, 8), nn.MSELoss()), batches, SGD, 0.1, 4)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def _images(body: Callable[[int, int, int], nn.Module], channels: int, size: int) -> nn.Module:
    return supervised(Network(body(channels, size, 10)), nn.CrossEntropyLoss())


def _stacked(make_dataset: Callable[[], Dataset[Any]], batch_size: int, count: int, seed: int) -> list[Any]:
    """Batches of samples drawn without replacement, over and over."""
    dataset: Any = make_dataset()
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    torch.manual_seed(seed)  # for augmentation
    batches = []
    for i in range(count):
        chosen = [dataset[order[(i * batch_size + j) % len(order)]] for j in range(batch_size)]
        batches.append({key: torch.stack([sample[key] for sample in chosen]) for key in chosen[0]})
    return batches


def _on(dataset: Callable[[], Any], model: Callable[[], nn.Module], batch_size: int, **rest: Any) -> Workload:
    return Workload(model, partial(_stacked, dataset, batch_size), batch_size=batch_size, make_dataset=dataset, **rest)


def _digits() -> Any:
    from ...data import Digits

    return Digits("train")


def _photos() -> Any:
    from ...data import Photos

    return Photos("train")


def _bytes() -> Any:
    from .text import Bytes

    return Bytes(128)


def _vit(channels: int, size: int, classes: int) -> nn.Module:
    return ViT(channels, size, classes, patch=8, width=192, depth=4, heads=3)


def _gpt() -> nn.Module:
    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores, target.flatten())

    return supervised(GPT(256, 128, width=128, depth=4, heads=4), loss)


NAMED: dict[str, Callable[[], Workload]] = {
    "toy": toy,
    "mlp": lambda: _on(_digits, partial(_images, mlp, 1, 8), 64, optimizer=ADAMW, loader="memory"),
    "digits-cnn": lambda: _on(_digits, partial(_images, cnn, 1, 8), 64, optimizer=SGD, loader="memory"),
    "photos-resnet18": lambda: _on(_photos, partial(_images, resnet18, 3, 64), 32, optimizer=SGD, loader="dali"),
    "vit-tiny": lambda: _on(_photos, partial(_images, _vit, 3, 64), 32, optimizer=ADAMW, loader="dali"),
    "gpt-nano": lambda: _on(_bytes, _gpt, 8, optimizer=ADAMW, loader="dataloader"),
}
