"""What is particular to SGD and to Adam where Triton kernels update the parameters: options, counters, launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.adam import launch_adam
from ..kernels.sgd import launch_sgd
from ..kernels.update import Kind, Rows

Options = dict[str, Any]  # one of optimizer.param_groups


class Form(NamedTuple):
    """What the options of two groups must have in common for their parameters to be updated in one launch."""

    keys: tuple[str, ...]  # of state tensors
    maximize: bool
    variant: bool  # nesterov, or decoupled weight decay


class Launch(NamedTuple):
    """Arguments of one launch that do not change from step to step."""

    chunks: Tensor
    rows: Rows
    kind: Kind  # with neither clipping nor skipping
    variant: bool


class Rule(NamedTuple):
    """One algorithm.

    Args:
        names: of options that are numbers.
        key: of a group's options, what chooses the kernel and its launches; compared in each step.
        form: the same, in words.
        numbers: a group's row of values as kernels/prepare.py wants it; 0 for an lr that is a tensor on the device.
        counts: whether updates depend on how often a tensor was updated before; asked of all groups.
        has_step: that number is part of the state, and bias corrections come from it.
        launch: (launch, kind, bias, scalars, values, block).
    """

    names: tuple[str, ...]
    key: Callable[[Options], tuple[object, ...]]
    form: Callable[[Options], Form]
    numbers: Callable[[Options, torch.device], Sequence[float]]
    counts: Callable[[Sequence[Options]], bool]
    has_step: bool
    launch: Callable[[Launch, Kind, Tensor, Tensor, Tensor, int | None], None]


def on_device(value: Any, device: torch.device) -> bool:
    """Whether an option is a tensor that the device can read by itself."""
    return isinstance(value, Tensor) and value.device == device


PLAIN = frozenset({float, int})


def number(value: Any) -> float:
    """An option as a float; text, which float() would read, is none. A tensor is read by the host."""
    if isinstance(value, str | bytes):
        raise TypeError(f"not a number: {value!r}")
    return float(value)


def scalar(value: Any, device: torch.device) -> float:
    """The same for what may be a tensor on the device: 0 for that, and nothing is read."""
    return 0.0 if on_device(value, device) else number(value)


def _sgd_key(group: Options) -> tuple[object, ...]:
    return group["momentum"] != 0, group["dampening"] != 0, group["maximize"], group["nesterov"]


def _sgd_form(group: Options) -> Form:
    has_buffer = group["momentum"] != 0
    keys = ("momentum_buffer",) if has_buffer else ()
    return Form(keys, bool(group["maximize"]), has_buffer and bool(group["nesterov"]))


def _sgd_numbers(group: Options, device: torch.device) -> Sequence[float]:
    row = group["lr"], group["weight_decay"], group["momentum"], group["dampening"]
    return row if PLAIN.issuperset(map(type, row)) else (scalar(row[0], device), *map(number, row[1:]))


def _sgd_counts(groups: Sequence[Options]) -> bool:
    # Without dampening, buffers of zeros make the first step what it has to be.
    return any(group["momentum"] != 0 and group["dampening"] != 0 for group in groups)


def _launch_sgd(launch: Launch, kind: Kind, bias: Tensor, scalars: Tensor, values: Tensor, block: int | None) -> None:
    launch_sgd(launch.chunks, launch.rows, scalars, values, kind, nesterov=launch.variant, block=block)


def _adam_key(group: Options) -> tuple[object, ...]:
    return group["maximize"], group["amsgrad"], group.get("decoupled_weight_decay", False)


def _adam_form(group: Options) -> Form:
    keys = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    return Form(keys, bool(group["maximize"]), bool(group.get("decoupled_weight_decay", False)))


def _adam_numbers(group: Options, device: torch.device) -> Sequence[float]:
    row = group["lr"], group["weight_decay"], *group["betas"], group["eps"]
    if not PLAIN.issuperset(map(type, row)):
        row = (scalar(row[0], device), *map(number, row[1:]))
    return *row, *_logs(row[2], row[3])


@functools.lru_cache(maxsize=64)
def _logs(*betas: float) -> tuple[float, ...]:
    return tuple(math.log(beta) if beta else -math.inf for beta in betas)


def _launch_adam(launch: Launch, kind: Kind, bias: Tensor, scalars: Tensor, values: Tensor, block: int | None) -> None:
    launch_adam(launch.chunks, launch.rows, bias, scalars, values, kind, decoupled=launch.variant, block=block)


RULES = {
    "sgd": Rule(
        ("lr", "weight_decay", "momentum", "dampening"),
        _sgd_key,
        _sgd_form,
        _sgd_numbers,
        _sgd_counts,
        False,
        _launch_sgd,
    ),
    "adam": Rule(
        ("lr", "weight_decay", "eps"), _adam_key, _adam_form, _adam_numbers, lambda groups: True, True, _launch_adam
    ),
}
