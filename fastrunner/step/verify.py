"""Whether a compiled step computes what eager computes: asked before it takes over, on real batches, on copies.

    |candidate - eager| <= FACTOR * max(|eager - float64|, noise * |eager|)

where ``noise`` is eager's own relative distance from a float64 run, the median over the gradients. In 16 bits that is
0.3 for the first layers of a deep network: ten times it would let everything pass. There two steps that round
independently may be ``TWICE`` eager's distance apart, each gradient by its own. Weights after an
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
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..data import rng
from .binding import Binding, Trained
from .guards import SilentState
from .terms import EPS
from .torch_private import Unfit, swapped
from .trace import Traced

FACTOR = 10.0  # compiled graphs were seen to need 0.04 of one at most (two families; LOG.md); planted errors need more
LEAST_NOISE = 2e-6  # float32's last bits, over a few operations: where eager is exact by luck
RANDOM_NOISE = 1e-3  # where float64 is no reference: it draws other random numbers, or cannot run
LOW_NOISE = 2e-2  # the same with bfloat16 or float16 operations
MUCH_NOISE = 0.2  # above it float64 ran something else
LOW_MUCH_NOISE = 0.5  # the same in 16 bits, where nothing is drawn: bfloat16 ResNet-18 has 0.30
TWICE, CLOSE = 2.0, 0.3  # FACTOR holds up to CLOSE of a gradient in 16 bits, TWICE beyond
LOW_LEAST = 1e-3  # of all gradients: what 16 bits leave where the true gradient is 0, as of a bias ahead of a BatchNorm

UPDATE = 1e-4  # of an update: it is read off in float32, and Adam divides by the root of its square
ROUNDING = 2.0**-21  # of a parameter, which float32 rounds by 2**-24
PROBE = 0.5  # weight of both sides in averages, and what the loss is divided by where gradients add up

Run = Callable[[list[Tensor]], Sequence[Any]]


@dataclass
class Result:
    """What a step produced.

    Attributes:
        loss: the loss. (What else is logged may jump, as an accuracy does when two scores change places.)
        grads: clipped, by name; None where there is none.
        changes: of buffers that are not averages.
        generator: torch's state afterwards.
        draws: whether that moved, or another generator's; only told of eager steps.
    """

    loss: Tensor
    grads: dict[str, Tensor | None]
    changes: dict[str, Tensor]
    generator: Tensor
    draws: bool = False


@dataclass(frozen=True)
class Subject:
    """What ``reference`` needs of a ``Binding``, for models and optimizers that cannot be bound."""

    model: nn.Module
    optimizer: Any
    params: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    trained: Sequence[Trained]
    average_pairs: Sequence[tuple[int, int]] = ()
    sums: Sequence[int] = ()
    scale: int | None = None
    tensors: Sequence[Tensor] = ()

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any) -> Subject:
        params = dict(model.named_parameters())
        trained = [Trained(name, at, 0, ()) for at, (name, p) in enumerate(params.items()) if p.requires_grad]
        return cls(model, optimizer, params, dict(model.named_buffers()), trained)

    @property
    def num_params(self) -> int:
        return len(self.params)


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
        for number, batch in enumerate(batches):
            sums = [0.1 * number * binding.params[each.name].detach() for each in binding.trained]
            torch.set_rng_state(generator)
            ours = candidate(binding, traced, run, batch, sums)
            torch.set_rng_state(generator)
            eager = reference(binding, batch, max_norm, step, traced=traced, sums=sums)
            torch.set_rng_state(generator)
            compare(ours, eager, exact_result(binding, batch, max_norm, step, traced, sums), _is_low(traced))
            if number == 0 and traced.updates:
                torch.set_rng_state(generator)
                _check_update(binding, run, batch, ours.grads)
        if binding.scale is not None and traced.updates:
            _check_skipping(binding, run, batches[0])
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
    binding: Subject | Binding,
    batch: Any,
    max_norm: float | None,
    step: Any,
    dtype: torch.dtype | None = None,
    *,
    traced: Traced | None = None,
    sums: Sequence[Tensor] = (),
) -> Result:
    """One eager step on copies of the parameters and buffers, in ``dtype`` if given.

    Args:
        traced: whether gradients add up to ``sums``, and are updated with.
    """

    def copied(tensor: Tensor) -> Tensor:
        floating = dtype is not None and tensor.is_floating_point()
        return tensor.detach().to(dtype=dtype if floating else tensor.dtype, copy=True)

    params = {name: copied(p).requires_grad_(p.requires_grad) for name, p in binding.params.items()}
    buffers = {name: copied(b) for name, b in binding.buffers.items()}
    before, generator = {name: b.clone() for name, b in buffers.items()}, torch.get_rng_state()
    given = pytree.tree_map(lambda leaf: copied(leaf) if isinstance(leaf, Tensor) else leaf, batch)
    with torch.enable_grad(), swapped(binding.model, {**params, **buffers}):
        outputs = step(given, binding.optimizer)
        loss = outputs["loss"] / PROBE if binding.sums else outputs["loss"]
        if binding.scale is not None:
            loss = loss * binding.tensors[binding.scale]
        loss.backward()
    grads = {each.name: params[each.name].grad for each in binding.trained}
    if sums and binding.sums:
        grads = {name: None if g is None else total + g for (name, g), total in zip(grads.items(), sums, strict=True)}
    updates = traced is None or traced.updates
    if binding.scale is not None and updates:
        finite = all(bool(g.isfinite().all()) for g in grads.values() if g is not None)
        inverse = 1 / float(binding.tensors[binding.scale]) if finite else 0.0
        grads = {name: None if g is None else g.nan_to_num() * inverse for name, g in grads.items()}
    if max_norm is not None and updates:
        norm = torch.stack([g.double().square().sum() for g in grads.values() if g is not None]).sum().sqrt()
        coefficient = (max_norm / (norm + EPS)).clamp(max=1.0)
        grads = {name: None if g is None else (g * coefficient).to(g.dtype) for name, g in grads.items()}
    return Result(
        outputs["loss"].detach(),
        grads,
        {name: buffers[name] - before[name] for name in _own_buffers(binding)},
        torch.get_rng_state(),
        not torch.equal(torch.get_rng_state(), generator),
    )


def candidate(binding: Binding, traced: Traced, run: Run, batch: Any, sums: Sequence[Tensor] = ()) -> Result:
    """The same of a compiled step, its gradients read off its state, its parameters, or what they add up in."""
    inputs = [tensor.clone() for tensor in binding.static]
    params, buffers, _ = binding.split(inputs)
    for each in binding.trained:
        for at in each.state:
            inputs[at].zero_()
    row, width = inputs[-1], 0
    for rule, group in zip(binding.rules, binding.optimizer.param_groups, strict=True):
        row[width : width + rule.width] = torch.tensor(rule.probe(group), dtype=torch.float64)
        width += rule.width
    row[width:] = PROBE
    for total, value in zip(binding.sums_in(inputs), sums, strict=False):
        total.copy_(value)
    before = [tensor.clone() for tensor in inputs]
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    values = run([*inputs, *leaves])
    after_random = torch.get_rng_state()
    _check_counts(binding, traced, before, inputs)
    for average, param in binding.average_pairs if traced.averages else ():
        wanted = PROBE * before[average].double() + PROBE * inputs[param].double()
        if not torch.allclose(inputs[average].double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())):
            raise Unfit("the compiled step takes another average of the parameters")
    names, num = list(binding.buffers), binding.num_params
    changes = {name: buffers[names.index(name)] - before[num + names.index(name)] for name in _own_buffers(binding)}
    if not traced.updates:
        totals = zip(binding.trained, binding.sums_in(inputs), strict=True)
        added = {each.name: total if each.name in traced.has_grads else None for each, total in totals}
        return Result(values[0], added, changes, after_random)
    grads: dict[str, Tensor | None] = {}
    for each in binding.trained:
        rule, group = binding.rules[each.group], binding.optimizer.param_groups[each.group]
        state = [inputs[at] for at in each.state]
        got = each.name in traced.has_grads
        grads[each.name] = rule.gradient(group, before[each.param], params[each.param], state) if got else None
    return Result(values[0], grads, changes, after_random)


def _check_counts(binding: Binding, traced: Traced, before: list[Tensor], after: list[Tensor]) -> None:
    """Adam's steps, what gradients added up in, and the loss scale, against what torch does to them."""
    done, finite = int(traced.updates), True
    if binding.scale is not None and traced.updates:
        scale, tracker = (tensor.clone() for tensor in before[binding.scale : binding.scale + 2])
        rule = binding.scale_rule
        assert rule is not None
        finite = rule.fixed is not None or int(after[binding.scale + 1]) > 0 or bool(after[binding.scale] > scale)
        if rule.fixed is None:
            found = torch.tensor(0.0 if finite else 1.0)
            torch._amp_update_scale_(scale, tracker, found, rule.growth, rule.backoff, rule.interval)
        if not torch.equal(after[binding.scale], scale) or not torch.equal(after[binding.scale + 1], tracker):
            raise Unfit("the compiled step takes another loss scale")
        if rule.fixed is not None:  # nothing says whether the update was skipped
            return
    if binding.counters is not None and not torch.equal(after[-2], before[-2] + done * finite):
        raise Unfit("the compiled step does not count Adam's steps")
    if traced.updates and any(bool(total.any()) for total in binding.sums_in(after)):
        raise Unfit("the compiled step does not clear what gradients added up to")


