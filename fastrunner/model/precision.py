"""MMCV's decorators for mixed precision, on ``torch.amp``: parts of a model in half precision, parts in float32.

They do nothing until ``wrap_fp16_model`` (called by Fp16OptimizerHook) switches the modules on that have the attribute
``fp16_enabled``. The half type is float16, or the module's ``fp16_dtype``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

F = TypeVar("F", bound=Callable[..., Any])


def cast_tensor_type(inputs: Any, src_type: torch.dtype, dst_type: torch.dtype) -> Any:
    """``inputs`` with its tensors of ``src_type`` as ``dst_type``; lists, tuples, sets and mappings are walked through.

    Everything else (modules, strings, arrays, numbers, iterators) comes back as it is.
    """
    if isinstance(inputs, Tensor):
        return inputs.to(dst_type) if inputs.dtype == src_type else inputs
    if isinstance(inputs, (str, bytes)):
        return inputs
    kind: Any = type(inputs)
    if isinstance(inputs, Mapping):
        return kind({key: cast_tensor_type(value, src_type, dst_type) for key, value in inputs.items()})
    if isinstance(inputs, (Sequence, Set)) and not isinstance(inputs, range):
        items = [cast_tensor_type(item, src_type, dst_type) for item in inputs]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)  # a namedtuple takes its fields one by one
    return inputs


def auto_fp16(
    apply_to: Iterable[str] | None = None,
    out_fp32: bool = False,
    supported_types: tuple[type, ...] = (nn.Module,),
) -> Callable[[F], F]:
    """Decorate a method to run in half precision: its float32 tensor arguments are cast, and autocast is on.

    Args:
        apply_to: names of the arguments to cast; None: all that the method names. What it takes by ``*args`` and
            ``**kwargs`` without naming is passed on as it is.
        out_fp32: cast half outputs back to float32.
        supported_types: classes whose methods may be decorated.
    Raises:
        TypeError: when called: the first argument is not of ``supported_types``.
    """

    def decorate(method: F) -> F:
        return _cast_around(method, apply_to, out_fp32, to_half=True, supported_types=supported_types)

    return decorate


def force_fp32(apply_to: Iterable[str] | None = None, out_fp16: bool = False) -> Callable[[F], F]:
    """Decorate a method to run in float32: its half tensor arguments are cast, and autocast is off.

    Args:
        apply_to: as in :func:`auto_fp16`.
        out_fp16: cast float32 outputs to the half type.
    Raises:
        TypeError: when called: the first argument is not an ``nn.Module``.
    """

    def decorate(method: F) -> F:
        return _cast_around(method, apply_to, out_fp16, to_half=False, supported_types=(nn.Module,))

    return decorate


def _cast_around(
    method: F, apply_to: Iterable[str] | None, cast_back: bool, to_half: bool, supported_types: tuple[type, ...]
) -> F:
    positional, keywords = _castable(method, apply_to)
    word = "auto_fp16" if to_half else "force_fp32"

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, supported_types):
            kinds = ", ".join(kind.__name__ for kind in supported_types)
            raise TypeError(f"@{word} can only be used to decorate the method of {kinds}, not of {type(self).__name__}")
        if not getattr(self, "fp16_enabled", False):
            return method(self, *args, **kwargs)
        half = getattr(self, "fp16_dtype", torch.float16)
        source, target = (torch.float32, half) if to_half else (half, torch.float32)
        new_args = [
            cast_tensor_type(arg, source, target) if position in positional else arg
            for position, arg in enumerate(args, start=1)
        ]
        new_kwargs = {
            name: cast_tensor_type(arg, source, target) if name in keywords else arg for name, arg in kwargs.items()
        }
        with torch.amp.autocast(_device_type(self), dtype=half, enabled=to_half):
            output = method(self, *new_args, **new_kwargs)
        return cast_tensor_type(output, target, source) if cast_back else output

    return wrapper  # type: ignore[return-value]


def _castable(method: Callable[..., Any], apply_to: Iterable[str] | None) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the arguments to cast. Worked out once a method, not once a call."""
    spec = inspect.getfullargspec(method)
    names = frozenset(spec.args if apply_to is None else apply_to)
    return frozenset(i for i, name in enumerate(spec.args) if name in names), names


