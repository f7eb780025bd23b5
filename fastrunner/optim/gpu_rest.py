"""Parameters on a GPU that the kernels do not take: torch's operations, one parameter at a time, no host read.

float64 and complex parameters, ones with gaps in memory or sharing it, sparse gradients. The same result as
the kernels': clipped with the same factor, skipped with the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from . import functional
from .algorithms import SGD_OPTIONS
from .masters import followed, needs_master
from .memory import home
from .names import ParamGroups, State

Options = dict[str, Any]  # one of optimizer.param_groups


class Live(NamedTuple):
    """A parameter of the rest that has a gradient."""

    group: int
    name: str
    param: Tensor
    grad: Tensor


def sum_squares(rest: list[Live]) -> Tensor:
    """Of all their gradients: float64, 0-D, on the device.

    Raises:
        TypeError: a gradient is sparse; torch has no norm for that.
    """
    total = torch.zeros((), dtype=torch.float64, device=rest[0].param.device)
    for live in rest:
        if live.grad.layout != torch.strided:
            raise TypeError(
                f"{live.name}: its gradient is sparse, and torch has no norm for that; "
                "make it dense (nn.Embedding(..., sparse=False)), and do not clip or skip until then"
            )
        magnitudes = live.grad.abs() if live.grad.is_complex() else live.grad
        total += torch.linalg.vector_norm(magnitudes, dtype=torch.float64).square()
    return total


def update_rest(
    rest: list[Live],
    param_groups: ParamGroups,
    state: State,
    *,
    is_sgd: bool,
    masters: bool,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    write_back: bool,
) -> None:
    """SGD's or Adam's update, states included.

    Args:
        rest: parameters with gradients.
        masters: those of 16 bits are updated through float32 masters.
        clip_coef: 0-D on the device; None: gradients are taken as they are.
        found_inf: 0-D on the device; where it is not 0, only gradients written back change. None: not looked at.
        write_back: scale the gradients themselves.
    Raises:
        RuntimeError: a sparse gradient that torch cannot use.
    """
    clipped: dict[int, Tensor] = {}  # a gradient that several parameters share is clipped once
    for live in rest:
        if clip_coef is not None and home(live.grad) not in clipped:
            coef = clip_coef.to(live.grad.dtype)
            clipped[home(live.grad)] = live.grad.mul_(coef) if write_back else live.grad * coef
    for live in rest:
        grad, group = clipped.get(home(live.grad), live.grad), param_groups[live.group]
        half = masters and needs_master(live.param)
        slot = {} if is_sgd and group["momentum"] == 0 and not half else state[live.param]
        if grad.layout != torch.strided:
            _sparse_sgd(live.name, live.param, grad, group, slot, is_sgd)
            continue
        param = followed(live.param, slot) if half else live.param
        update = _sgd if is_sgd else _adam
        for old, new in update(param, grad.to(param.dtype), group, slot):
            old.copy_(new if found_inf is None else torch.where(found_inf != 0, old, new))
        if param is not live.param:
            live.param.copy_(param)


Pairs = list[tuple[Tensor, Tensor]]  # what is stored, and what shall be


def _sgd(param: Tensor, grad: Tensor, group: Options, slot: dict[str, Any]) -> Pairs:
    options = {key: group[key] for key in SGD_OPTIONS}
    stored = slot.get("momentum_buffer")
    new, buffer = functional.sgd(param, grad, stored, **options)
    if buffer is None:
        return [(param, new)]
    if stored is None:
        # Skipped or not, the buffer is there from now on; zeros until a step was not skipped.
        stored = slot["momentum_buffer"] = torch.zeros_like(param, dtype=buffer.dtype, requires_grad=False)
    return [(param, new), (stored, buffer)]


def _adam(param: Tensor, grad: Tensor, group: Options, slot: dict[str, Any]) -> Pairs:
    for key in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
        if key not in slot:
            slot[key] = torch.zeros_like(param, requires_grad=False)
    if "step" not in slot:
        slot["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    elif slot["step"].device != param.device:
        slot["step"] = slot["step"].pin_memory().to(param.device, non_blocking=True)
    stored = [param, slot["exp_avg"], slot["exp_avg_sq"]]
    largest = slot["max_exp_avg_sq"] if group["amsgrad"] else None
    if param.is_complex():  # as torch: real and imaginary parts are numbers of their own
        stored, grad = [torch.view_as_real(t) for t in stored], torch.view_as_real(grad)
        largest = None if largest is None else torch.view_as_real(largest)
    step = slot["step"].double() + 1
    options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")}
    decoupled = group.get("decoupled_weight_decay", False)
    new = functional.adam(
        stored[0], grad, stored[1], stored[2], step, **options, decoupled=decoupled, max_exp_avg_sq=largest
    )
    pairs = list(zip(stored, new, strict=False))
    if largest is not None and new[3] is not None:
        pairs.append((largest, new[3]))
    return [*pairs, (slot["step"], step)]


def _sparse_sgd(name: str, param: Tensor, grad: Tensor, group: Options, slot: dict[str, Any], is_sgd: bool) -> None:
    if not is_sgd:
        raise RuntimeError(
            f"{name}: Adam does not support sparse gradients; use torch.optim.SparseAdam for this parameter, or make "
            "the gradient dense (nn.Embedding(..., sparse=False))"
        )
    stored, options = [slot.get("momentum_buffer")], {key: group[key] for key in SGD_OPTIONS}
    try:
        sgd([param], [grad], stored, has_sparse_grad=True, foreach=False, **options)
    except (RuntimeError, TypeError) as error:  # with weight decay, say
        raise RuntimeError(f"{name}: torch.optim.SGD cannot update it either: {error}") from error
    if group["momentum"] != 0:
        slot["momentum_buffer"] = stored[0]
