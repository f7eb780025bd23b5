"""One callable at one stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..registry import HOOKS
from .hook import Hook


@HOOKS.register_module()
class ClosureHook(Hook):
    """Calls ``fn(runner)`` at the stage ``fn_name``.

    Raises:
        ValueError: no such stage.
        TypeError: ``fn`` is not callable.
    """

    def __init__(self, fn_name: str, fn: Callable[[Any], Any]) -> None:
        if not hasattr(self, fn_name):
            raise ValueError(f"{fn_name!r} is not a stage of a hook; stages: {', '.join(self.stages)}")
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}")
        setattr(self, fn_name, fn)