def _check_update(binding: Binding, run: Run, batch: Any, grads: dict[str, Tensor | None]) -> None:
    """What the compiled step makes of gradients, against the same formula in float64: lr, momentum, decay, each group.

    Args:
        grads: what the step computes for this batch, clipped.
    """
    inputs = [tensor.clone() for tensor in binding.static]
    row = [value for number in range(len(binding.rules)) for value in _probed_row(binding, number)]
    inputs[-1][: len(row)] = torch.tensor(row, dtype=torch.float64)
    inputs[-1][len(row) :] = PROBE
    for each in binding.trained:
        for at, factor in zip(each.state, (0.05, 0.1), strict=False):
            inputs[at].copy_(factor * inputs[each.param] if factor == 0.05 else factor * inputs[each.param].square())
    for total in binding.sums_in(inputs):
        total.zero_()
    exact = [tensor.to(torch.float64, copy=True) for tensor in inputs]
    run([*inputs, *(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))])
    step = None if binding.counters is None else exact[-2][0] + 1
    if binding.scale is not None and not any(bool(g.any()) for g in grads.values() if g is not None):
        return  # the update was left out
    for each in binding.trained:
        grad = grads[each.name]
        if grad is None:
            continue
        before, wanted = exact[each.param].clone(), [exact[each.param], *(exact[at] for at in each.state)]
        values = binding.row_of(each.group, exact[-1])
        binding.rules[each.group].apply(wanted[0], grad.double(), wanted[1:], values, step)
        moved = float((wanted[0] - before).norm())
        for at, value in zip((each.param, *each.state), wanted, strict=True):
            distance = float((inputs[at].double() - value).norm())
            if not distance <= UPDATE * (moved if at == each.param else float(value.norm())) + ROUNDING * float(before.norm()):  # fmt: skip # noqa: E501
                raise Unfit(f"the update of {each.name} differs from the optimizer's by {distance:.1e} of {moved:.1e}")


