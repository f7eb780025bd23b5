"""The parameters of an optimizer, sorted into those that the compiled core updates and the rest.

The core takes float32 parameters in dense CPU memory of any layout (contiguous, channels_last, transposed), with
gradients and momentum buffers of the same layout. Addresses of gradients are new in almost every iteration: the core
reads them, and checks everything else that it relies on, in each step. What it cannot take goes through torch's own
functional SGD, one parameter at a time, with the same result.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch  # before _core: both have to run on torch's OpenMP runtime
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.sgd import sgd

from .. import _core

ParamGroups = list[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]

SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class Live(NamedTuple):
    """A parameter of the rest that has a gradient."""

    group: int
    name: str
    param: Tensor
    grad: Tensor


class ParamTable:
    """One optimizer's parameters, as they were when this was built; ``step`` says when that is no longer true.

    Args:
        param_groups: the optimizer's, with SGD's options.
        state: the optimizer's. Gets an entry for each parameter that has a gradient and needs a momentum buffer.
        isa: instruction set by name; None: the best, or what ``FASTRUNNER_ISA`` forces.
    Raises:
        ValueError: a momentum buffer in ``state`` is not a tensor of its parameter's shape.
    Cost: a few microseconds a parameter; wanted when parameters or state are replaced, not in each step.
    """

    def __init__(self, param_groups: ParamGroups, state: State, *, isa: str | None = None) -> None:
        self.rest: dict[tuple[int, int], str] = {}  # (group, parameter) -> why the core does not update it
        self._rest_params: list[tuple[int, str, Tensor]] = []
        params: list[Tensor] = []
        groups: list[int] = []
        slots: list[dict[str, Any] | None] = []
        buffers: list[Tensor | None] = []
        all_params = [p for group in param_groups for p in group["params"]]
        sharing = {
            **dict.fromkeys(_shared_gradients(all_params), "shares its gradient with another parameter"),
            **dict.fromkeys(shared_memory(all_params), "shares memory with another parameter"),
        }
        for g, group in enumerate(param_groups):
            for i, param in enumerate(group["params"]):
                live = param.grad is not None
                slot = state[param] if group["momentum"] != 0 and (live or param in state) else None
                name, buffer = name_of(param_groups, g, i), None
                why = sharing.get(id(param)) or _refusal(param)
                if why is None and slot is not None:
                    buffer, why = _momentum_buffer(param, slot, name)
                if why is not None:
                    self.rest[g, i] = why
                    self._rest_params.append((g, name, param))
                    continue
                params.append(param)
                groups.append(g)
                slots.append(slot)
                buffers.append(buffer)
        self._core = _core.SgdTable(param_groups, state, params, groups, slots, buffers, isa)

    def step(
        self, param_groups: ParamGroups, state: State, *, max_norm: float | None = None, write_back: bool = True
    ) -> float:
        """One SGD step over all parameters that have a gradient.

        Args:
            param_groups, state: the optimizer's, again; options are read from them now.
            max_norm: bound on the joint L2 norm of all gradients; None: no clipping, and no norm.
            write_back: store the clipped gradients.
        Returns:
            The norm before clipping, a float32 value; NaN if ``max_norm`` is None.
        Raises:
            fastrunner._core.StaleTable: this table no longer describes the optimizer; nothing was written.
            TypeError: an option is not a number, or a sparse gradient was to be clipped.
            RuntimeError: torch's SGD cannot update one of the rest either.
        """
        rest = [Live(g, name, p, p.grad) for g, name, p in self._rest_params if p.grad is not None]
        rest_sum = 0.0 if max_norm is None else sum(_sum_squares(live) for live in rest)
        grad_norm, clip_coef, written = self._core.step(param_groups, state, max_norm, write_back, rest_sum)
        increment_version(written)  # graphs that saved the old values fail, as they do after torch's own step
        if rest:
            with torch.no_grad():
                self._torch_step(rest, param_groups, state, clip_coef, write_back)
        return grad_norm

    def _torch_step(
        self, rest: list[Live], param_groups: ParamGroups, state: State, clip_coef: float, write_back: bool
    ) -> None:
        """torch.optim.SGD's update of the rest, momentum buffers included."""
        groups = [param_groups[live.group] for live in rest]
        # All are looked up before the first is stored, as in torch: a parameter listed twice makes the difference.
        buffers = [
            state[live.param].get("momentum_buffer") if group["momentum"] != 0 else None
            for live, group in zip(rest, groups, strict=True)
        ]
        clipped: dict[int, Tensor] = {}  # a gradient that several parameters share is clipped once
        for (_, name, param, grad), group, buffer in zip(rest, groups, buffers, strict=True):
            if clip_coef != 1.0:
                if _home(grad) not in clipped:
                    clipped[_home(grad)] = grad.mul_(clip_coef) if write_back else grad * clip_coef
                grad = clipped[_home(grad)]
            stored, options = [buffer], {key: group[key] for key in SGD_OPTIONS}
            try:
                sgd([param], [grad], stored, has_sparse_grad=grad.is_sparse, foreach=False, **options)
            except (RuntimeError, TypeError) as error:  # sparse with weight decay, say
                raise RuntimeError(f"{name}: torch.optim.SGD cannot update it either: {error}") from error
            if group["momentum"] != 0:
                state[param]["momentum_buffer"] = stored[0]


