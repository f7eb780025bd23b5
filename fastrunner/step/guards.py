"""What a compiled step silently takes for constant: found by comparing the state around one eager step.

Tracing runs the user's Python once. A draw from ``random``, a counter on a module, a buffer that is replaced by another
tensor, a number in the batch: each becomes a constant of the graph, with no error and wrong results. So

    before = SilentState(model);  one eager step;  before.moved() == []

is asked before any graph is trusted, and everything in a batch that is not a tensor is part of its ``batch_key``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Place = tuple[str, ...]  # where a value lives, from the module to the leaf
OF_TORCH = ("torch.", "fastrunner.")  # classes of these modules keep no state on themselves or in globals
OWN_TABLES = {"_parameters", "_buffers", "_modules"}
# Leaves of a batch that are equal where they mean the same. (An object that hashes by identity is new in each batch.)
VALUES = (type(None), bool, int, float, complex, str, bytes, Enum, np.generic, torch.dtype, torch.device, type, range)
DEPTH = 6  # of containers and objects in attributes
LEAVES = 20_000  # looked at in one attribute; a larger table (a cache, a vocabulary) is known by its size


class SilentState:
    """Python state that a step of ``model`` could read, as it is now.

    Seen: python's and numpy's global generators; attributes of all modules that are not tensors, with what containers
    and plain objects in them hold (generators and arrays by value); class attributes and module globals of the user's
    classes where they are numbers, texts or None; which tensors are parameters, buffers and plain attributes.
    Not seen: closures, files, the clock. Verification against eager over several batches is for those.

    Cost: one walk over all modules, about 45 us each. Not for every iteration.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._python, self._numpy = random.getstate(), _numpy_state()
        self._tensors = _tensors(model)
        self._kept = [dict(vars(module)) for module in model.modules()]  # an id must not be given to another object
        self._values = _values(model)

    def moved(self) -> list[str]:
        """What is different now, one sentence each; empty if nothing is. A graph of the step would be wrong."""
        found = []
        if random.getstate() != self._python:
            found.append("the step draws from python's random, which a graph would do only once")
        if _numpy_state() != self._numpy:
            found.append("the step draws from numpy.random, which a graph would do only once")
        now = _values(self._model)
        for place in self._values.keys() | now.keys():
            if self._values.get(place) != now.get(place):
                found.append(f"the step changes {'.'.join(place)}, which a graph would take for constant")
        tensors = _tensors(self._model)
        for name in self._tensors.keys() | tensors.keys():
            if self._tensors.get(name) is not tensors.get(name):
                found.append(f"the step puts another tensor into {name}; write into it instead: {name}.copy_(...)")
        return sorted(found)


def batch_key(batch: Any) -> tuple[Any, ...]:
    """What a graph is made for: structure, tensors' shape, dtype, strides, device, and all other leaves by value.

    Raises:
        TypeError: a leaf cannot be compared by value; which one is said.
    Cost: 5 us for two tensors. ``quick_key`` is for every iteration.
    """
    leaves, spec = pytree.tree_flatten(batch)
    return (spec, *map(_leaf_key, leaves))


def quick_key(batch: Any) -> Any:
    """The same as ``batch_key`` says, for dicts and sequences of tensors only; None for any other batch.

    Cost: 0.5 us, and 0.4 us a tensor.
    """
    kind = type(batch)
    values = batch.values() if kind is dict else batch
    if kind is not dict and kind is not tuple and kind is not list:
        return None
    key: list[Any] = [kind, *batch] if kind is dict else [kind]
    for value in values:
        if type(value) is not Tensor:
            return None
        key.append((value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
    return tuple(key)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided:
            return type(leaf), leaf.shape, leaf.layout, leaf.dtype, leaf.device
        return type(leaf), leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.str, leaf.shape, leaf.tobytes()
    if not isinstance(leaf, VALUES):
        raise TypeError(f"the batch holds a {type(leaf).__name__}, which cannot be compared by value")
    return type(leaf), repr(leaf) if isinstance(leaf, float) else leaf  # repr: NaN equals itself, 0.0 is not -0.0


def _numpy_state() -> tuple[Any, ...]:
    return tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state())


def _values(model: nn.Module) -> dict[Place, Any]:
    """Where -> what, of all state that is not a tensor of a module's own tables."""
    values: dict[Place, Any] = {}
    known = {*map(id, model.modules()), *map(id, _tensors(model).values())}  # looked at by themselves
    for name, module in model.named_modules():
        at = name or type(model).__name__
        for key, value in vars(module).items():
            if key not in OWN_TABLES:
                values[at, key] = _frozen(value, DEPTH, _Budget(known))
    for kind in {each for module in model.modules() for each in type(module).__mro__}:
        if kind is object or f"{kind.__module__}.".startswith(OF_TORCH):
            continue
        for key, value in vars(kind).items():
            if _is_plain(value) and not key.startswith("__"):
                values[kind.__qualname__, key] = value
        for key, value in vars(sys.modules.get(kind.__module__, object())).items() if _has_globals(kind) else ():
            if _is_plain(value) and not key.startswith("__"):
                values[kind.__module__, key] = value
    return values


def _has_globals(kind: type) -> bool:
    return hasattr(sys.modules.get(kind.__module__), "__dict__")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


class _Budget:
    """How many leaves are still looked at, and which objects (by id) need no look, or had theirs."""

    def __init__(self, known: set[int]) -> None:
        self.left = LEAVES
        self.seen = set(known)


def _frozen(value: Any, depth: int, budget: _Budget) -> Any:
    """A value that stays equal as long as ``value`` stays what it is."""
    budget.left -= 1
    if _is_plain(value):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if isinstance(value, Tensor):
        return id(value), None if id(value) in budget.seen else value._version
    if isinstance(value, np.ndarray):
        return id(value), value.dtype.str, value.shape, value.tobytes() if value.dtype != object else None
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, np.random.Generator):
        return id(value), repr(value.bit_generator.state)
    if depth <= 0 or budget.left <= 0 or id(value) in budget.seen:
        return id(value)
    budget.seen.add(id(value))
    return type(value), *_inside(value, depth, budget)


def _inside(value: Any, depth: int, budget: _Budget) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield len(value)
        for key, each in list(value.items()):
            yield _frozen(key, 1, budget), _frozen(each, depth - 1, budget)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield len(value)
        for each in list(value):
            yield _frozen(each, depth - 1, budget)
    else:
        yield id(value)
        if (not isinstance(value, type) and not callable(value)) or isinstance(value, nn.Module):
            for key, each in list(getattr(value, "__dict__", {}).items()):
                yield key, _frozen(each, depth - 1, budget)


def _tensors(model: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    found = {}
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                found[f"{prefix}.{name}" if prefix else name] = tensor
    return found
