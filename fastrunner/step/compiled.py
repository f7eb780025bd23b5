"""Recipe ``compile``: torch.compile on the model or on named submodules; the update stays the fused one.

For models whose ``train_step`` reads the host or branches on data: torch.compile breaks its graph there and goes on.
The modules stay what they are, by name, parameters and hooks: only their call is compiled (``nn.Module.compile``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .torch_private import Unfit


class CompiledModules:
    """``train_step`` with some of the model's modules compiled, each when it is first called.

    The first step runs without: whether it calls the model itself (then that is compiled) or only its parts (then they
    are). Named modules are compiled from the first step on.

    Args:
        model: the runner's, without wrapper.
        call: the ``train_step`` to run.
        names: of submodules.
        warn: told once if compiling fails; the modules then run as they are.
    Raises:
        Unfit: there is no module of a name; it says which there are.

    Attributes:
        compiled: names of the modules that are; "" is the model.
    """

    def __init__(
        self, model: nn.Module, call: Callable[..., Any], names: tuple[str, ...], warn: Callable[[str], None]
    ) -> None:
        self._model, self._call, self._warn = model, call, warn
        self._modules = dict(model.named_modules())
        self.compiled: tuple[str, ...] = ()
        self._state = "named" if names else "new"
        if missing := [name for name in names if name not in self._modules]:
            known = ", ".join(name for name, _ in model.named_children())
            raise Unfit(f"there is no submodule {missing[0]!r} to compile; the model has {known}")
        self._names = names

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> Any:
        if self._state == "ready":
            return self._guarded(data_batch, optimizer, kwargs)
        if self._state == "off":
            return self._call(data_batch, optimizer, **kwargs)
        if self._state == "named":
            self._compile(self._names)
            return self._guarded(data_batch, optimizer, kwargs)
        called: list[int] = []
        watch = self._model.register_forward_pre_hook(lambda *_: called.append(1))
        try:
            outputs = self._call(data_batch, optimizer, **kwargs)
        finally:
            watch.remove()
        parts = tuple(name for name, child in self._model.named_children() if any(True for _ in child.parameters()))
        self._compile(("",) if called or not parts else parts)
        return outputs

    def _compile(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._modules[name].compile()  # a second shape is compiled once more, for all shapes
        self.compiled, self._state = names, "ready"

    def _guarded(self, data_batch: Any, optimizer: Any, kwargs: dict[str, Any]) -> Any:
        """The step; once more without the compiler where that fails. (A step has not updated anything yet.)"""
        generator = torch.get_rng_state() if not self._has_run else None
        try:
            outputs = self._call(data_batch, optimizer, **kwargs)
        except Exception as error:
            if not _of_compiler(error):
                raise
            self.undo()
            if generator is not None:
                torch.set_rng_state(generator)
            text = str(error).strip().splitlines()
            names = ", ".join(self.compiled) or "the model"
            self._warn(f"torch.compile failed on {names}: {text[0][:300] if text else error!r}. It runs without.")
            return self._call(data_batch, optimizer, **kwargs)
        self._has_run = True
        return outputs

    _has_run = False

    def undo(self) -> None:
        """Let the modules run as they are."""
        for name in self.compiled:
            self._modules[name]._compiled_call_impl = None
        self._state = "off"

    def explain(self) -> list[str]:
        """What is compiled, in how many pieces, and why torch broke graphs, as far as it counts reasons.

        ``TORCH_LOGS=graph_breaks`` makes torch print each break with its line.
        """
        if self._state != "ready":
            return ["nothing is compiled" + (", torch.compile failed" if self._state == "off" else " yet")]
        from torch._dynamo.utils import counters

        names = ", ".join(name or "the model" for name in self.compiled)
        breaks = [str(reason).strip().splitlines()[0] for reason in counters["graph_break"]]
        pieces = f"{counters['stats']['unique_graphs']} graphs so far"
        return [f"torch.compile on {names}: {pieces}", *(f"a graph break: {reason}" for reason in breaks)]


def _of_compiler(error: BaseException | None) -> bool:
    """Whether an error came out of dynamo or inductor, not out of the user's code."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return True
        error = error.__cause__
    return False
