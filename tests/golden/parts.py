"""What the scenarios are made of. Nothing here knows whether it runs on mmcv.runner or on fastrunner.

``api`` is the module itself: both have Hook, HOOKS, EpochBasedRunner, IterBasedRunner, get_priority, build_from_cfg.

Numbers are compared bit for bit, on any CPU: the toy model uses elementwise operations and sums of two terms, so that
neither the order of a sum nor a matrix product can differ.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

WORKFLOWS: dict[str, list[tuple[str, int]]] = {
    "t1": [("train", 1)],
    "t2v1": [("train", 2), ("val", 1)],
    "t1v1": [("train", 1), ("val", 1)],
}


class Clock:
    """``time.time`` and ``time.perf_counter`` of a run: it moves only when the scenario says so."""

    def __init__(self) -> None:
        self.now = 1024.0  # steps are multiples of 1/64: every difference is exact

    def __call__(self) -> float:
        return self.now

    @contextmanager
    def installed(self) -> Iterator[Clock]:
        with mock.patch("time.time", self), mock.patch("time.perf_counter", self):
            yield self


class Toy(nn.Module):
    """``w[0] * x[0] + w[1] * x[1] + b`` with a squared loss."""

    def __init__(self, dtype: torch.dtype = torch.float64, clock: Clock | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.75, -1.3], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([0.1], dtype=dtype))
        self.clock = clock
        self.log: Callable[[str], None] = lambda event: None  # the scenario of events listens here

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).sum(1) + self.b

    def _outputs(self, data_batch: dict[str, Tensor]) -> dict[str, Any]:
        error = self(data_batch["x"]) - data_batch["y"]
        loss = (error * error).mean()
        log_vars = dict(loss=loss.item(), error=error[0].item())
        return dict(loss=loss, log_vars=log_vars, num_samples=len(error))

    def train_step(self, data_batch: Any, optimizer: Any, **kwargs: Any) -> dict[str, Any]:
        self.log(f"train_step optimizer={optimizer is not None} training={self.training} {sorted(kwargs)}")
        if self.clock:
            self.clock.now += 0.25 * data_batch["cost"]
        return self._outputs(data_batch)

    def val_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        self.log(f"val_step optimizer={optimizer is not None} training={self.training} {sorted(kwargs)}")
        if self.clock:
            self.clock.now += 0.125
        return self._outputs(data_batch)


class Loader:
    """Batches of two samples, made by formula; ``log`` hears when it is iterated and when it gives a batch."""

    sampler = None  # mmcv's IterLoader asks for the attribute

    def __init__(self, length: int, dtype: torch.dtype = torch.float64, clock: Clock | None = None) -> None:
        self.length, self.dtype, self.clock = length, dtype, clock
        self.log: Callable[[str], None] = lambda event: None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.log("iter")
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Any]]:
        for k in range(self.length):
            if self.clock:
                self.clock.now += 0.015625 * (1 + k % 2)
            self.log(f"batch {k}")
            x = [[0.3 * k + 0.1, -0.7], [1.1, 0.2 * k - 0.5]]
            y = [0.5 - 0.1 * k, 0.25 * k]
            yield dict(x=torch.tensor(x, dtype=self.dtype), y=torch.tensor(y, dtype=self.dtype), cost=1 + k % 3)
        self.log("end")


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def make_logger() -> tuple[logging.Logger, list[str]]:
    """A logger of nobody, and the messages it got."""
    logger, handler = logging.Logger("scenario", level=logging.INFO), Lines()
    logger.addHandler(handler)
    return logger, handler.lines


def make_runner(api: Any, kind: str, length: int, *, model: nn.Module, **kwargs: Any) -> Any:
    """``kind`` "epoch" or "iter", ``length`` in its unit."""
    kwargs.setdefault("logger", make_logger()[0])
    limit = dict(max_epochs=length) if kind == "epoch" else dict(max_iters=length)
    return getattr(api, "EpochBasedRunner" if kind == "epoch" else "IterBasedRunner")(model, **limit, **kwargs)


def sgd(model: Toy, groups: int = 1, **kwargs: Any) -> torch.optim.SGD:
    options = dict(lr=0.1, momentum=0.9, **kwargs)
    if groups == 1:
        return torch.optim.SGD(model.parameters(), **options)
    return torch.optim.SGD([dict(params=[model.w]), dict(params=[model.b], lr=0.03, momentum=0.5)], **options)


def weights(model: nn.Module) -> dict[str, list[float]]:
    """Parameters, and the buffers of an average. float64 holds every float32, and JSON keeps every float64."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().double().tolist() for name, tensor in state.items()}


def scrub(text: str, folder: str, runner: Any) -> str:
    """Without the folder, the host and the time of the run."""
    text = text.replace(folder, "<folder>").replace(runner.timestamp, "<timestamp>")
    return re.sub(r"host: \S*,", "host: <host>,", text)
