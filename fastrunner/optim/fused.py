"""SGD whose step is one pass over memory: gradient norm, clipping and update together.

    grad_norm = ||(g_1, ..., g_k)||_2        g <- g * min(1, max_norm / (grad_norm + 1e-6))
    d = g + weight_decay * p                 m <- momentum * m + (1 - dampening) * d       (first step: m <- d)
    p <- p - lr * (d + momentum * m if nesterov else m)
Source: torch.optim.SGD and torch.nn.utils.clip_grad_norm_, operation by operation. Without clipping the result has
torch's bits. With clipping it differs by what the norms differ, and torch's is the less exact one: off by 1e-5 for a
million elements and by 1e-3 for 25 million, where this one is off by float32's last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .._core import StaleTable
from ..registry import OPTIMIZERS
from .ema_term import EmaTerm
from .tables import ParamTable, name_of

CPU = torch.device("cpu")

_F = TypeVar("_F", bound=Callable[..., Any])


def _without_dynamo(method: _F) -> _F:
    """The method itself. torch wraps some in a decorator that imports dynamo and inductor when called (2 s)."""
    return cast(_F, getattr(method, "__wrapped__", method))


_add_param_group = _without_dynamo(Optimizer.add_param_group)
_load_state_dict = _without_dynamo(Optimizer.load_state_dict)
_state_dict = _without_dynamo(Optimizer.state_dict)
_zero_grad = _without_dynamo(Optimizer.zero_grad)


@OPTIMIZERS.register_module()
class FusedSGD(Optimizer):
    """``torch.optim.SGD`` with clipping folded in: same options, same state, same results.

    Options of ``param_groups`` are read in each step and may be changed between steps; ``lr`` may be a tensor of one
    element. State lies in ``state[p]["momentum_buffer"]``, and ``state_dict`` goes into and comes from
    ``torch.optim.SGD``. Parameters that the compiled core does not take (not float32, not on the CPU, not dense, with
    sparse gradients, sharing memory) are updated by torch's functional SGD; ``rest`` names them.

    Args:
        params: parameters, ``named_parameters()``, or dicts of parameter groups; all on one device.
        lr: step size, >= 0.
        momentum: factor of the momentum buffer, >= 0; 0 means no buffer.
        dampening: the buffer takes up ``1 - dampening`` of the gradient; not in its first step.
        weight_decay: L2 penalty, >= 0.
        nesterov: look-ahead; wants momentum > 0 and dampening == 0.
        maximize: climb instead of descend.
        clip_grad_norm: what ``step()`` clips the joint L2 norm of all gradients to; None: ``step()`` does not clip.
    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the parameters are on several devices.
    Cost: with momentum 20 B per element; clipping adds 4 B for the norm, and 4 B more for each gradient written back.
    Parameters and written gradients get a new version for autograd; momentum buffers do not.
    """

    grad_norm: Tensor | None = None  # of the last step that clipped, before clipping: float32, 0-D, on the CPU
    clip_grad_norm: float | None = None

    _table: ParamTable | None = None
    _isa: str | None = None  # forces an instruction set; for tests

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        clip_grad_norm: float | None = None,
    ) -> None:
        if clip_grad_norm is not None:
            self.clip_grad_norm = _positive("clip_grad_norm", clip_grad_norm)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            # torch.optim.SGD's other keys, so that a state_dict loaded there lacks nothing. They choose nothing here.
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(params, defaults)

    @property
    def rest(self) -> dict[tuple[int, int], str]:
        """(group, parameter) -> why the core does not update it; as found in the last step, {} before the first."""
        return {} if self._table is None else dict(self._table.rest)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        write_back: bool = True,
        ema: EmaTerm | None = None,
        zero: bool = False,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients again; called first, with gradients enabled.
            max_norm: clip to this joint L2 norm; None: to ``clip_grad_norm``, or not at all.
            write_back: leave the clipped gradients in ``.grad``, as ``clip_grad_norm_`` does.
            ema: an average to take after the update; of any parameters, also of ones that are not updated here.
            zero: then set ``.grad`` of this optimizer's parameters to None.
        Returns:
            What ``closure`` returned.
        Raises:
            TypeError: an option is not a number, or a sparse gradient was to be clipped.
            ValueError: ``max_norm`` is not positive, or a momentum buffer has not its parameter's shape.
            RuntimeError: torch's SGD cannot update one of ``rest`` either.
        """
        limit = self.clip_grad_norm if max_norm is None else _positive("max_norm", max_norm)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_norm = self._update(limit, write_back)
        if limit is not None:
            self.grad_norm = torch.scalar_tensor(grad_norm, dtype=torch.float32, device=CPU)
        if ema is not None:
            ema.update()
        if zero:
            self.zero_grad()
        return loss

    def clipped_step(self, max_norm: float, *, write_back: bool = True) -> Tensor:
        """``clip_grad_norm_`` over all gradients of this optimizer and ``step()``, in one pass.

        A norm that is not finite does what it does with ``error_if_nonfinite=False``: NaN spreads to all gradients and
        weights, inf scales every finite gradient to 0. Step hooks are called, and before the gradients are clipped. A
        gradient that several parameters share is scaled once; torch scales it once for each of them.

        Args:
            max_norm: bound on the joint L2 norm, in the unit of the gradients; > 0.
            write_back: leave the clipped gradients in ``.grad``. False saves 4 B per element; they stay unclipped.
        Returns:
            grad_norm before clipping: float32, shape (), on the CPU.
        Raises: as ``step``.
        """
        self.step(max_norm=max_norm, write_back=write_back)
        return cast(Tensor, self.grad_norm)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's wrapper of every ``step``, left out where it would do nothing but cost.

        It calls the step hooks and opens a ``record_function``, which takes longer than a step of a small model
        (3 us, 70 when its code has left the cache) and is seen by nobody unless a profiler runs.
        """
        watched_step = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: FusedSGD, *args: Any, **kwargs: Any) -> Any:
            watched = (
                profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            )
            return watched_step(self, *args, **kwargs) if watched else func(self, *args, **kwargs)

        return step

    def _update(self, max_norm: float | None, write_back: bool) -> float:
        if self._table is not None:
            try:
                return self._table.step(self.param_groups, self.state, max_norm=max_norm, write_back=write_back)
            except StaleTable:
                self._table = None  # parameters, gradients or state are not what they were: look at them again
        with torch.no_grad():
            self._table = ParamTable(self.param_groups, self.state, isa=self._isa)
        return self._table.step(self.param_groups, self.state, max_norm=max_norm, write_back=write_back)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it lacks are the constructor's. A group that is refused is not added."""
        _add_param_group(self, param_group)
        try:
            _check_options(len(self.param_groups) - 1, self.param_groups[-1])
            _check_devices(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._table = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""
        if not set_to_none or profiler._is_profiler_enabled:
            _zero_grad(self, set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.SGD.state_dict``, key by key."""
        return _state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of ``torch.optim.SGD`` gave; all of it or, on an error, nothing.

        Raises:
            ValueError: other numbers of groups or parameters, or a momentum buffer of another shape; which one is said.
        """
        if not self._optimizer_load_state_dict_pre_hooks:  # such a hook may be there to mend exactly this
            _check_sizes(self.param_groups, state_dict["param_groups"])
        _load_state_dict(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "clip_grad_norm": self.clip_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict comes through here as well
        _check_buffers(state["param_groups"], state["state"])
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._table = None


def _positive(name: str, value: float) -> float:
    number = _number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not number > 0:  # also catches NaN
        raise ValueError(f"{name} must be > 0, got {number}; to train without clipping, do not pass it")
    return number


def _number(value: object) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, Real) else None


def _check_options(index: int, group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError if a group's options make no sense."""
    values = {}
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        values[name] = number = _number(group[name])
        if number is None:
            hint = "; YAML reads 1e-3 as text, write 1.0e-3" if isinstance(group[name], str) else ""
            raise TypeError(
                f"parameter group {index}: {name} must be a number, got {group[name]!r} "
                f"({type(group[name]).__name__}){hint}"
            )
        if name != "dampening" and not number >= 0:  # also catches NaN
            raise ValueError(f"parameter group {index}: {name} must be >= 0, got {number}")
    if group["nesterov"] and (values["momentum"] == 0 or values["dampening"] != 0):
        raise ValueError(
            f"parameter group {index}: nesterov wants momentum > 0 and dampening == 0, got "
            f"momentum={values['momentum']} and dampening={values['dampening']}"
        )


def _check_devices(groups: list[dict[str, Any]]) -> None:
    first = next((p.device for group in groups for p in group["params"]), None)
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.device != first:
                raise ValueError(
                    f"{name_of(groups, g, i)} is on {param.device}, the parameters before it are on {first}; "
                    "move the model to one device before making the optimizer, or make one optimizer a device"
                )


def _check_sizes(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    remedy = "build the optimizer as it was built when this state was saved"
    if len(groups) != len(saved):
        raise ValueError(f"the state_dict has {len(saved)} parameter groups, the optimizer {len(groups)}; {remedy}")
    for g, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"parameter group {g}: the state_dict has {len(other['params'])} parameters, the optimizer "
                f"{len(group['params'])}; {remedy}"
            )


def _check_buffers(groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            buffer = state[param].get("momentum_buffer") if param in state else None
            if buffer is not None and getattr(buffer, "shape", None) != param.shape:
                raise ValueError(
                    f"{name_of(groups, g, i)}: the momentum_buffer to load is "
                    f"{tuple(buffer.shape) if isinstance(buffer, Tensor) else buffer!r}, the parameter has shape "
                    f"{tuple(param.shape)}; load the state of a model of the same shapes"
                )
