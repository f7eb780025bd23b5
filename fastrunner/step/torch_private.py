"""Everything that recipes use of torch and that torch does not promise: one place to look when torch changes.

``missing`` says what this torch lacks; a recipe that needs it is then refused, and the run goes on with the one below.
tests/step/test_torch_private.py pins what is relied on. Importing this module imports no compiler; calling does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

NEEDED = (
    ("torch.fx.experimental.proxy_tensor", "make_fx"),
    ("torch.nn.utils.stateless", "_reparametrize_module"),
    ("torch.compiler", "_non_strict_tracing_context"),
    ("torch._inductor.compile_fx", "compile_fx"),
    ("torch._inductor.compile_fx", "compile_fx_inner"),
    ("torch.utils.checkpoint", "checkpoint"),
    ("torch.fx.proxy", "TracerBase"),
)
# Asserts on sizes cost 0.1 us an input each call; our own guards have looked at all of them.
# fallback_random: torch's own generator and its bits, so that a graph draws what eager would.
INDUCTOR = {"size_asserts": False, "alignment_asserts": False, "fallback_random": True}
# Files whose lines are not the user's.
OWN = ("/torch/", "/fastrunner/", "<frozen", "<string>", "/contextlib.py", "/unittest/mock.py")
# The same for libraries, and without what only debuggers read.
AHEAD = {
    **INDUCTOR,
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.enable_line_tables": False,
}
NEEDED_AHEAD = (("torch._inductor", "aot_compile"), ("torch.fx._graph_pickler", "GraphPickler"))
PROXY = b"aoti_torch_proxy_executor_call_function"  # what a library calls that needs more than C functions


class Unfit(Exception):
    """Why a recipe cannot run this step. The recipe below it does.

    Attributes:
        passing: it may fit later; ask again.
    """

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


def missing() -> str | None:
    """What this torch lacks of what graphs are made with; None if nothing. Imports inductor."""
    return _lacks(NEEDED)


def ahead_missing() -> str | None:
    """The same of what libraries are made with."""
    return _lacks(NEEDED_AHEAD)


def _lacks(needed: Sequence[tuple[str, str]]) -> str | None:
    for module, name in needed:
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"torch {torch.__version__} has no {module}.{name} ({error})"
    return None


@contextlib.contextmanager
def swapped(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Within: the model computes with these tensors for its parameters and buffers. Tied ones follow."""
    from torch.nn.utils import stateless

    with stateless._reparametrize_module(model, tensors, tie_weights=True, strict=False):
        yield


def trace(body: Callable[..., Any], args: Sequence[Tensor], on_item: Callable[[], None]) -> GraphModule:
    """``body(*args)`` as one flat graph of aten operations. Runs ``body`` once on fake tensors; computes nothing.

    ``on_item`` is called at each ``Tensor.item()``: torch does not note which line a host read came from.

    Checkpointed regions run inline: the recomputation restores random states in Python, which is not traced, so that
    gradients behind a dropout would be wrong. (A graph keeps what it needs anyway.) oneDNN is off: its LSTM has an
    operand that cannot be traced.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.proxy import TracerBase

    with (
        torch.no_grad(),
        torch.compiler._non_strict_tracing_context(),
        torch.autograd.set_multithreading_enabled(False),
        torch.backends.mkldnn.flags(enabled=False),
        _checkpoints_inline(),
        _alone(),
        mock.patch.object(Tensor, "register_hook", _no_hook),
        mock.patch.object(Tensor, "item", _noted_item(on_item)),
        mock.patch.object(TracerBase, "_filter_traceback_frames", _all_users_frames),
    ):
        return make_fx(body, tracing_mode="fake", record_stack_traces=True)(*args)


def compile_graph(graph: GraphModule, args: Sequence[Tensor]) -> tuple[Callable[[list[Tensor]], Sequence[Any]], bool]:
    """The graph compiled by inductor, as a function that consumes a list of inputs; and whether it is the inner one.

    The inner callable costs 12 us a call, with the wrappers around it 18. It is used only where they do nothing but
    pass on: one graph, whose inputs and outputs are ours.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner: list[Any] = []

    def remember(*inner_args: Any, **kwargs: Any) -> Any:
        code = compile_fx_inner(*inner_args, **kwargs)
        inner.append((code, len(inner_args[1])))
        return code

    with torch.no_grad():
        whole: Any = compile_fx(graph, list(args), inner_compile=remember, config_patches=dict(INDUCTOR))
    if len(inner) == 1 and inner[0][1] == len(args) and callable(getattr(inner[0][0], "current_callable", None)):
        return inner[0][0].current_callable, True
    return (lambda inputs: whole(*inputs)), False


