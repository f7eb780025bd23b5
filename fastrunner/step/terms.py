"""What a step contains besides the model's own work, as plain tensor operations: clip, update, average.

For graphs, where the compiler fuses them with what produces the gradients. Options are read from ``row``, a float64
vector that the host fills before each call: a number would become a constant of the graph, and float32 is not enough
for 1 - beta**step.

    grad_norm = ||(g_1, ..., g_k)||_2                   g <- g * min(1, max_norm / (grad_norm + 1e-6))
    SGD     d = g + weight_decay * p                    m <- momentum * m + (1 - dampening) * d
            p <- p - lr * (d + momentum * m if nesterov else m)
    Adam    m <- beta1 * m + (1 - beta1) * g            v <- beta2 * v + (1 - beta2) * g**2
            p <- decay * p - step_size * m / (sqrt(v) / sqrt(1 - beta2**step) + eps)
            step_size = lr / (1 - beta1**step)          decay = 1 - lr * weight_decay (AdamW), 1 (Adam)
    EMA     a <- (1 - w) * a + w * p
    scale   g <- g / scale; where any g is inf or NaN nothing is updated
            scale <- scale * backoff there, scale * growth after ``interval`` updates in a row without
Source: torch.optim.SGD, Adam, AdamW, torch.nn.utils.clip_grad_norm_, torch.amp.GradScaler; MMCV's
EMAHook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

EPS = 1e-6  # of torch's clip_grad_norm_
BIG = 2.0**20  # a learning rate behind which the parameter's own rounding vanishes

Group = dict[str, Any]


class Rule(Protocol):
    """An optimizer's update of one parameter group's parameters. Everything but the row's entries is constant."""

    width: ClassVar[int]  # entries of the row

    @property
    def keys(self) -> tuple[str, ...]:
        """State tensors of a parameter's shape, under torch's names."""

    @property
    def counts(self) -> bool:
        """Whether there is a step counter as well."""

    def row(self, group: Group, step: int) -> tuple[float, ...]:
        """The row's entries for the update number ``step`` (from 1)."""

    def apply(
        self, param: Tensor, grad: Tensor, state: Sequence[Tensor], row: Tensor, step: Tensor | None = None
    ) -> None:
        """Write the new parameter and state in place.

        Args:
            step: number of this update, 0-D, where the host does not know it; the row was made without it.
        """

    def probe(self, group: Group) -> tuple[float, ...]:
        """Entries of the row with which, from state of zeros, ``gradient`` can tell what the update was given."""

    def gradient(self, group: Group, before: Tensor, after: Tensor, state: Sequence[Tensor]) -> Tensor:
        """The gradient of an update with ``probe``'s row: from the parameter before and after, and the state after."""


@dataclass(frozen=True)
class SgdRule:
    """What is constant of a group of SGD."""

    momentum: bool
    decays: bool
    dampening: float
    nesterov: bool
    maximize: bool

    width: ClassVar[int] = 3
    counts: ClassVar[bool] = False

    @classmethod
    def of(cls, group: Group) -> SgdRule:
        return cls(
            group["momentum"] != 0,
            group["weight_decay"] != 0,
            float(group["dampening"]),
            bool(group["nesterov"]),
            bool(group["maximize"]),
        )

    @property
    def keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def row(self, group: Group, step: int) -> tuple[float, ...]:
        return group["lr"], group["momentum"], group["weight_decay"]

    def apply(
        self, param: Tensor, grad: Tensor, state: Sequence[Tensor], row: Tensor, step: Tensor | None = None
    ) -> None:
        lr, momentum, weight_decay = row.unbind()
        if self.maximize:
            grad = -grad
        if self.decays:
            grad = grad + weight_decay * param
        if self.momentum:
            (buffer,) = state
            buffer.mul_(momentum).add_(grad if self.dampening == 0 else grad * (1 - self.dampening))
            grad = grad + momentum * buffer if self.nesterov else buffer
        param.sub_(lr * grad)

    def probe(self, group: Group) -> tuple[float, ...]:
        return 0.0 if self.momentum else BIG, group["momentum"], 0.0

    def gradient(self, group: Group, before: Tensor, after: Tensor, state: Sequence[Tensor]) -> Tensor:
        grad = state[0] / (1 - self.dampening) if self.momentum else (before - after) / BIG
        return -grad if self.maximize else grad


