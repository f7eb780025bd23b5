"""Host reads in a traced step: those that only reach the log become tensors, read where a log is due.

    log_vars[name] = value.item()              the graph returns value itself
    log_vars["total"] = a.item() + b.item()    the graph returns float64(a) + float64(b): what Python would have added

Any other use of a read value is refused with the user's line: the graph would take it for constant.
"""

from __future__ import annotations

import operator
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, TracebackType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .torch_private import OWN, Unfit

LIBRARIES = (sys.prefix, sysconfig.get_paths()["stdlib"])  # no user's code, where there is other code in the stack
READ = torch.ops.aten._local_scalar_dense.default
# What Python numbers that were read are computed with -> the same for 0-D tensors.
ARITHMETIC: dict[Any, Any] = {
    operator.add: torch.ops.aten.add.Tensor,
    operator.sub: torch.ops.aten.sub.Tensor,
    operator.mul: torch.ops.aten.mul.Tensor,
    operator.truediv: torch.ops.aten.div.Tensor,
    operator.pow: torch.ops.aten.pow.Tensor_Tensor,
    operator.neg: torch.ops.aten.neg.default,
    operator.abs: torch.ops.aten.abs.default,
    torch.sym_float: None,  # a conversion, which happens anyway
}


def lift_host_reads(graph: GraphModule, lines: Sequence[str]) -> None:
    """Let the graph return tensors where it would return numbers that were read from them.

    Args:
        lines: where each read was made, in order.
    Raises:
        Unfit: a number is used for something else.
    """
    reads = [node for node in graph.graph.nodes if node.target is READ]
    origin = dict(zip(reads, lines, strict=True)) if len(lines) == len(reads) else {}
    numbers: dict[Node, Node] = {}  # number -> float64 or int64 tensor that equals it
    for node in graph.graph.nodes:
        operands = [arg for arg in node.args if isinstance(arg, Node) and arg in numbers]
        if node.target is READ:
            numbers[node] = _as_number(graph, node, node.args[0])
        elif operands and node.op != "output":
            if node.target not in ARITHMETIC:
                read = _read_behind(operands[0])
                line = origin.get(read) or line_of(read)
                raise Unfit(f"the step reads a value on the host and computes with it{line}")
            numbers[node] = _as_tensors(graph, node, numbers)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    for node in numbers:
        tensor: Any = node.args[0] if node.target is READ else numbers[node]
        node.replace_all_uses_with(tensor, lambda user: user is output)
    for node in reversed(list(numbers)):
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(lambda node: node not in set(numbers.values()))
    graph.recompile()


def _as_number(graph: GraphModule, node: Node, tensor: Any) -> Node:
    whole = isinstance(node.meta["val"], (torch.SymInt, int))
    with graph.graph.inserting_after(node):
        dtype = torch.int64 if whole else torch.float64
        return graph.graph.call_function(torch.ops.aten._to_copy.default, (tensor,), {"dtype": dtype})


def _as_tensors(graph: GraphModule, node: Node, numbers: dict[Node, Node]) -> Node:
    """The tensor that equals a number computed from numbers."""
    aten = torch.ops.aten
    dtype = torch.int64 if isinstance(node.meta["val"], (torch.SymInt, int)) else torch.float64

    def operand(arg: Any) -> Node:
        if arg in numbers and numbers[arg].kwargs.get("dtype") is dtype:
            return numbers[arg]
        if arg in numbers:
            return graph.graph.call_function(aten._to_copy.default, (numbers[arg],), {"dtype": dtype})
        return graph.graph.call_function(aten.scalar_tensor.default, (arg,), {"dtype": dtype})

    with graph.graph.inserting_before(node):
        operands = tuple(operand(arg) for arg in node.args)
        function = ARITHMETIC[node.target]
        return operands[0] if function is None else graph.graph.call_function(function, operands)


def _read_behind(node: Node) -> Node:
    """The first read that a number was computed from."""
    while node.target is not READ:
        node = next(iter(node.all_input_nodes))
    return node


def check_sizes(graph: GraphModule) -> None:
    """Raise Unfit where the size of a tensor depends on values: a boolean mask, ``nonzero``, ``unique``."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise Unfit(f"the step makes a tensor whose size depends on values{line_of(node)}")


def check_exchanges(graph: GraphModule) -> None:
    """Raise Unfit where processes exchange something: verification, which calls the step again, would wait for them."""
    for node in graph.graph.nodes:
        if getattr(node.target, "namespace", "") in ("c10d", "_c10d_functional"):
            raise Unfit(f"the step exchanges tensors with other processes{line_of(node)}")


# float(tensor) calls into C, which accepts nothing but a true float: it cannot be traced. So where it was called while
# tracing, the user's modules are given names ``float`` and ``int`` that read as ``item`` does.


class _Reading(type):
    number: ClassVar[type]

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.number)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.number)


class _Float(metaclass=_Reading):
    number = float

    def __new__(cls, value: Any = 0.0, *args: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.item()
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            return torch.sym_float(value)  # type: ignore[no-untyped-call]
        return float(value, *args)


class _Int(metaclass=_Reading):
    number = int

    def __new__(cls, value: Any = 0, *args: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_floating_point():
            value = value.item()
        return value if isinstance(value, torch.SymInt) else int(value, *args)


@contextmanager
def readable_numbers() -> Iterator[None]:
    """Within: ``float(x)`` and ``int(x)`` in a user's module trace as ``x.item()`` does."""
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            if _is_users(module):
                names = {name: kind for name, kind in (("float", _Float), ("int", _Int)) if name not in vars(module)}
                stack.enter_context(mock.patch.dict(vars(module), names))
        yield


def _is_users(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(module, ModuleType) and file is not None and not is_library(file)


def is_library(file: str) -> bool:
    """Whether a file holds Python's, torch's or our code."""
    return (file.startswith(LIBRARIES[1]) and "-packages" not in file) or any(own in file for own in OWN)


@contextmanager
def noting_prints(note: Callable[[str], None]) -> Iterator[None]:
    """Within: ``note`` gets the line where the user's code makes a text of a tensor. A graph would do it no more."""
    original: Any = Tensor.__repr__

    def shown(tensor: Tensor, **options: Any) -> Any:
        if "/torch/" not in sys._getframe(1).f_code.co_filename:
            note(here())
        return original(tensor, **options)

    with mock.patch.object(Tensor, "__repr__", shown):
        yield


def line_of(node: Any) -> str:
    """`` at file:line`` of the user's code that made the node, or what it was made from; empty if it is not known."""
    while isinstance(node, Node):
        for line in reversed((node.stack_trace or "").splitlines()):
            if line.strip().startswith("File") and not any(own in line for own in OWN):
                name, number = line.strip().split(", ")[:2]
                return f" at {name[6:-1]}:{number[5:]}"
        node = next(iter(node.all_input_nodes), None)
    return ""


def here() -> str:
    """`` at file:line`` of the user's code that is running."""
    return _of_frames(traceback.extract_stack())


def at(trace: TracebackType | None) -> str:
    """The same of an error that was raised while tracing."""
    return _of_frames(traceback.extract_tb(trace))


def _of_frames(stack: Sequence[traceback.FrameSummary]) -> str:
    frames = [f for f in stack if not any(own in f.filename for own in OWN)]
    frames = [f for f in frames if not f.filename.startswith(LIBRARIES)] or frames
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
