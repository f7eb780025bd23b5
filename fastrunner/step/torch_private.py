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
    ("torch._guards", "TracingContext"),
    ("torch._functorch.config", "force_non_lazy_backward_lowering"),
    ("torch._dynamo.utils", "graph_break_reasons"),
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

# The same for captured modules. Layouts stay as traced: what forward keeps for backward must lie as backward expects
# it, and inductor's cache tells these graphs from others by this very option.
INDUCTOR_HALVES = {"fallback_random": True, "layout_optimization": False}


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


def graph_of_bytes(data: bytes, symbolic: bool = False) -> GraphModule:
    """What ``graph_bytes`` made; ``symbolic``: some of its sizes may be symbols."""
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return cast(GraphModule, GraphPickler.loads(data, FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)))


class Lowered:
    """Half of a captured graph, forward or backward, in aten operations; inductor is still to compile it.

    Tensors that forward keeps for backward lie as they were traced: both halves are known before either is compiled.

    Attributes:
        graph: the operations.
        code: what runs them, given a list of inputs, which it empties; None before ``load``.
    """

    def __init__(self, graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> None:
        self.graph, self._inputs, self._options = graph, inputs, options
        self._context = tracing_context()
        self.code: Callable[[list[Any]], Any] | None = None
        if not options.get("is_backward"):
            (output,) = graph.graph.find_nodes(op="output")
            output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))

    def order(self) -> tuple[bytes, dict[str, Any]]:
        """For ``compile_order`` in another process."""
        names = ("static_input_idxs", "is_backward", "is_inference")
        plain: dict[str, Any] = {name: self._options[name] for name in names if name in self._options}
        return graph_bytes(self.graph), plain

    def load(self) -> None:
        """Compile here and now; about 0.1 s where inductor finds it in its cache on disk."""
        if self.code is None:
            self.code = compile_half(self.graph, self._inputs, self._options, self._context)


def lower(graph: GraphModule, inputs: Sequence[Any], context: Any) -> tuple[Callable[..., Any], list[Lowered]]:
    """A graph that dynamo captured as a function of the same inputs, and its halves, to be loaded before it is called.

    Args:
        inputs: those of the capture.
        context: ``tracing_context()`` of the capture.
    """
    import torch._functorch.config as functorch
    from torch._guards import tracing
    from torch._inductor.compile_fx import compile_fx

    halves: list[Lowered] = []

    def later(half: GraphModule, half_inputs: Sequence[Any], **options: Any) -> Any:
        lowered = Lowered(half, half_inputs, options)
        halves.append(lowered)

        def run(args: list[Any]) -> Any:
            assert lowered.code is not None
            return lowered.code(args)

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd's word for "takes a list"
        return run

    with tracing(context), functorch.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        call: Any = compile_fx(graph, list(inputs), inner_compile=later, config_patches=dict(INDUCTOR_HALVES))
    return call, halves


def compile_half(graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any], context: Any) -> Any:
    """One half by inductor."""
    import torch._inductor.config as inductor
    from torch._guards import tracing
    from torch._inductor.compile_fx import compile_fx_inner

    with inductor.patch(dict(INDUCTOR_HALVES)), tracing(context):
        return compile_fx_inner(graph, list(inputs), **options)


def compile_order(data: bytes, options: dict[str, Any]) -> None:
    """Compile a half that another process lowered, and leave it in inductor's cache."""
    from torch._guards import TracingContext

    graph = graph_of_bytes(data, symbolic=True)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = next(each.fake_mode for each in inputs if isinstance(each, Tensor))  # type: ignore[attr-defined]
    compile_half(graph, inputs, options, TracingContext(mode))


def tracing_context() -> Any:
    """What torch's compiler knows about the graph that it is making; None outside of it."""
    from torch._guards import TracingContext

    return TracingContext.try_get()


def num_graph_breaks() -> int:
    """How many times dynamo has broken a graph in this process."""
    from torch._dynamo.utils import graph_break_reasons

    return len(graph_break_reasons)


def graph_breaks(start: int) -> list[str]:
    """The breaks from number ``start`` on: ``file:line: torch's first reason``, each line once."""
    from torch._dynamo.utils import graph_break_reasons

    found: dict[str, str] = {}
    for each in graph_break_reasons[start:]:
        line = each.user_stack[-1] if each.user_stack else None
        found.setdefault(
            f"{line.filename}:{line.lineno}" if line else "a line unknown", each.reason.strip().splitlines()[0]
        )
    return [f"{place}: {reason}" for place, reason in found.items()]


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
