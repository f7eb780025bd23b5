"""Whether a compiled step computes what eager computes: asked before it takes over, on real batches, on copies.

    |candidate - eager| <= FACTOR * max(|eager - float64|, noise * |eager|)

where ``noise`` is eager's own relative distance from a float64 run, the median over the gradients. Weights after an
optimizer such as Adam are no measure: a bias ahead of a BatchNorm, whose true gradient is zero, moves by the learning
rate from rounding alone. So the candidate is called with state and options that let its gradients be read off: zero
momenta, no decay.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..data import rng
from .binding import Binding
from .guards import SilentState
from .terms import EPS
from .torch_private import Unfit, swapped
from .trace import Traced

FACTOR = 10.0  # chosen, not calibrated: the compiled zoo passes with it, and the planted errors do not
LEAST_NOISE = 2e-6  # float32's last bits, over a few operations: where eager is exact by luck
RANDOM_NOISE = 1e-3  # where float64 is no reference: it draws other random numbers, or cannot run
LOW_NOISE = 2e-2  # the same with bfloat16 or float16 operations
MUCH_NOISE = 0.2  # above it float64 ran something else

Run = Callable[[list[Tensor]], Sequence[Any]]


@dataclass
class Result:
    """What a step produced.

    Attributes:
        loss: the loss. (What else is logged may jump, as an accuracy does when two scores change places.)
        grads: clipped, by name; None where there is none.
        changes: of buffers that are not averages.
        generator: torch's state afterwards.
    """

    loss: Tensor
    grads: dict[str, Tensor | None]
    changes: dict[str, Tensor]
    generator: Tensor


def verify(
    binding: Binding, traced: Traced, run: Run, batches: Sequence[Any], max_norm: float | None, step: Any
) -> None:
    """Compare ``run`` with eager from the state at hand, on each batch. Nothing of model, optimizer, generator changes.

    Args:
        run: (binding's static, tensors of the batch) -> what ``traced.graph`` returns; writes in place.
        batches: two or more, with the same shapes.
        step: ``train_step``, called with a batch and the optimizer.
    Raises:
        Unfit: the two differ; it says in what, and by how much.
    """
    generator = torch.get_rng_state()
    try:
        for batch in batches:
            torch.set_rng_state(generator)
            ours = candidate(binding, traced, run, batch)
            torch.set_rng_state(generator)
            eager = reference(binding, batch, max_norm, step)
            torch.set_rng_state(generator)
            _compare(ours, eager, _exact(binding, batch, max_norm, step), _is_low(traced))
    finally:
        torch.set_rng_state(generator)


def look(binding: Binding, batch: Any, step: Any) -> list[str]:
    """What an eager step moves besides tensors, as ``SilentState`` says it; random states are put back."""
    before, generators = SilentState(binding.model), rng.capture()
    try:
        reference(binding, batch, None, step)
        return before.moved()
    finally:
        rng.put_back(generators)


def reference(
    binding: Binding, batch: Any, max_norm: float | None, step: Any, dtype: torch.dtype | None = None
) -> Result:
    """One eager step on copies of the parameters and buffers, in ``dtype`` if given."""

    def copied(tensor: Tensor) -> Tensor:
        floating = dtype is not None and tensor.is_floating_point()
        return tensor.detach().to(dtype=dtype if floating else tensor.dtype, copy=True)

    params = {name: copied(p).requires_grad_(p.requires_grad) for name, p in binding.params.items()}
    buffers = {name: copied(b) for name, b in binding.buffers.items()}
    before = {name: b.clone() for name, b in buffers.items()}
    given = pytree.tree_map(lambda leaf: copied(leaf) if isinstance(leaf, Tensor) else leaf, batch)
    with torch.enable_grad(), swapped(binding.model, {**params, **buffers}):
        outputs = step(given, binding.optimizer)
        outputs["loss"].backward()
    grads = {each.name: params[each.name].grad for each in binding.trained}
    if max_norm is not None:
        norm = torch.stack([g.double().square().sum() for g in grads.values() if g is not None]).sum().sqrt()
        coefficient = (max_norm / (norm + EPS)).clamp(max=1.0)
        grads = {name: None if g is None else (g * coefficient).to(g.dtype) for name, g in grads.items()}
    return Result(
        outputs["loss"].detach(),
        grads,
        {name: buffers[name] - before[name] for name in _own_buffers(binding)},
        torch.get_rng_state(),
    )


def candidate(binding: Binding, traced: Traced, run: Run, batch: Any) -> Result:
    """The same of a compiled step, its gradients read off its state or its parameters."""
    inputs = [tensor.clone() for tensor in binding.static]
    params, buffers, _ = binding.split(inputs)
    for each in binding.trained:
        for at in each.state:
            inputs[at].zero_()
    row, width = inputs[-1], 0
    for rule, group in zip(binding.rules, binding.optimizer.param_groups, strict=True):
        row[width : width + rule.width] = torch.tensor(rule.probe(group), dtype=torch.float64)
        width += rule.width
    row[width:] = 0.5
    before = [tensor.clone() for tensor in inputs]
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    values = run([*inputs, *leaves])
    after_random = torch.get_rng_state()
    if binding.counters is not None and not torch.equal(inputs[-2], before[-2] + 1):
        raise Unfit("the compiled step does not count Adam's steps")
    for average, param in binding.average_pairs if traced.averages else ():
        wanted = 0.5 * before[average].double() + 0.5 * inputs[param].double()
        if not torch.allclose(inputs[average].double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())):
            raise Unfit("the compiled step takes another average of the parameters")
    grads: dict[str, Tensor | None] = {}
    for each in binding.trained:
        rule, group = binding.rules[each.group], binding.optimizer.param_groups[each.group]
        state = [inputs[at] for at in each.state]
        got = each.name in traced.has_grads
        grads[each.name] = rule.gradient(group, before[each.param], params[each.param], state) if got else None
    names, num = list(binding.buffers), binding.num_params
    changes = {name: buffers[names.index(name)] - before[num + names.index(name)] for name in _own_buffers(binding)}
    return Result(values[0], grads, changes, after_random)


def _own_buffers(binding: Binding) -> list[str]:
    """Names of the buffers that are the model's: no averages of parameters."""
    averages = {average - binding.num_params for average, _ in binding.average_pairs}
    return [name for number, name in enumerate(binding.buffers) if number not in averages]


def _exact(binding: Binding, batch: Any, max_norm: float | None, step: Any) -> Result | None:
    """The step in float64; None where the model cannot be computed in it."""
    try:
        return reference(binding, batch, max_norm, step, torch.float64)
    except (RuntimeError, TypeError, ValueError):  # a float32 made inside, an operation without float64
        return None


def _is_low(traced: Traced) -> bool:
    """Whether some operation computes in 16 bits."""
    return any(
        isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point() and value.element_size() == 2
        for node in traced.graph.graph.nodes
    )


def _compare(ours: Result, eager: Result, exact: Result | None, low: bool) -> None:
    if not torch.equal(ours.generator, eager.generator):
        raise Unfit("the compiled step draws other random numbers than eager")
    noise = _noise(eager, exact)
    if noise is None:
        noise, exact = LOW_NOISE if low else RANDOM_NOISE, None
    all_grads = [g for g in eager.grads.values() if g is not None]
    whole = float(torch.stack([g.double().norm() for g in all_grads]).norm()) if all_grads else 0.0
    _close("the loss", ours.loss, eager.loss, exact and exact.loss, noise, 1e-7)
    for name, b in eager.grads.items():
        mine = ours.grads[name]
        if (mine is None) != (b is None):
            raise Unfit(f"the gradient of {name} is {'missing' if mine is None else 'made up'} in the compiled step")
        if b is not None:
            _close(f"the gradient of {name}", mine, b, exact and exact.grads[name], noise, 1e-7 * whole)
    for name, b in eager.changes.items():
        _close(f"the change of buffer {name}", ours.changes[name], b, exact and exact.changes[name], noise, 1e-6)


def _noise(eager: Result, exact: Result | None) -> float | None:
    """Eager's relative distance from float64; None where float64 is no reference."""
    if exact is None:
        return None
    distances = [
        float((g.double() - e).norm() / e.norm())
        for g, e in zip(eager.grads.values(), exact.grads.values(), strict=True)
        if g is not None and e is not None and float(e.norm()) > 0
    ]
    noise = max(statistics.median(distances) if distances else 0.0, LEAST_NOISE)
    return noise if noise <= MUCH_NOISE else None


def _close(what: str, ours: Any, eager: Tensor, exact: Any, noise: float, least: float) -> None:
    a, b = ours.double(), eager.double()
    size, distance = float(b.norm()), float((a - b).norm())
    own = float((b - exact.double()).norm()) if exact is not None else 0.0
    allowed = FACTOR * max(own, noise * size) + least
    if not distance <= allowed:  # also catches NaN, on either side
        if bool((a.isnan() == b.isnan()).all()) and bool(b.isnan().any()):
            return
        raise Unfit(f"{what} differs from eager's by {distance:.1e} of {size:.1e}; {allowed:.1e} would be rounding")