def name_of(param_groups: ParamGroups, group: int, index: int) -> str:
    """What error messages call a parameter."""
    names = param_groups[group].get("param_names")
    return f"parameter group {group}, parameter {index}" + (f" ({names[index]!r})" if names else "")


def shared_memory(params: Sequence[Tensor]) -> set[int]:
    """ids of the parameters whose memory overlaps that of another one, or that are listed twice.

    torch updates such parameters one after the other; the core would do it in any order, and in two threads.
    """
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.element_size() * (1 + _last_index(p)), id(p))
        for p in params
        if _has_memory(p) and p.numel() > 0
    )
    sharing: set[int] = set()
    furthest, owner = 0, 0
    for start, end, param in spans:
        if start < furthest:
            sharing |= {param, owner}
        if end > furthest:
            furthest, owner = end, param
    return sharing


def _shared_gradients(params: Sequence[Tensor]) -> set[int]:
    """ids of the parameters whose ``.grad`` lies where another one's does: it must not be scaled twice."""
    owners: dict[int, list[int]] = {}
    for p in params:
        if p.grad is not None:
            owners.setdefault(_home(p.grad), []).append(id(p))
    return {owner for group in owners.values() if len(group) > 1 for owner in group}


def _home(grad: Tensor) -> int:
    """The same for gradients in the same memory."""
    return grad.data_ptr() if _has_memory(grad) and grad.numel() > 0 else id(grad)


def _has_memory(tensor: Tensor) -> bool:
    """Subclasses may wrap other tensors and have none of their own."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.device.type == "cpu"


def _last_index(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _refusal(param: Tensor) -> str | None:
    why = _core.refusal(param)
    if why is None and param.grad is not None and (grad_why := _core.refusal(param.grad, param)):
        why = f"has a gradient that {grad_why}"
    return why


def _momentum_buffer(param: Tensor, slot: dict[str, Any], name: str) -> tuple[Tensor | None, str | None]:
    """The parameter's momentum buffer in the parameter's layout, or why the core cannot use it."""
    stored = slot.get("momentum_buffer")
    if stored is None:
        return torch.empty_like(param, requires_grad=False), None  # the core writes it before it reads it
    if not isinstance(stored, Tensor) or stored.shape != param.shape:
        what = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(
            f"{name}: its momentum_buffer is {what}, the parameter has shape {tuple(param.shape)}; "
            "load the state of a model of the same shapes, or delete optimizer.state[parameter]"
        )
    why = _core.refusal(stored, param)
    if why and (stored.dtype, stored.device, stored.layout) == (param.dtype, param.device, torch.strided):
        # Saved from a model in another memory format, say. Moved once, so that every step is fast.
        stored = slot["momentum_buffer"] = torch.empty_like(param, requires_grad=False).copy_(stored)
        why = _core.refusal(stored, param)
    return stored, f"has a momentum buffer that {why}" if why else None


def _sum_squares(live: Live) -> float:
    grad = live.grad
    if grad.layout != torch.strided:
        raise TypeError(
            f"{live.name}: its gradient is sparse, and torch has no norm for that; "
            "make it dense (nn.Embedding(..., sparse=False)) or do not clip"
        )
    magnitudes = grad.abs() if grad.is_complex() else grad
    norm = float(torch.linalg.vector_norm(magnitudes.detach(), dtype=torch.float64))
    return norm * norm