@dataclass(frozen=True)
class AdamRule:
    """What is constant of a group of Adam or AdamW."""

    beta2: float
    eps: float
    decays: bool
    decoupled: bool
    maximize: bool
    counts_on_device: bool = False  # an update may be skipped there: what the host counts is not what was done

    width: ClassVar[int] = 4
    keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counts: ClassVar[bool] = True

    @classmethod
    def of(cls, group: Group) -> AdamRule:
        return cls(
            float(group["betas"][1]),
            float(group["eps"]),
            group["weight_decay"] != 0,
            bool(group["decoupled_weight_decay"]),
            bool(group["maximize"]),
        )

    def row(self, group: Group, step: int) -> tuple[float, ...]:
        lr, beta1, weight_decay = group["lr"], group["betas"][0], group["weight_decay"]
        decay = 1 - lr * weight_decay if self.decoupled else weight_decay
        if self.counts_on_device:
            return lr, 1.0, decay, beta1
        return lr / (1 - beta1**step), (1 - self.beta2**step) ** 0.5, decay, beta1

    def apply(
        self, param: Tensor, grad: Tensor, state: Sequence[Tensor], row: Tensor, step: Tensor | None = None
    ) -> None:
        exp_avg, exp_avg_sq = state
        step_size, root, decay, beta1 = row.unbind()
        if self.counts_on_device:
            assert step is not None
            step_size = step_size / (1 - beta1**step)
            root = (1 - self.beta2**step).sqrt()
        if self.maximize:
            grad = -grad
        if self.decays and self.decoupled:
            param.mul_(decay)
        elif self.decays:
            grad = grad + decay * param
        exp_avg.mul_(beta1).add_((1 - beta1) * grad)
        exp_avg_sq.mul_(self.beta2).add_((1 - self.beta2) * (grad * grad))
        param.sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / root + self.eps))

    def probe(self, group: Group) -> tuple[float, ...]:
        return 0.0, 1.0, 1.0 if self.decoupled else 0.0, group["betas"][0]

    def gradient(self, group: Group, before: Tensor, after: Tensor, state: Sequence[Tensor]) -> Tensor:
        grad = state[0] / (1 - float(group["betas"][0]))
        return -grad if self.maximize else grad


def norm_of(grads: Sequence[Tensor]) -> Tensor:
    """The joint L2 norm, float32, 0-D."""
    return torch.stack([(g.float() * g.float()).sum() for g in grads]).double().sum().sqrt().float()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by, float32, 0-D."""
    return (max_norm / (norm + EPS)).clamp(max=1.0)


def average(averages: Sequence[Tensor], params: Sequence[Tensor], row: Tensor) -> None:
    """MMCV's average of parameters, in place; ``row``: 1 - w, w."""
    keep, take = row.unbind()
    for each, param in zip(averages, params, strict=True):
        each.mul_(keep).add_(take * param)


@dataclass(frozen=True)
class ScaleRule:
    """What is constant of a ``torch.amp.GradScaler``.

    Attributes:
        fixed: the scale after each update, whatever happened; None: it grows and backs off.
    """

    growth: float
    backoff: float
    interval: int
    fixed: float | None

    def unscaled(self, grads: Sequence[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
        """The gradients without the scale, and whether any of them is not finite: bool, 0-D."""
        found = torch.stack([(~torch.isfinite(grad)).any() for grad in grads]).any()
        inverse = scale.double().reciprocal().float()
        return [grad * inverse for grad in grads], found

    def step(self, scale: Tensor, tracker: Tensor, found: Tensor) -> None:
        """Write the next scale and the number of updates without inf or NaN in a row, in place."""
        if self.fixed is not None:
            scale.fill_(self.fixed)
            return
        grown, good = scale * self.growth, tracker + 1
        grows = good == self.interval
        next_scale = torch.where(found, scale * self.backoff, torch.where(grows & grown.isfinite(), grown, scale))
        tracker.copy_(torch.where(found | grows, torch.zeros_like(tracker), good))
        scale.copy_(next_scale)
