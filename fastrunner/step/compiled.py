"""Recipe ``compile``: torch.compile on the model or on named submodules; the update stays the fused one.

For models whose ``train_step`` reads the host or branches on data: torch.compile breaks its graph there and goes on.
The modules stay what they are, by name, parameters and hooks; only while ``train_step`` runs is their call another.

Dynamo captures graphs while a step runs, and torch runs them as they are, to eager's bits. Then inductor compiles them,
and before its code takes over, a step with it is compared with eager (``verify``), on two batches. So it is with the
first shape, and once more with the second, whose sizes dynamo makes symbols. ``MAX_CAPTURES`` bounds how often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .guards import SilentState
from .torch_private import Lowered, Unfit, graph_breaks, lower, missing, num_graph_breaks, tracing_context
from .trial import Snapshot, result_of
from .verify import Subject, compare, exact_result

MAX_CAPTURES = 6  # steps in which dynamo captured something new; dynamo's own bound, with a warning of its own, is 8


class Captured:
    """A graph that dynamo cut out of the modules, run by torch as it is until ``switch`` puts compiled code there."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
        self._graph, self._inputs, self._context = graph, inputs, tracing_context()
        self.halves: list[Lowered] = []
        self._compiled: Callable[..., Any] | None = None
        self._run: Callable[..., Any] = graph.forward

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def lower(self) -> None:
        """Make its halves known; to be done once."""
        self._compiled, self.halves = lower(self._graph, self._inputs, self._context)
        self._inputs = ()  # among them are activations

    def switch(self, on: bool) -> None:
        assert self._compiled is not None
        self._run = self._compiled if on else self._graph.forward


