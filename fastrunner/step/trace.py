"""A user's ``train_step``, its backward, clip, update and average, as one flat graph."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .binding import Binding
from .outputs import Outputs
from .terms import average, clip_coefficient, norm_of
from .torch_private import Unfit, swapped, trace

MAX_NODES = 12_000  # a guess at what is worth compiling, not measured; an LSTM unrolled over a long text has more
OWN = ("/torch/", "/fastrunner/", "<frozen", "<string>", "/contextlib.py", "/unittest/mock.py")


@dataclass(frozen=True)
class Traced:
    """A step as a graph.

    Attributes:
        graph: (binding's static, tensors of the batch) -> outputs.flat, grad_norm if it clips.
        has_grads: names of the trained parameters that got a gradient.
    """

    graph: GraphModule
    outputs: Outputs
    clips: bool
    averages: bool
    has_grads: frozenset[str]


def trace_step(
    binding: Binding, batch: Any, max_norm: float | None, step: Any = None, *, averages: bool = False
) -> Traced:
    """Trace one iteration of ``binding.model`` on ``batch``.

    Args:
        max_norm: clip to it; None: do not.
        step: instead of ``model.train_step``; called with the batch and the optimizer.
        averages: take the binding's average with the update.
    Raises:
        Unfit: the step cannot be a graph; it names the user's line where that is known.
    """
    leaves, spec = pytree.tree_flatten(batch)
    places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for at in places:
        if type(leaves[at]) is not Tensor or leaves[at].layout != torch.strided or leaves[at].requires_grad:
            raise Unfit(f"the batch holds a {type(leaves[at]).__name__} that is sparse or requires a gradient")
    step = binding.model.train_step if step is None else step
    found: dict[str, Any] = {}

    def body(*args: Tensor) -> tuple[Any, ...]:
        params, buffers, static = binding.split(args)
        for at, tensor in zip(places, args[len(static) :], strict=True):
            leaves[at] = tensor
        with torch.enable_grad():
            own = [p.detach().requires_grad_(q.requires_grad) for p, q in zip(params, binding.params.values(), strict=True)]  # fmt: skip # noqa: E501
            tensors = dict(zip(binding.params, own, strict=True)) | dict(zip(binding.buffers, buffers, strict=True))
            with swapped(binding.model, tensors):
                outputs = found["outputs"] = Outputs(step(pytree.tree_unflatten(leaves, spec), binding.optimizer))
                _check_buffers(binding.model, tensors)
                wanted = [own[each.param] for each in binding.trained]
                grads = torch.autograd.grad(found_loss(outputs), wanted, allow_unused=True)
        with torch.no_grad():
            norm = _update(binding, list(static), grads, max_norm, averages)
        found["grads"] = frozenset(e.name for e, g in zip(binding.trained, grads, strict=True) if g is not None)
        flat = [value.detach() if isinstance(value, Tensor) else value for value in outputs.flat]
        flat = [value.clone() if any(value is arg for arg in args) else value for value in flat]
        return (*flat, norm) if norm is not None else tuple(flat)

    args = [*binding.static, *(leaves[at] for at in places)]
    real, reads = list(leaves), list[str]()
    try:
        graph = trace(body, args, lambda: reads.append(_here()))
    except Unfit as error:
        raise Unfit(f"{error}{_at(error.__traceback__)}", error.passing) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise Unfit(f"tracing raised {reason[:300]}{_at(error.__traceback__)}") from error
    finally:
        leaves[:] = real
    _check_constants(graph)
    _lift_host_reads(graph, reads)
    _fill_in_memory_order(graph)
    if len(graph.graph.nodes) > MAX_NODES:
        raise Unfit(f"the graph has {len(graph.graph.nodes)} operations, more than {MAX_NODES}")
    return Traced(graph, found["outputs"], max_norm is not None, averages, found["grads"])


def found_loss(outputs: Outputs) -> Tensor:
    """The loss with its graph."""
    loss = outputs.loss
    if loss.numel() != 1 or not loss.requires_grad:
        raise Unfit("the loss is not one value that depends on the parameters")
    return loss


def _update(
    binding: Binding, static: list[Tensor], grads: Sequence[Tensor | None], max_norm: float | None, averages: bool
) -> Tensor | None:
    """Clip, update and average on the flat list; the norm before clipping, None without clipping."""
    norm, row = None, static[-1]
    if max_norm is not None:
        norm = norm_of([g for g in grads if g is not None])
        coefficient = clip_coefficient(norm, max_norm)
        grads = [None if g is None else g * coefficient for g in grads]
    for each, grad in zip(binding.trained, grads, strict=True):
        rule = binding.rules[each.group]
        if grad is None:
            if each.state:
                raise Unfit(f"{each.name} has no gradient in this step, but had one before", passing=True)
            continue
        if grad.layout != torch.strided:
            raise Unfit(f"{each.name} has a sparse gradient")
        if rule.keys and not each.state:
            raise Unfit(f"the first update of {each.name} is still to come", passing=True)
        rule.apply(static[each.param], grad, [static[at] for at in each.state], binding.row_of(each.group, row))
    if binding.counters is not None:
        static[-2].add_(1)
    if averages:
        average([static[a] for a, _ in binding.average_pairs], [static[p] for _, p in binding.average_pairs], row[-2:])
    return norm


def _check_buffers(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise Unfit where the step put another tensor in a buffer's place: the write would be lost."""
    ours = {id(tensor) for tensor in tensors.values()}
    for prefix, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in ours:
                raise Unfit(f"the step puts another tensor into {prefix}.{name}; write into it: {name}.copy_(...)")


def _check_constants(graph: GraphModule) -> None:
    """Raise Unfit for tensors that are neither parameters, buffers nor of the batch: their changes would be lost."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = getattr(graph, node.target, None)
            if isinstance(value, Tensor) and value.numel() > 1:
                raise Unfit(f"the step reads a tensor that is no buffer{_line(node)}; register_buffer makes it one")


def _lift_host_reads(graph: GraphModule, lines: Sequence[str]) -> None:
    """``x.item()`` that only reaches the outputs becomes ``x`` itself, read where a log is due.

    Args:
        lines: where each was called, in order.
    """
    reads = [node for node in graph.graph.nodes if node.target is torch.ops.aten._local_scalar_dense.default]
    for number, node in enumerate(reads):
        if any(user.op != "output" for user in node.users):
            line = lines[number] if len(lines) == len(reads) else _line(node)
            raise Unfit(f"the step reads a value on the host and computes with it{line}")
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()


def _fill_in_memory_order(graph: GraphModule) -> None:
    """Let dropout masks be drawn in the order that eager draws them in: that of their memory.

    A mask is made like its input, which may be transposed; the compiler would lay it out anew, and each draw would land
    in another place. So it is drawn dense and looked at transposed.
    """
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is not aten.bernoulli_.float or node.args[0].target is not aten.empty_like.default:
            continue
        mask = node.meta["val"]
        order = sorted(range(mask.dim()), key=lambda i: (-mask.stride(i), i))  # used in this turn
        if order == list(range(mask.dim())):
            continue
        shape = [mask.shape[i] for i in order]
        with graph.graph.inserting_before(node):
            options = {"dtype": mask.dtype, "device": mask.device, "pin_memory": False}
            dense = graph.graph.call_function(aten.empty.memory_format, (shape,), options)
            drawn = graph.graph.call_function(aten.bernoulli_.float, (dense, *node.args[1:]))
            back = [order.index(i) for i in range(mask.dim())]
            seen = graph.graph.call_function(aten.permute.default, (drawn, back))
        old = node.args[0]
        node.replace_all_uses_with(seen)
        graph.graph.erase_node(node)
        old.replace_all_uses_with(seen)
        graph.graph.erase_node(old)
    graph.recompile()


def _line(node: Any) -> str:
    """`` at file:line`` of the user's code that made the node, or what it was made from; empty if it is not known."""
    while isinstance(node, Node):
        for line in reversed((node.stack_trace or "").splitlines()):
            if line.strip().startswith("File") and not any(own in line for own in OWN):
                name, number = line.strip().split(", ")[:2]
                return f" at {name[6:-1]}:{number[5:]}"
        node = next(iter(node.all_input_nodes), None)
    return ""


def _here() -> str:
    """`` at file:line`` of the user's code that is running."""
    return _of_frames(traceback.extract_stack())


def _at(trace: TracebackType | None) -> str:
    """The same of an error that was raised while tracing."""
    return _of_frames(traceback.extract_tb(trace))


def _of_frames(stack: Sequence[traceback.FrameSummary]) -> str:
    frames = [f for f in stack if not any(own in f.filename for own in OWN)]
    frames = [f for f in frames if not f.filename.startswith(sys.prefix)] or frames
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