def _probed_row(binding: Binding, number: int) -> tuple[float, ...]:
    """A group's entries of the row, unlike those of any other, and none of them 0 or 1."""
    group, rule = dict(binding.optimizer.param_groups[number]), binding.rules[number]
    group["lr"] = 0.1 * (1 + number / 8)
    if group.get("momentum"):
        group["momentum"] = 0.8 - number / 64
    if group["weight_decay"]:
        group["weight_decay"] = 0.03 * (1 + number / 8)
    return rule.row(group, 3)


def _check_skipping(binding: Binding, run: Run, batch: Any) -> None:
    """With gradients that are not finite nothing is updated."""
    assert binding.scale is not None
    inputs = [tensor.clone() for tensor in binding.static]
    inputs[binding.scale].fill_(torch.inf)
    before = [tensor.clone() for tensor in inputs]
    run([*inputs, *(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))])
    kept = [at for each in binding.trained for at in (each.param, *each.state)]
    if binding.counters is not None:
        kept.append(len(inputs) - 2)
    if not all(torch.equal(inputs[at], before[at]) for at in kept):
        raise Unfit("the compiled step updates with gradients that are not finite")


def _own_buffers(binding: Subject | Binding) -> list[str]:
    """Names of the buffers that are the model's: no averages of parameters."""
    averages = {average - binding.num_params for average, _ in binding.average_pairs}
    return [name for number, name in enumerate(binding.buffers) if number not in averages]