class CompiledModules:
    """``train_step`` with some of the model's modules compiled.

    The first step runs without: whether it calls the model itself (then that is compiled) or only its parts (then they
    are). The second captures; before the third the compiler runs, here and now.

    Args:
        model: the runner's, without wrapper.
        call: the ``train_step`` to run.
        names: of submodules.
        warn: told once if compiling fails; the modules then run as they are.
    Raises:
        Unfit: there is no module of a name, or this torch lacks something; it says what.

    Attributes:
        compiled: names of the modules that are; "" is the model.
        refused: why nothing is compiled (any more); "" as long as there is no reason.
    """

    def __init__(
        self, model: nn.Module, call: Callable[..., Any], names: tuple[str, ...], warn: Callable[[str], None]
    ) -> None:
        self._model, self._call, self._warn = model, call, warn
        self._modules = dict(model.named_modules())
        if unknown := [name for name in names if name not in self._modules]:
            known = ", ".join(name for name, _ in model.named_children())
            raise Unfit(f"there is no submodule {unknown[0]!r} to compile; the model has {known}")
        if lacks := missing():
            raise Unfit(lacks)
        self._names, self.compiled, self.refused = names, (), ""
        self._calls: list[tuple[nn.Module, Any]] = []  # modules, and their compiled call
        self._pieces: list[Captured] = []
        self._samples: list[Any] = []  # batches that captured something
        self._captures = self._num_lowered = self._num_ready = 0
        self._first_break = num_graph_breaks()
        self._moves = ""  # what a step changes that cannot be undone: then nothing is verified

    compiled: tuple[str, ...]

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> Any:
        if self.refused:
            return self._call(data_batch, optimizer, **kwargs)
        if not self._calls:
            return self._first(data_batch, optimizer, kwargs)
        waits = len(self._pieces) > self._num_ready and not self._compile(data_batch, optimizer, kwargs)
        if waits and (self.refused or self._num_ready == 0):
            return self._call(data_batch, optimizer, **kwargs)
        return self._capturing(data_batch, optimizer, kwargs)

    def _first(self, batch: Any, optimizer: Any, kwargs: dict[str, Any]) -> Any:
        """The step as it is; which modules it calls, and what else it changes."""
        self._samples = [pytree.tree_map(_copied, batch)]
        called: list[int] = []
        before = SilentState(self._model)
        watch = self._model.register_forward_pre_hook(lambda *_: called.append(1))
        try:
            outputs = self._call(batch, optimizer, **kwargs)
        finally:
            watch.remove()
        self._moves = next((moved for moved in before.moved() if not moved.startswith("the step draws")), "")
        names = self._names
        if not names:
            parts = tuple(name for name, child in self._model.named_children() if any(True for _ in child.parameters()))
            names = ("",) if called or not parts else parts
        self.compiled = names
        for module in (self._modules[name] for name in names):
            self._calls.append((module, torch.compile(_call_of(module), backend=self._capture)))
        return outputs

    def _capture(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Captured:
        """Dynamo's backend.

        Raises:
            Unfit: torch would not run the graph as eager runs the modules.
        """
        if any("checkpoint" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"):
            raise Unfit("they checkpoint activations, and a captured checkpoint draws other random numbers")
        self._pieces.append(Captured(graph, inputs))
        return self._pieces[-1]

    def _capturing(self, batch: Any, optimizer: Any, kwargs: dict[str, Any]) -> Any:
        """The step with the modules compiled, or being captured; as it is where that fails: nothing is updated yet."""
        num = len(self._pieces)
        generator = None if num and num == self._num_ready else torch.get_rng_state()
        try:
            outputs = self._with_modules(batch, optimizer, **kwargs)
        except Exception as error:
            if not _of_compiler(error):
                raise
            self._give_up(in_words(error))
            if generator is not None:
                torch.set_rng_state(generator)
            return self._call(batch, optimizer, **kwargs)
        if len(self._pieces) > num:
            self._note_capture(batch)
        return outputs

    def _note_capture(self, batch: Any) -> None:
        self._captures += 1
        self._samples = [pytree.tree_map(_copied, batch)]
        if self._captures > MAX_CAPTURES:
            self._give_up(f"batches of more than {MAX_CAPTURES} kinds came, each of which needs graphs of its own")

    def _with_modules(self, batch: Any, optimizer: Any, **kwargs: Any) -> Any:
        for module, call in self._calls:
            module.__dict__["_compiled_call_impl"] = call  # as nn.Module.compile() does
        try:
            return self._call(batch, optimizer, **kwargs)
        finally:
            for module, _ in self._calls:
                module.__dict__["_compiled_call_impl"] = None

    def _compile(self, batch: Any, optimizer: Any, kwargs: dict[str, Any]) -> bool:
        """Compile what was captured and let it take over, if it computes what eager does; False: not, or not now."""
        try:
            self._lower()
            self._load()
            self._verify(batch, optimizer, kwargs)
        except Unfit as error:
            self._give_up(str(error))
        except Exception as error:  # whatever a compiler raises: training goes on without it
            self._give_up(in_words(error))
        return not self.refused

    def _lower(self) -> None:
        self._num_lowered = len(self._pieces)
        for piece in self._new():
            piece.lower()

    def _new(self) -> list[Captured]:
        """What is being compiled."""
        return self._pieces[self._num_ready : self._num_lowered]

    def _load(self) -> None:
        for piece in self._new():
            for half in piece.halves:
                half.load()

    def _verify(self, batch: Any, optimizer: Any, kwargs: dict[str, Any]) -> None:
        """Switch the new pieces on, after two steps with them were compared with eager's.

        Raises:
            Unfit: they differ.
        """
        new, self._num_ready, num = self._new(), self._num_lowered, len(self._pieces)
        if self._moves:
            return _switch(new, True)
        call, subject = partial(self._call, **kwargs), Subject.of(self._model, optimizer)
        low = any(_is_low(half) for piece in new for half in piece.halves)
        with Snapshot(self._model, optimizer) as before:
            for each in (*self._samples, batch):
                eager = result_of(call, self._model, optimizer, each, before)
                exact = exact_result(subject, each, None, call)
                _switch(new, True)
                ours = result_of(partial(self._with_modules, **kwargs), self._model, optimizer, each, before)
                compare(ours, eager, exact, low)
        if len(self._pieces) > num:
            self._note_capture(batch)
        return None

    def _give_up(self, why: str, quiet: bool = False) -> None:
        self.refused = why
        self._calls, self._pieces, self._samples = [], [], []
        names = ", ".join(name or "the model" for name in self.compiled)
        if not quiet:
            self._warn(f"torch.compile on {names}: {why}. It runs without.")

    def explain(self) -> list[str]:
        """What is compiled, in how many graphs, and where torch broke them: file, line, torch's reason."""
        if self.refused:
            return [f"nothing is compiled: {self.refused}"]
        if not self._pieces:
            return ["nothing is compiled yet"]
        names = ", ".join(name or "the model" for name in self.compiled)
        lines = [f"torch.compile on {names}: {len(self._pieces)} graphs, {self._num_ready} of them compiled"]
        if self._moves:
            lines.append(f"not compared with eager, since running a step twice would show: {self._moves}")
        return [*lines, *(f"a graph breaks at {each}" for each in graph_breaks(self._first_break))]


def _call_of(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module runs, as a function for dynamo.

    ``_call_impl`` itself would not do: of modules whose forward is torch's own, such as nn.Sequential, dynamo compiles
    nothing then. Dynamo counts by code object, so each module gets one of its own.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    call.__code__ = call.__code__.replace()
    return call


def _switch(pieces: Sequence[Captured], on: bool) -> None:
    for piece in pieces:
        piece.switch(on)


def _is_low(half: Lowered) -> bool:
    """Whether some operation computes in 16 bits."""
    return any(
        isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point() and value.element_size() == 2
        for node in half.graph.graph.nodes
    )


def _of_compiler(error: BaseException | None) -> bool:
    """Whether an error came out of dynamo or inductor, not out of the user's code."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return True
        error = error.__cause__
    return False


def in_words(error: BaseException) -> str:
    """An error as part of a sentence."""
    error = getattr(error, "inner_exception", error)  # of a backend, that is of ours
    if isinstance(error, Unfit):
        return str(error)
    text = str(error).strip().splitlines()
    return f"it raised {type(error).__name__}: {text[0][:300] if text else ''}"


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
