"""Which parameters Triton kernels can update, and their state as the kernels want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.chunks import dense, same_order, to_device
from .gpu_rules import Form
from .masters import KEY as MASTER
from .masters import needs_master
from .names import State

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEP = "step"


class Column(NamedTuple):
    """A parameter that the kernels update; its place among the columns is its place in the rows of addresses."""

    param: Tensor
    group: int
    name: str
    form: Form
    slot: dict[str, Any] | None  # optimizer.state[param]; None: it needs none so far
    states: tuple[Tensor, ...]  # in the order of form.keys
    master: Tensor | None
    step: Tensor | None  # float32, 0-D, on the device
    fresh: dict[str, Tensor]  # what a first step has to put into the slot
    strides: tuple[int, ...]
    waits: bool  # for its first gradient, and the state that comes with it


class Layouts:
    """Where some tensors lie in memory, and how, at this moment."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._then = self._now()

    def _now(self) -> list[list[Any]]:
        return [list(map(look, self.tensors)) for look in (Tensor.data_ptr, Tensor.stride, Tensor.size)]

    def changed(self) -> bool:
        """Since this was made: somebody wrote to ``tensor.data``, say."""
        return self._now() != self._then


def refusal(param: Tensor) -> str | None:
    """Why the kernels cannot update a parameter, or None."""
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(param).__name__}, which may have no memory of its own"
    if param.layout != torch.strided:
        return "is sparse"
    if param.dtype not in FLOATS:
        return f"is {str(param.dtype).removeprefix('torch.')}"
    if param.is_neg():
        return "is a lazily negated view"
    return None if dense(param) else "has gaps in memory"


def grad_refusal(grad: Tensor, param: Tensor) -> str | None:
    """Why they cannot use its gradient, or None."""
    if grad.layout != torch.strided:
        return "has a gradient that is sparse"
    if type(grad) is not Tensor:
        return f"has a gradient that is a {type(grad).__name__}"
    if grad.dtype != param.dtype:
        return f"has a gradient that is {str(grad.dtype).removeprefix('torch.')}"
    if grad.is_neg():
        return "has a gradient that is a lazily negated view"
    return None if same_order(grad, param) else "has a gradient that lies otherwise in memory"


def make_column(
    param: Tensor, group: int, name: str, form: Form, state: State, *, has_step: bool, masters: bool
) -> Column | str:
    """The parameter with its state, or why the kernels cannot use that.

    Args:
        state: the optimizer's. Gets a slot for a parameter with a gradient that needs state; state in another order or
            dtype is replaced; what is missing is left to the step that writes it first.
        has_step: the state counts steps.
        masters: a 16-bit parameter gets a float32 master; if not, its state has its dtype.
    Raises:
        ValueError: something in ``state`` is not a tensor of the parameter's shape.
    """
    stateful = bool(form.keys) or (masters and needs_master(param))
    slot = state[param] if stateful and (param.grad is not None or param in state) else None
    fresh: dict[str, Tensor] = {}
    dtype = torch.float32 if masters else param.dtype
    states: list[Tensor] = []
    master = step = None
    if slot is not None:
        if has_step:
            step = _step(slot, param.device, fresh)
        for key in form.keys:
            tensor = _fitted(slot, key, param, dtype, name)
            if isinstance(tensor, str):
                return tensor
            if tensor is None:
                tensor = fresh[key] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            states.append(tensor)
        if masters and needs_master(param):
            found = _fitted(slot, MASTER, param, torch.float32, name)
            if isinstance(found, str):
                return found
            master = param.detach().float() if found is None else found
            if found is None:
                fresh[MASTER] = master
    waits = stateful and slot is None
    return Column(param, group, name, form, slot, tuple(states), master, step, fresh, param.stride(), waits)


def _fitted(slot: dict[str, Any], key: str, param: Tensor, dtype: torch.dtype, name: str) -> Tensor | str | None:
    """A state tensor of this dtype in the parameter's layout; None: there is none; or why the kernels cannot use it."""
    stored = slot.get(key)
    if stored is None:
        return None
    if not isinstance(stored, Tensor) or stored.shape != param.shape:
        what = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(
            f"{name}: its {key} is {what}, the parameter has shape {tuple(param.shape)}; "
            "load the state of a model of the same shapes, or delete optimizer.state[parameter]"
        )
    if type(stored) is not Tensor or stored.layout != torch.strided or stored.dtype not in FLOATS:
        return f"has a {key.replace('_', ' ')} that is {str(stored.dtype).removeprefix('torch.')}"
    if stored.dtype != dtype or stored.device != param.device or not same_order(stored, param):
        # Saved from a model in another memory format, or from 16-bit state. Moved once, so that every step is fast.
        moved = torch.empty_like(param, dtype=dtype, requires_grad=False)
        stored = slot[key] = moved.copy_(stored.detach(), non_blocking=True)
    return stored


def _step(slot: dict[str, Any], device: torch.device, fresh: dict[str, Tensor]) -> Tensor:
    """The counter, as torch has it with fused=True or capturable=True; without these it lies on the CPU."""
    step = slot.get(STEP)
    if step is None:
        fresh[STEP] = step = torch.zeros((), dtype=torch.float32, device=device)
    elif not isinstance(step, Tensor) or step.dtype != torch.float32 or step.shape != () or step.device != device:
        counted = step.detach() if isinstance(step, Tensor) else torch.scalar_tensor(float(step), device="cpu")
        counted = counted.float().reshape(())
        step = slot[STEP] = to_device(counted, device) if counted.device.type == "cpu" else counted.to(device)
    return step