def tensor_guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A function that says whether others have the same types, shapes, strides, dtypes, devices and requires_grad.

    It may say no where they have. None where this torch has no such function. Cost: 0.2 us, and 0.1 a tensor.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards  # what compiled functions of torch are guarded with

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (ImportError, TypeError):
        return None
    check: Callable[..., bool] = guards.check
    return check


def compile_ahead(graph: GraphModule, args: Sequence[Tensor], folder: Path) -> Path:
    """The graph as a shared library that AOTInductor made in ``folder``.

    Raises:
        Unfit: it calls an operation that has no C function; which one is said.
    """
    from torch._inductor import aot_compile

    options = {**AHEAD, "aot_inductor.output_path": str(folder / "step.so")}
    with torch.no_grad():
        made = aot_compile(graph, tuple(args), options=options)
    library = Path(cast(str, made))
    if PROXY in library.read_bytes():
        raise Unfit(f"{_without_c(folder)} has no C interface")
    return library


def _without_c(folder: Path) -> str:
    """Names of the operations that a library calls through the proxy executor, as AOTInductor listed them."""
    listed = [json.loads(file.read_text()) for file in folder.glob("*.wrapper.json")]
    names = {node["node"]["target"] for each in listed for node in each.get("nodes", ())}
    return ", ".join(sorted(names)) or "an operation"


def graph_bytes(graph: GraphModule) -> bytes:
    """A traced graph for another process; ``graph_of_bytes`` reads it there."""
    from torch.fx._graph_pickler import GraphPickler, Options

    return GraphPickler.dumps(graph, Options(ops_filter=None))


def graph_of_bytes(data: bytes) -> GraphModule:
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler

    return cast(GraphModule, GraphPickler.loads(data, FakeTensorMode()))


def _noted_item(note: Callable[[], None]) -> Callable[[Tensor], Any]:
    original, inside = Tensor.item, False

    def item(tensor: Tensor) -> Any:
        nonlocal inside
        if inside:  # a torch function mode comes back through here
            return original(tensor)
        note()
        inside = True
        try:
            return original(tensor)
        finally:
            inside = False

    return item


def _all_users_frames(tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
    """What a node's stack_trace is made of: torch alone keeps only functions called ``forward``."""
    return traceback.StackSummary.from_list([f for f in frames if not any(own in f.filename for own in OWN)])


def _no_hook(tensor: Tensor, hook: Any) -> Any:
    raise Unfit("a tensor hook is registered in the step")


def _alone() -> contextlib.AbstractContextManager[Any]:
    """Within, where this is the only process: ``all_reduce`` leaves its tensor as it is, which is what it does."""
    home = torch.distributed
    if not (home.is_available() and home.is_initialized() and home.get_world_size() == 1):
        return contextlib.nullcontext()
    original: Any = home.all_reduce

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return original(tensor, *args, **kwargs) if len(args) > 2 or kwargs.get("async_op") else None

    return mock.patch.object(home, "all_reduce", all_reduce)


@contextlib.contextmanager
def _checkpoints_inline() -> Iterator[None]:
    """Every function that a module of the process knows as torch's ``checkpoint`` runs its argument directly."""
    import sys

    import torch.utils.checkpoint as home

    original = home.checkpoint

    def inline(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name in ("use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state"):
            kwargs.pop(name, None)
        return function(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is original:
                    stack.enter_context(mock.patch.object(module, name, inline))
        yield
