"""The parameters of an optimizer, sorted into those that the compiled core updates and the rest.

The core takes float32 parameters in dense CPU memory of any layout (contiguous, channels_last, transposed), and those
of bfloat16 and float16 through float32 masters; with gradients and state of the same layout. Addresses of gradients are
new in almost every iteration: the core reads them, and checks everything else that it relies on, in each step. What it
cannot take goes through torch's own functional optimizer, one parameter at a time.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch  # before _core: both have to run on torch's OpenMP runtime
from torch import Tensor

from .. import _core
from .algorithms import Algorithm
from .ema_term import EmaTerm
from .masters import KEY as MASTER
from .masters import master_of, needs_master
from .memory import check_allocated, shared_gradients, shared_memory
from .names import ParamGroups, State, name_of
from .rest import Rest


class Table(Protocol):
    """An optimizer's parameters, as they were when this was built. One implementation a kind of device.

    ``rest``: (group, parameter) -> why torch updates it. ``ema``: the term whose averages it takes, or None.
    """

    rest: dict[tuple[int, int], str]
    ema: EmaTerm | None

    def step(
        self,
        param_groups: ParamGroups,
        state: State,
        *,
        max_norm: float | None = None,
        write_back: bool = True,
        average: bool = False,
        zero: bool = False,
        skip_nonfinite: bool = False,
    ) -> Any:
        """As ``ParamTable.step``; on a GPU the norm is a 0-D tensor there, and nothing waits for it."""

    def take_over(self, before: Table) -> None:
        """What stands nowhere but in the table that this one replaces."""


class ParamTable:
    """One optimizer's parameters on the CPU, as they were when this was built; ``step`` says when they no longer are.

    Args:
        algorithm: what is computed.
        param_groups: the optimizer's, with the algorithm's options.
        state: the optimizer's. Gets an entry for each parameter that has a gradient and needs state.
        ema: averages that steps may take; of any parameters.
        masters: update 16-bit parameters through float32 masters. If not, torch updates them, in their dtype.
        isa: instruction set by name; None: the best, or what ``FASTRUNNER_ISA`` forces.
    Raises:
        ValueError: something in ``state`` is not a tensor of its parameter's shape.
        RuntimeError: the memory of a parameter, its gradient or its state was freed.
    Cost: a few microseconds a parameter; wanted when parameters or state are replaced, not in each step.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        param_groups: ParamGroups,
        state: State,
        *,
        ema: EmaTerm | None = None,
        masters: bool = True,
        isa: str | None = None,
    ) -> None:
        self.ema = ema
        self.rest: dict[tuple[int, int], str] = {}
        self._rest = Rest(algorithm, masters=masters)
        self._algorithm, self._masters = algorithm, masters
        self._params: list[Tensor] = []
        self._groups: list[int] = []  # -1: only averaged
        self._slots: list[dict[str, Any] | None] = []
        self._states: list[dict[str, Tensor] | None] = []
        everything = [p for group in param_groups for p in group["params"]]
        everything += [p for p in ema.params if id(p) not in set(map(id, everything))] if ema else []
        sharing = shared_memory(everything)
        why = {
            **dict.fromkeys(shared_gradients(everything), "shares its gradient with another parameter"),
            **dict.fromkeys(sharing, "shares memory with another parameter"),
        }
        for g, group in enumerate(param_groups):
            for i, param in enumerate(group["params"]):
                name = name_of(param_groups, g, i)
                refused = why.get(id(param)) or self._add(g, group, param, name, state)
                if refused is not None:
                    self.rest[g, i] = refused
                    self._rest.add(g, name, param)
        self._rest.check_memory(
            state
        )  # before the table is kept: with its memory back, a parameter is the core's again
        averages = self._add_averages(ema, sharing)
        lists = (self._params, self._groups, self._slots, self._states, averages)
        self._core = _core.UpdateTable(algorithm.name, param_groups, state, *lists, isa)

    def _add(self, g: int, group: dict[str, Any], param: Tensor, name: str, state: State) -> str | None:
        """Take a parameter in, or say why not."""
        half = needs_master(param)
        if half and not self._masters:
            return "is of 16 bits"
        if why := _core.refusal(param):
            return why
        live = param.grad is not None
        if param.grad is not None and (why := _core.refusal(param.grad, param)):
            return f"has a gradient that {why}"
        slot: dict[str, Any] | None = None
        states: dict[str, Tensor] = {}
        keys = self._algorithm.keys(group)
        if (keys or half) and (live or param in state):
            slot = state[param]
            for key in keys:
                if slot.get(key) is not None:
                    states[key], why = _fitted(key, param, slot, name)
                    if why is not None:
                        return why
                elif live or self._algorithm.name == "sgd":
                    states[key] = self._algorithm.new_state(key, param, slot)
            count = self._algorithm.step_count(slot) if live or "step" in slot else None
            if count is not None:
                states["step"] = count
            if half:
                master_of(param, slot)
                states[MASTER], why = _fitted(MASTER, param, slot, name)
                if why is not None:
                    return why
        self._params.append(param)
        self._groups.append(g)
        self._slots.append(slot)
        self._states.append(states if slot is not None else None)
        return None

    def _add_averages(self, ema: EmaTerm | None, sharing: set[int]) -> list[Tensor | None]:
        """The average of each parameter of the table; parameters that are only averaged come in, the rest is noted."""
        averages: list[Tensor | None] = [None] * len(self._params)
        if ema is None:
            return averages
        rest: list[tuple[Tensor, Tensor]] = []
        index = {id(p): i for i, p in enumerate(self._params)}
        # Memory that two averages share, or an average and anything else.
        states = [t for states in self._states if states for t in states.values()]
        sharing = sharing | shared_memory([*ema.params, *ema.averages, *states])
        for param, average in zip(ema.params, ema.averages, strict=True):
            fits = not {id(param), id(average)} & sharing and _core.refusal(param) is None
            fits = fits and _core.refusal(average, param, as_float=True) is None
            if needs_master(param):
                known = self._states[index[id(param)]] if id(param) in index else None
                fits = fits and ema.of_masters and known is not None
            if not fits:
                check_allocated("an averaged parameter", "average", average)
                rest.append((param, average))
            elif id(param) in index:
                averages[index[id(param)]] = average
            else:
                self._params.append(param)
                self._groups.append(-1)
                self._slots.append(None)
                self._states.append(None)
                averages.append(average)
        self._rest_ema = EmaTerm([p for p, _ in rest], [a for _, a in rest], ema.momentum)
        return averages

    def step(
        self,
        param_groups: ParamGroups,
        state: State,
        *,
        max_norm: float | None = None,
        write_back: bool = True,
        average: bool = False,
        zero: bool = False,
        skip_nonfinite: bool = False,
    ) -> float:
        """One step over all parameters that have a gradient.

        Args:
            param_groups, state: the optimizer's, again; options are read from them now.
            max_norm: bound on the joint L2 norm of all gradients; None: no clipping.
            write_back: store the clipped gradients.
            average: then take the average of ``ema``.
            zero: then set all gradients to None.
            skip_nonfinite: update nothing where the norm is not finite.
        Returns:
            The norm before clipping, a float32 value; NaN if neither ``max_norm`` nor ``skip_nonfinite`` wants it.
        Raises:
            fastrunner._core.StaleTable: this table no longer describes the optimizer; nothing was written.
            TypeError: an option is not a number, or a sparse gradient was to be clipped.
            RuntimeError: torch cannot update one of the rest either, or memory of one was freed; in the second case
                nothing was written.
        """
        if self.rest:
            self._rest.check_memory(state)
        rest_sum = self._rest.sum_squares() if self.rest and (max_norm is not None or skip_nonfinite) else 0.0
        momentum = float(self.ema.momentum) if average and self.ema is not None else None
        grad_norm, clip_coef, skipped = self._core.step(
            param_groups, state, max_norm, write_back, rest_sum, momentum, zero, skip_nonfinite
        )
        if self.rest:
            if not skipped:
                self._rest.update(param_groups, state, clip_coef, write_back)
            if zero:
                self._rest.drop_gradients()
        if momentum is not None:
            self._rest_ema.momentum = momentum
            if self._rest_ema.params:  # no_grad alone takes several microseconds
                self._rest_ema.update()
        return grad_norm

    def take_over(self, before: Table) -> None:
        """Nothing: all of it stands in the optimizer's state."""


def _fitted(key: str, param: Tensor, slot: dict[str, Any], name: str) -> tuple[Tensor, str | None]:
    """A state tensor as float32 in the parameter's layout, and why the core cannot use it, if so."""
    stored = slot[key]
    if not isinstance(stored, Tensor) or stored.shape != param.shape:
        what = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(
            f"{name}: its {key} is {what}, the parameter has shape {tuple(param.shape)}; "
            "load the state of a model of the same shapes, or delete optimizer.state[parameter]"
        )
    check_allocated(name, key, stored)
    why = _core.refusal(stored, param, as_float=True)
    plain = type(stored) is Tensor and (stored.device, stored.layout) == (param.device, torch.strided)
    dtypes = (torch.float32, param.dtype) if needs_master(param) else (torch.float32,)
    if why and plain and stored.dtype in dtypes:
        # Saved from a model in another memory format, or from 16-bit state. Moved once, so that every step is fast.
        fresh = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        stored = slot[key] = fresh.copy_(stored.detach())
        why = _core.refusal(stored, param, as_float=True)
    return stored, f"has a {key.replace('_', ' ') if key == 'momentum_buffer' else key} that {why}" if why else None
