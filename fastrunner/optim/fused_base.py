"""What the fused optimizers share: ``torch.optim.Optimizer`` with norm, clip, update and average in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .algorithms import Algorithm
from .ema_term import EmaTerm
from .masters import KEY as MASTER
from .masters import needs_master
from .options import REMEDY, check_devices, check_shapes, check_sizes, positive
from .update import Update

CPU = torch.device("cpu")

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_F = TypeVar("_F", bound=Callable[..., Any])


def _without_dynamo(method: _F) -> _F:
    """The method itself. torch wraps some in a decorator that imports dynamo and inductor when called (2 s)."""
    return cast(_F, getattr(method, "__wrapped__", method))


_add_param_group = _without_dynamo(Optimizer.add_param_group)
_load_state_dict = _without_dynamo(Optimizer.load_state_dict)
_state_dict = _without_dynamo(Optimizer.state_dict)
_zero_grad = _without_dynamo(Optimizer.zero_grad)


class FusedOptimizer(Optimizer):
    """A torch optimizer whose step is one pass. Options and formula come from the subclass.

    Args:
        params: parameters, ``named_parameters()``, or dicts of parameter groups; all on one device.
        defaults: of the groups' options.
        clip_grad_norm: what ``step()`` clips the joint L2 norm of all gradients to; None: ``step()`` does not clip.
        ema_decay: ``step()`` also keeps averages of all parameters, ``a <- ema_decay * a + (1 - ema_decay) * p``,
            beginning with the parameters as the first step finds them; ``ema_state_dict()`` gives them.
        skip_nonfinite: ``step()`` updates nothing where the norm of the gradients is not finite. Averages move on.
    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the parameters are on several devices.
    """

    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    skip_nonfinite: bool = False

    _algorithm: ClassVar[Algorithm]
    _state_keys: ClassVar[tuple[str, ...]]  # names of state tensors of a parameter's shape
    _isa: str | None = None  # forces an instruction set; for tests
    _update: Update | None = None
    _grad_norm: Tensor | float | None = None
    _averages: dict[Tensor, Tensor] | None = None  # of all parameters, from the first step with ema_decay on
    _own_term: EmaTerm | None = None

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        clip_grad_norm: float | None,
        ema_decay: float | None,
        skip_nonfinite: bool,
    ) -> None:
        if clip_grad_norm is not None:
            self.clip_grad_norm = positive("clip_grad_norm", clip_grad_norm)
        if ema_decay is not None:
            self.ema_decay = positive("ema_decay", ema_decay)
            if not self.ema_decay < 1:
                raise ValueError(f"ema_decay must be in (0, 1), got {ema_decay}; for no averages, do not pass it")
        self.skip_nonfinite = bool(skip_nonfinite)
        super().__init__(params, defaults)

    @classmethod
    def _check_options(cls, index: int, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError if a group's options make no sense."""
        raise TypeError(f"{cls.__name__} does not say which options it takes")

    @property
    def rest(self) -> dict[tuple[int, int], str]:
        """(group, parameter) -> why torch updates it; as found in the last step, {} before the first."""
        return {} if self._update is None else self._update.rest

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
            ema: averages to take after the update instead of those of ``ema_decay``.
            zero: then set ``.grad`` of this optimizer's parameters to None.
        Returns:
            What ``closure`` returned.
        Raises:
            TypeError: an option is not a number, or a sparse gradient was to be clipped.
            ValueError: ``max_norm`` is not positive, or something in the state has not its parameter's shape.
            RuntimeError: torch's own cannot update one of ``rest`` either.
        """
        limit = self.clip_grad_norm if max_norm is None else positive("max_norm", max_norm)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if ema is None and self.ema_decay is not None:
            ema = self._term(self.ema_decay)
        update = self._update
        if update is None:
            update = self._update = Update(self._algorithm)
            update.isa = self._isa
        skip = self.skip_nonfinite
        grad_norm = update.step(self.param_groups, self.state, limit, write_back, ema, zero, skip)
        if limit is not None or skip:
            self._grad_norm = grad_norm
        return loss

    @property
    def grad_norm(self) -> Tensor | None:
        """Of the last step that took it, before clipping: float32, shape (), on the device; None before the first."""
        if isinstance(self._grad_norm, float):  # a tensor only where somebody looks: it takes as long as the norm
            self._grad_norm = torch.scalar_tensor(self._grad_norm, dtype=torch.float32, device=CPU)
        return self._grad_norm

    def clipped_step(self, max_norm: float, *, write_back: bool = True) -> Tensor:
        """``clip_grad_norm_`` over all gradients of this optimizer and ``step()``, in one pass.

        A norm that is not finite does what it does with ``error_if_nonfinite=False``: NaN spreads to all gradients and
        weights, inf scales every finite gradient to 0 (``skip_nonfinite`` spares the weights). Step hooks are called,
        and before the gradients are clipped. A gradient that several parameters share is scaled once; torch scales it
        once for each of them.

        Args:
            max_norm: bound on the joint L2 norm, in the unit of the gradients; > 0.
            write_back: leave the clipped gradients in ``.grad``. False saves 4 B per element; they stay unclipped.
        Returns:
            grad_norm before clipping: float32, shape (), on the device.
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
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            watched = (
                profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            )
            return watched_step(self, *args, **kwargs) if watched else func(self, *args, **kwargs)

        return step

    def _term(self, decay: float) -> EmaTerm:
        """The averages of ``ema_decay``, made where a parameter has none yet."""
        if self._own_term is None:
            if self._averages is None:
                self._averages = {}
            params = [p for group in self.param_groups for p in group["params"]]
            for p in params:
                if p not in self._averages:
                    dtype = torch.float32 if needs_master(p) else p.dtype
                    self._averages[p] = p.detach().to(dtype=dtype, copy=True)
            averages = [self._averages[p] for p in params]
            self._own_term = EmaTerm(params, averages, 1.0 - decay, of_masters=True)
        self._own_term.momentum = 1.0 - decay
        return self._own_term

    def ema_state_dict(self) -> dict[str | int, Tensor]:
        """The averages of ``ema_decay``, by the parameters' names, or by their numbers where it was given none.

        Those of 16-bit parameters are float32. They are the averages themselves, not copies.

        Raises:
            ValueError: the optimizer was made without ``ema_decay``.
        """
        if self.ema_decay is None:
            raise ValueError(f"{type(self).__name__} keeps averages only if it is made with ema_decay=...")
        term = self._term(self.ema_decay)
        names: list[str | int] = []
        for group in self.param_groups:
            names += group.get("param_names") or range(len(names), len(names) + len(group["params"]))
        return dict(zip(names, term.averages, strict=True))

    def _forget(self) -> None:
        """What was built for other parameters or state."""
        self._update = self._own_term = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it lacks are the constructor's. A group that is refused is not added."""
        _add_param_group(self, param_group)
        try:
            self._check_options(len(self.param_groups) - 1, self.param_groups[-1])
            check_devices(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""
        if not set_to_none or profiler._is_profiler_enabled:
            _zero_grad(self, set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As torch's, key by key; with the averages of ``ema_decay`` under ``"ema"``, by the parameters' numbers."""
        state = _state_dict(self)
        if self._averages is not None and self.ema_decay is not None:
            state["ema"] = dict(enumerate(self._term(self.ema_decay).averages))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of torch's gave; all of it or, on an error, nothing.

        Averages are loaded where both sides have them, and are otherwise left as they are.

        Raises:
            ValueError: other numbers of groups or parameters, or state of another shape; which one is said.
        """
        if not self._optimizer_load_state_dict_pre_hooks:  # such a hook may be there to mend exactly this
            check_sizes(self.param_groups, state_dict["param_groups"])
        _load_state_dict(self, state_dict)
        self._load_masters(state_dict)
        if self.ema_decay is not None and "ema" in state_dict:
            self._load_averages(state_dict["ema"])

    def _load_masters(self, state_dict: dict[str, Any]) -> None:
        """torch casts state to the parameter's dtype; that of 16-bit parameters is float32."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if needs_master(p) and i in state_dict["state"]:
                for key in (*self._state_keys, MASTER):
                    value = state_dict["state"][i].get(key)
                    if isinstance(value, Tensor):
                        self.state[p][key] = value.detach().to(device=p.device, dtype=torch.float32, copy=True)

    def _load_averages(self, saved: dict[int, Tensor]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        fitting = len(saved) == len(params) and all(saved[i].shape == p.shape for i, p in enumerate(params))
        if not fitting:
            raise ValueError(f"the averages to load are of other parameters; {REMEDY}")
        term = self._term(cast(float, self.ema_decay))
        with torch.no_grad():
            for i, average in enumerate(term.averages):
                average.copy_(saved[i])

    def __getstate__(self) -> dict[str, Any]:
        own = ("clip_grad_norm", "ema_decay", "skip_nonfinite", "_averages")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict comes through here as well
        check_shapes(state["param_groups"], state["state"], (*self._state_keys, MASTER))
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()
