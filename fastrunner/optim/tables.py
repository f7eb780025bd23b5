"""The parameters of an optimizer, sorted into those that the compiled core updates and the rest.

The core takes float32 parameters in dense CPU memory of any layout (contiguous, channels_last, transposed), with
gradients and momentum buffers of the same layout. Addresses of gradients are new in almost every iteration: the core
reads them, and checks everything else that it relies on, in each step. What it cannot take goes through torch's own
functional SGD, one parameter at a time, with the same result.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch  # before _core: both have to run on torch's OpenMP runtime
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.sgd import sgd

from .. import _core

ParamGroups = list[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]
_Live = tuple[int, int, Tensor, Tensor]  # group, parameter, and the two tensors

SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


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
        self._rest_params: list[tuple[int, int, Tensor]] = []
        params: list[Tensor] = []
        groups: list[int] = []
        slots: list[dict[str, Any] | None] = []
        buffers: list[Tensor | None] = []
        sharing = shared_memory([p for group in param_groups for p in group["params"]])
        for g, group in enumerate(param_groups):
            for i, param in enumerate(group["params"]):
                live = param.grad is not None
                slot = state[param] if group["momentum"] != 0 and (live or param in state) else None
                why = "shares memory with another parameter" if id(param) in sharing else _refusal(param)
                buffer = None
                if why is None and slot is not None:
                    buffer, why = _momentum_buffer(param, slot, name_of(param_groups, g, i))
                if why is not None:
                    self.rest[g, i] = why
                    self._rest_params.append((g, i, param))
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
        rest = [(g, i, p, p.grad) for g, i, p in self._rest_params if p.grad is not None]
        rest_sum = 0.0
        if max_norm is not None:
            for g, i, _, grad in rest:
                rest_sum += _sum_squares(grad, name_of(param_groups, g, i))
        grad_norm, clip_coef, written = self._core.step(param_groups, state, max_norm, write_back, rest_sum)
        increment_version(written)  # graphs that saved the old values fail, as they do after torch's own step
        if rest:
            with torch.no_grad():
                self._torch_step(rest, param_groups, state, clip_coef, write_back)
        return grad_norm

    def _torch_step(
        self, rest: list[_Live], param_groups: ParamGroups, state: State, clip_coef: float, write_back: bool
    ) -> None:
        """torch.optim.SGD's update of the rest, momentum buffers included."""
        # All are looked up before the first is stored, as in torch: a parameter listed twice makes the difference.
        buffers = [state[p].get("momentum_buffer") if param_groups[g]["momentum"] != 0 else None for g, _, p, _ in rest]
        for (g, i, param, grad), buffer in zip(rest, buffers, strict=True):
            group, stored = param_groups[g], [buffer]
            if clip_coef != 1.0:
                grad = grad.mul_(clip_coef) if write_back else grad * clip_coef
            try:
                sgd(
                    [param],
                    [grad],
                    stored,
                    has_sparse_grad=grad.is_sparse,
                    foreach=False,
                    **{key: group[key] for key in SGD_OPTIONS},
                )
            except (RuntimeError, TypeError) as error:  # sparse with weight decay, say
                name = name_of(param_groups, g, i)
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
        if p.layout == torch.strided and p.device.type == "cpu" and p.numel() > 0
    )
    sharing: set[int] = set()
    furthest, owner = 0, 0
    for start, end, param in spans:
        if start < furthest:
            sharing |= {param, owner}
        if end > furthest:
            furthest, owner = end, param
    return sharing


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


def _sum_squares(grad: Tensor, name: str) -> float:
    if grad.layout != torch.strided:
        raise TypeError(
            f"{name}: its gradient is sparse, and torch has no norm for that; "
            "make it dense (nn.Embedding(..., sparse=False)) or do not clip"
        )
    magnitudes = grad.abs() if grad.is_complex() else grad
    norm = float(torch.linalg.vector_norm(magnitudes.detach(), dtype=torch.float64))
    return norm * norm
