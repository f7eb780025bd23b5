"""What is wrong with options of an optimizer, and with a state to load; errors name group and parameter."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from .names import ParamGroups, name_of

REMEDY = "build the optimizer as it was built when this state was saved"


def number(value: object) -> float | None:
    """The value as a float, if it is a number or a tensor of one."""
    if type(value) is float:  # asking for a Real takes a microsecond
        return value
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, Real) else None


def positive(name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not > 0.
    """
    result = number(value)
    if result is None:
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not result > 0:  # also catches NaN
        raise ValueError(f"{name} must be > 0, got {result}; to train without clipping, do not pass it")
    return result


def option(index: int, name: str, value: object) -> float:
    """A group's option as a float.

    Raises:
        TypeError: it is not a number.
    """
    result = number(value)
    if result is None:
        hint = "; YAML reads 1e-3 as text, write 1.0e-3" if isinstance(value, str) else ""
        kind = type(value).__name__
        raise TypeError(f"parameter group {index}: {name} must be a number, got {value!r} ({kind}){hint}")
    return result


def not_negative(index: int, group: dict[str, Any], names: Iterable[str]) -> None:
    """Check that these options of a group are numbers >= 0.

    Raises:
        TypeError: one is not a number.
        ValueError: one is negative.
    """
    for name in names:
        if not (value := option(index, name, group[name])) >= 0:  # also catches NaN
            raise ValueError(f"parameter group {index}: {name} must be >= 0, got {value}")


def check_sgd(index: int, group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError if a group's options make no sense for SGD."""
    not_negative(index, group, ("lr", "momentum", "weight_decay"))
    momentum, dampening = option(index, "momentum", group["momentum"]), option(index, "dampening", group["dampening"])
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"parameter group {index}: nesterov wants momentum > 0 and dampening == 0, got "
            f"momentum={momentum} and dampening={dampening}"
        )


def check_adam(index: int, group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError if a group's options make no sense for Adam."""
    not_negative(index, group, ("lr", "eps", "weight_decay"))
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"parameter group {index}: betas must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0 <= (value := option(index, f"betas[{i}]", beta)) < 1:  # also catches NaN
            raise ValueError(f"parameter group {index}: betas[{i}] must be in [0, 1), got {value}")


def check_devices(groups: ParamGroups) -> None:
    """Raise ValueError unless all parameters are on one device."""
    first = next((p.device for group in groups for p in group["params"]), None)
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.device != first:
                raise ValueError(
                    f"{name_of(groups, g, i)} is on {param.device}, the parameters before it are on {first}; "
                    "move the model to one device before making the optimizer, or make one optimizer a device"
                )


def check_sizes(groups: ParamGroups, saved: list[dict[str, Any]]) -> None:
    """Raise ValueError unless there are as many groups and parameters as were saved."""
    if len(groups) != len(saved):
        raise ValueError(f"the state_dict has {len(saved)} parameter groups, the optimizer {len(groups)}; {REMEDY}")
    for g, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"parameter group {g}: the state_dict has {len(other['params'])} parameters, the optimizer "
                f"{len(group['params'])}; {REMEDY}"
            )


def check_shapes(groups: ParamGroups, state: dict[Any, Any], keys: Iterable[str]) -> None:
    """Raise ValueError if a state tensor to load has not its parameter's shape."""
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            for key in keys:
                value = state[param].get(key) if param in state else None
                if value is not None and getattr(value, "shape", None) != param.shape:
                    raise ValueError(
                        f"{name_of(groups, g, i)}: the {key} to load is "
                        f"{tuple(value.shape) if isinstance(value, Tensor) else repr(value)}, the parameter has shape "
                        f"{tuple(param.shape)}; load the state of a model of the same shapes"
                    )
