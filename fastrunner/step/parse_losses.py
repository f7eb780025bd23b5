"""From a model's losses to what ``train_step`` returns: OpenMMLab's ``_parse_losses`` without a host read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dist


def parse_losses(losses: Mapping[str, Tensor | Sequence[Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of all losses, and each of them for the log.

        value[key] = mean(losses[key]), or the sum of the means of a list
        loss       = sum of value[key] over the keys with "loss" in them

    Args:
        losses: name -> tensor of any shape, or a list of tensors. Names without "loss" (accuracies) are only logged.
    Returns:
        The loss (0-D, with its graph), and log_vars with ``"loss"`` added: 0-D tensors, detached. In OpenMMLab these
        are numbers that the host has waited for; here nothing is read before a log is due. With several processes
        the log's values are means over them, by one all_reduce of all together.
    Raises:
        TypeError: a value is neither a tensor nor a list of tensors; which one is said.
        ValueError: no name has "loss" in it.
    Source: mmdet 2.x, ``BaseDetector._parse_losses``.
    """
    values: dict[str, Tensor] = {}
    for name, value in losses.items():
        if isinstance(value, Tensor):
            values[name] = value.mean()
        elif isinstance(value, Sequence) and value and all(isinstance(each, Tensor) for each in value):
            values[name] = torch.stack([each.mean() for each in value]).sum()
        else:
            raise TypeError(f"{name} is not a tensor or list of tensors, but {_kind(value)}")
    parts = [value for name, value in values.items() if "loss" in name]
    if not parts:
        raise ValueError(f"no name has 'loss' in it: {sorted(values)}")
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    log_vars = {name: value.detach() for name, value in values.items()} | {"loss": loss.detach()}
    if dist.get_dist_info()[1] > 1:
        flat = torch.stack([value.float() for value in log_vars.values()])
        torch.distributed.all_reduce(flat.div_(dist.get_dist_info()[1]))
        log_vars = dict(zip(log_vars, flat.unbind(), strict=True))
    return loss, log_vars


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (" that is empty" if isinstance(value, Sequence) and not value else "")
