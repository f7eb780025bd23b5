"""Parameters that the compiled core does not update: torch's functional optimizer does, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithms import Algorithm, Live
from .masters import followed, needs_master
from .memory import check_allocated, home
from .names import ParamGroups, State


class Rest:
    """Some parameters of an optimizer, in its order.

    Args:
        algorithm: the optimizer's.
        masters: 16-bit parameters are updated through float32 masters.
    """

    def __init__(self, algorithm: Algorithm, *, masters: bool) -> None:
        self._algorithm, self._masters = algorithm, masters
        self._params: list[tuple[int, str, Tensor]] = []  # (group, name, parameter)

    def add(self, group: int, name: str, param: Tensor) -> None:
        self._params.append((group, name, param))

    def check_memory(self, state: State) -> None:
        """Raise RuntimeError if the storage of one with a gradient was freed, or that of its gradient or state."""
        for _, name, param in self._params:
            if param.grad is None:
                continue
            check_allocated(name, "parameter", param)
            check_allocated(name, "gradient", param.grad)
            for key, value in state.get(param, {}).items():
                check_allocated(name, key, value)

    def sum_squares(self) -> float:
        """Of all their gradients, in float64.

        Raises:
            TypeError: one is sparse; torch has no norm for that.
        """
        return sum(_sum_squares(name, p.grad) for _, name, p in self._params if p.grad is not None)

    @torch.no_grad()
    def update(self, param_groups: ParamGroups, state: State, clip_coef: float, write_back: bool) -> None:
        """Clip the gradients, and update each parameter that has one.

        Raises:
            RuntimeError: torch cannot update a parameter either; it says which.
        """
        rest = [(group, name, p, p.grad) for group, name, p in self._params if p.grad is not None]
        groups, slots, lives, halves = [], [], [], []
        clipped: dict[int, Tensor] = {}  # a gradient that several parameters share is clipped once
        for group, name, param, grad in rest:
            if clip_coef != 1.0:
                if home(grad) not in clipped:
                    clipped[home(grad)] = grad.mul_(clip_coef) if write_back else grad * clip_coef
                grad = clipped[home(grad)]
            stateless = not (self._algorithm.keys(param_groups[group]) or (self._masters and needs_master(param)))
            slot = {} if stateless else state[param]
            if self._masters and needs_master(param):
                master = followed(param, slot)
                halves.append((param, master))
                param, grad = master, grad.to(torch.float32)
            groups.append(param_groups[group])
            slots.append(slot)
            lives.append(Live(name, param, grad))
        self._algorithm.update(groups, lives, slots)
        for param, master in halves:
            param.copy_(master)

    def drop_gradients(self) -> None:
        for _, _, param in self._params:
            param.grad = None


def _sum_squares(name: str, grad: Tensor) -> float:
    if grad.layout != torch.strided:
        raise TypeError(
            f"{name}: its gradient is sparse, and torch has no norm for that; "
            "make it dense (nn.Embedding(..., sparse=False)) or do not clip"
        )
    magnitudes = grad.abs() if grad.is_complex() else grad
    norm = float(torch.linalg.vector_norm(magnitudes.detach(), dtype=torch.float64))
    return norm * norm