def exact_result(
    binding: Subject | Binding,
    batch: Any,
    max_norm: float | None,
    step: Any,
    traced: Traced | None = None,
    sums: Sequence[Tensor] = (),
) -> Result | None:
    """The step in float64; None where the model cannot be computed in it."""
    try:
        return reference(binding, batch, max_norm, step, torch.float64, traced=traced, sums=sums)
    except (RuntimeError, TypeError, ValueError):  # a float32 made inside, an operation without float64
        return None


def _is_low(traced: Traced) -> bool:
    """Whether some operation computes in 16 bits."""
    return any(
        isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point() and value.element_size() == 2
        for node in traced.graph.graph.nodes
    )


def compare(ours: Result, eager: Result, exact: Result | None, low: bool) -> None:
    """Raise Unfit where a candidate's result is further from eager's than rounding explains.

    Args:
        exact: the float64 step's; None where float64 is no reference.
        low: 16-bit operations are in it.
    """
    if not torch.equal(ours.generator, eager.generator):
        raise Unfit("the compiled step draws other random numbers than eager")
    noise = _noise(eager, exact, LOW_MUCH_NOISE if low and not eager.draws else MUCH_NOISE)
    if noise is None:
        noise, exact = LOW_NOISE if low else RANDOM_NOISE, None
    close = CLOSE if low and exact is not None else None
    all_grads = [g for g in eager.grads.values() if g is not None]
    whole = float(torch.stack([g.double().norm() for g in all_grads]).norm()) if all_grads else 0.0
    least = (1e-7 if close is None else LOW_LEAST) * whole
    _close("the loss", ours.loss, eager.loss, exact and exact.loss, noise, 1e-7, close)
    for name, b in eager.grads.items():
        mine = ours.grads[name]
        if (mine is None) != (b is None):
            raise Unfit(f"the gradient of {name} is {'missing' if mine is None else 'made up'} in the compiled step")
        if b is not None:
            _close(f"the gradient of {name}", mine, b, exact and exact.grads[name], noise, least, close)
    for name, b in eager.changes.items():
        now = exact and exact.changes[name]
        _close(f"the change of buffer {name}", ours.changes[name], b, now, noise, 1e-6, close)


def _noise(eager: Result, exact: Result | None, much: float) -> float | None:
    """Eager's relative distance from float64; None where that is more than ``much``: float64 is no reference."""
    if exact is None:
        return None
    distances = [
        float((g.double() - e).norm() / e.norm())
        for g, e in zip(eager.grads.values(), exact.grads.values(), strict=True)
        if g is not None and e is not None and float(e.norm()) > 0
    ]
    noise = max(statistics.median(distances) if distances else 0.0, LEAST_NOISE)
    return noise if noise <= much else None


def _close(
    what: str, ours: Any, eager: Tensor, exact: Any, noise: float, least: float, close: float | None = None
) -> None:
    """Args: ``close``: FACTOR holds up to this share of ``eager`` (16 bits); None: everywhere."""
    a, b = ours.double(), eager.double()
    size, distance = float(b.norm()), float((a - b).norm())
    own = float((b - exact.double()).norm()) if exact is not None else 0.0
    allowed = FACTOR * max(own, noise * size)
    if close is not None:
        own = max(own, min(noise, LOW_NOISE) * size)
        allowed = max(TWICE * own, min(FACTOR * own, close * size))
    allowed += least
    if not distance <= allowed:  # also catches NaN, on either side
        if bool((a.isnan() == b.isnan()).all()) and bool(b.isnan().any()):
            return
        raise Unfit(f"{what} differs from eager's by {distance:.1e} of {size:.1e}; {allowed:.1e} would be rounding")
