"""A user's ``train_step``, its backward, clip, update and average, as one flat graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .binding import Binding
from .lift import at, check_exchanges, check_sizes, here, lift_host_reads, line_of, noting_prints, readable_numbers
from .outputs import Outputs
from .terms import average, clip_coefficient, norm_of
from .torch_private import Unfit, swapped, trace

DECIDES = "GuardOnDataDependentSymNode"  # what torch raises where Python wants a value while tracing
MAX_NODES = 12_000  # a guess at what is worth compiling, not measured; an LSTM unrolled over a long text has more


@dataclass(frozen=True)
class Traced:
    """A step as a graph.

    Attributes:
        graph: (binding's static, tensors of the batch) -> outputs.flat, grad_norm if it clips.
        has_grads: names of the trained parameters that got a gradient.
        updates: ends in an update; where not, gradients are only added to the binding's sums.
    """

    graph: GraphModule
    outputs: Outputs
    clips: bool
    averages: bool
    has_grads: frozenset[str]
    updates: bool = True


def trace_step(
    binding: Binding,
    batch: Any,
    max_norm: float | None,
    step: Any = None,
    *,
    averages: bool = False,
    updates: bool = True,
) -> Traced:
    """Trace one iteration of ``binding.model`` on ``batch``.

    Args:
        max_norm: clip to it; None: do not.
        step: instead of ``model.train_step``; called with the batch and the optimizer.
        averages: take the binding's average with the update.
        updates: whether there is an update, where gradients add up.
    Raises:
        Unfit: the step cannot be a graph; it names the user's line where that is known.
    """
    leaves, spec = pytree.tree_flatten(batch)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for leaf in (leaves[place] for place in places):
        if type(leaf) is not Tensor or leaf.layout != torch.strided or leaf.requires_grad:
            raise Unfit(f"the batch holds a {type(leaf).__name__} that is a subclass, sparse or requires a gradient")
    step = binding.model.train_step if step is None else step
    found: dict[str, Any] = {}

    def body(*args: Tensor) -> tuple[Any, ...]:
        params, buffers, static = binding.split(args)
        for place, tensor in zip(places, args[len(static) :], strict=True):
            leaves[place] = tensor
        with torch.enable_grad():
            own = [p.detach().requires_grad_(q.requires_grad) for p, q in zip(params, binding.params.values(), strict=True)]  # fmt: skip # noqa: E501
            tensors = dict(zip(binding.params, own, strict=True)) | dict(zip(binding.buffers, buffers, strict=True))
            with swapped(binding.model, tensors):
                outputs = found["outputs"] = Outputs(step(pytree.tree_unflatten(leaves, spec), binding.optimizer))
                _check_buffers(binding.model, tensors)
                wanted = [own[each.param] for each in binding.trained]
                loss = _scaled(found_loss(outputs), binding, static)
                grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        with torch.no_grad():
            norm = _update(binding, list(static), grads, max_norm, updates)
            if averages:
                pairs = binding.average_pairs
                average([static[a] for a, _ in pairs], [static[p] for _, p in pairs], static[-1][-2:])
        found["grads"] = frozenset(e.name for e, g in zip(binding.trained, grads, strict=True) if g is not None)
        flat = [value.detach() if isinstance(value, Tensor) else value for value in outputs.flat]
        flat = [value.clone() if any(value is arg for arg in args) else value for value in flat]
        return (*flat, norm) if norm is not None else tuple(flat)

    args = [*binding.static, *(leaves[place] for place in places)]
    real = list(leaves)
    try:
        graph = _traced(body, args)
    finally:
        leaves[:] = real
    _check_constants(graph)
    _fill_in_memory_order(graph)
    if len(graph.graph.nodes) > MAX_NODES:
        raise Unfit(f"the graph has {len(graph.graph.nodes)} operations, more than {MAX_NODES}")
    return Traced(graph, found["outputs"], max_norm is not None and updates, averages, found["grads"], updates)


def _traced(body: Any, args: Sequence[Tensor]) -> GraphModule:
    """The graph of ``body``, its host reads lifted.

    Raises:
        Unfit: it cannot be traced, or reads the host for more than the log.
    """
    try:
        return _trace_once(body, args, False)
    except Unfit as error:
        if type(error.__cause__).__name__ != DECIDES:
            raise
    return _trace_once(body, args, True)  # perhaps it only called float() or int() on a tensor


def _trace_once(body: Any, args: Sequence[Tensor], numbers: bool) -> GraphModule:
    reads, prints = list[str](), list[str]()
    try:
        with readable_numbers() if numbers else nullcontext(), noting_prints(prints.append):
            graph = trace(body, args, lambda: reads.append(here()))
    except Unfit as error:
        raise Unfit(f"{error}{at(error.__traceback__)}", error.passing) from error
    except Exception as error:
        lines = str(error).strip().splitlines()
        kind = type(error).__name__
        reason = f"tracing raised {kind}: {lines[0] if lines else ''}"
        if kind == DECIDES:
            reason = f"the step decides by the value of a tensor ({kind}: {lines[0]})"
        raise Unfit(f"{reason[:300]}{at(error.__traceback__)}") from error
    if prints:
        raise Unfit(f"the step makes a text of a tensor, which a graph would do only once{prints[0]}")
    check_sizes(graph)
    check_exchanges(graph)
    lift_host_reads(graph, reads)
    return graph


def found_loss(outputs: Outputs) -> Tensor:
    """The loss with its graph."""
    loss = outputs.loss
    if loss.numel() != 1 or not loss.requires_grad:
        raise Unfit("the loss is not one value that depends on the parameters")
    return loss


def _scaled(loss: Tensor, binding: Binding, static: Sequence[Tensor]) -> Tensor:
    """The loss that gradients are taken of."""
    if binding.sums:
        loss = loss / static[-1][-3].to(loss.dtype)
    return loss if binding.scale is None else loss * static[binding.scale]


def _update(
    binding: Binding, static: list[Tensor], grads: Sequence[Tensor | None], max_norm: float | None, updates: bool
) -> Tensor | None:
    """Add up, clip, update on the flat list; the norm before clipping, None without clipping."""
    if unlike := [e.name for e, g in zip(binding.trained, grads, strict=True) if g is not None and g.layout != torch.strided]:  # fmt: skip # noqa: E501
        raise Unfit(f"{unlike[0]} has a sparse gradient")
    sums = binding.sums_in(static)
    if not updates:
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)
        return None
    if sums:
        grads = [None if grad is None else total + grad for total, grad in zip(sums, grads, strict=True)]
        for total in sums:
            total.zero_()
    norm, found = None, None
    got = [at for at, grad in enumerate(grads) if grad is not None]
    if binding.scale is not None:
        assert binding.scale_rule is not None
        scale, tracker = static[binding.scale : binding.scale + 2]
        unscaled, found = binding.scale_rule.unscaled([g for g in grads if g is not None], scale)
        grads = [unscaled[got.index(at)] if at in got else None for at in range(len(grads))]
        binding.scale_rule.step(scale, tracker, found)
    if max_norm is not None:
        norm = norm_of([g for g in grads if g is not None])
        coefficient = clip_coefficient(norm, max_norm)
        grads = [None if g is None else g * coefficient for g in grads]
    _apply(binding, static, grads, found)
    return norm


def _apply(binding: Binding, static: list[Tensor], grads: Sequence[Tensor | None], found: Tensor | None) -> None:
    """Update each parameter and its state; where ``found`` is true they stay what they are."""
    row = static[-1]
    step = None if binding.counters is None else static[-2][0].double() + 1
    for each, grad in zip(binding.trained, grads, strict=True):
        rule = binding.rules[each.group]
        if grad is None:
            if each.state:
                raise Unfit(f"{each.name} has no gradient in this step, but had one before", passing=True)
            continue
        if rule.keys and not each.state:
            raise Unfit(f"the first update of {each.name} is still to come", passing=True)
        written = [static[each.param], *(static[at] for at in each.state)]
        new = written if found is None else [tensor.clone() for tensor in written]
        rule.apply(new[0], grad, new[1:], binding.row_of(each.group, row), step)
        if found is not None:
            for old, tensor in zip(written, new, strict=True):
                old.copy_(torch.where(found, old, tensor))
    if binding.counters is not None:
        static[-2].add_(1 if found is None else (~found).float())


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
                raise Unfit(f"the step reads a tensor that is no buffer{line_of(node)}; register_buffer makes it one")


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