def _device_type(module: Any) -> str:
    """Where the module's first parameter is; autocast is per device type."""
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if first is not None:
        return first.device.type
    return "cuda" if torch.cuda.is_available() else "cpu"


def wrap_fp16_model(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Switch on the decorators of every module inside ``model`` that has ``fp16_enabled``; weights stay float32.

    Args:
        dtype: ``torch.float16`` or ``torch.bfloat16``.
    Raises:
        ValueError: another ``dtype``.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"half precision is torch.float16 or torch.bfloat16, got {dtype}")
    for module in model.modules():
        if hasattr(module, "fp16_enabled"):
            switched: Any = module
            switched.fp16_enabled, switched.fp16_dtype = True, dtype


def patch_norm_fp32(module: nn.Module) -> nn.Module:
    """Keep the norm layers of a model whose weights were made half in float32; their inputs are cast for them.

    For projects that call ``model.half()`` themselves; ``wrap_fp16_model`` needs none of it.
    """
    if isinstance(module, (_BatchNorm, nn.GroupNorm)):
        module.float()
        if isinstance(module, nn.GroupNorm):  # on a GPU batch norm takes half inputs with float32 weights
            norm: Any = module
            norm.forward = patch_forward_method(module.forward, torch.half, torch.float)
    for child in module.children():
        patch_norm_fp32(child)
    return module


def patch_forward_method(
    func: Callable[..., Any], src_type: torch.dtype, dst_type: torch.dtype, convert_output: bool = True
) -> Callable[..., Any]:
    """``func`` with its tensor arguments cast to ``dst_type``, and its outputs back."""

    def new_forward(*args: Any, **kwargs: Any) -> Any:
        output = func(*cast_tensor_type(args, src_type, dst_type), **cast_tensor_type(kwargs, src_type, dst_type))
        return cast_tensor_type(output, dst_type, src_type) if convert_output else output

    return new_forward


class LossScaler:
    """The loss scale of torch before 1.6, for projects that still make one; hooks use ``torch.amp.GradScaler``.

    Args:
        init_scale: the first scale.
        mode: "dynamic": divided by ``scale_factor`` (never below 1) at an overflow, multiplied by it after
            ``scale_window`` iterations without one. "static": stays.
    Raises:
        ValueError: another ``mode``.
    """

    def __init__(
        self,
        init_scale: float = 2**32,
        mode: str = "dynamic",
        scale_factor: float = 2.0,
        scale_window: int = 1000,
    ) -> None:
        if mode not in ("dynamic", "static"):
            raise ValueError(f'mode can only be "dynamic" or "static", got {mode!r}')
        self.cur_scale = init_scale
        self.cur_iter = 0
        self.mode = mode
        self.last_overflow_iter = -1
        self.scale_factor = scale_factor
        self.scale_window = scale_window

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def has_overflow(self, params: Iterable[nn.Parameter]) -> bool:
        """Whether a gradient has an inf or NaN. Reads the device; always False in static mode."""
        if self.mode != "dynamic":
            return False
        return any(p.grad is not None and not torch.isfinite(p.grad).all() for p in params)

    def update_scale(self, overflow: bool) -> None:
        if self.mode != "dynamic":
            return
        if overflow:
            self.cur_scale = max(self.cur_scale / self.scale_factor, 1)
            self.last_overflow_iter = self.cur_iter
        elif (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0:
            self.cur_scale *= self.scale_factor
        self.cur_iter += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state_dict[name])


__all__ = [
    "LossScaler",
    "auto_fp16",
    "cast_tensor_type",
    "force_fp32",
    "patch_forward_method",
    "patch_norm_fp32",
    "wrap_fp16_model",
]
