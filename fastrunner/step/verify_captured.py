"""Whether replays of a captured iteration compute what eager does: asked once a graph, before it is trusted.

The comparison is ``verify.py``'s. A graph has its addresses in it, so it runs on the model's own tensors: they are
copied before and put back after. On the device this takes memory for four more sets of parameters and state at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .binding import Binding
from .captured import Captured
from .device_update import Options
from .graph_backend import Draws
from .terms import EPS
from .torch_private import Unfit
from .verify import Result, candidate, compare, reference


def verify_captured(
    draws: Draws,
    binding: Binding,
    options: Options,
    captured: Captured,
    has_grads: frozenset[str],
    batch: Any,
    step: Any,
    terms: tuple[float | None, bool, Any, bool],
) -> None:
    """Compare a replay with eager from the state at hand; nothing that training has changes.

    Args:
        draws: generators that the iteration may draw from.
        has_grads: names of the parameters that get a gradient.
        batch: of the captured shape.
        terms: what it clips to, whether it averages, what ranks exchange, and whether it updates.
    Raises:
        Unfit: the two differ; it says in what, and by how much.
    """
    max_norm, averages, exchange, updates = terms
    traced: Any = SimpleNamespace(averages=averages, has_grads=has_grads, updates=updates)
    sums = [0.1 * binding.params[each.name].detach() for each in binding.trained]
    state = draws.now()
    if exchange is not None:
        with torch.no_grad():
            exchange.before(list(binding.buffers.values()))  # as the iteration does first: both start from the same

    def replay(inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return _on_copies(binding, options, captured, inputs)

    try:  # with several ranks all of it runs, whatever comes out: others wait in the same collectives
        ours = candidate(binding, traced, replay, batch, sums)
        drawn = draws.now()
        draws.put_back(state)
        eager = _eager(binding, batch, max_norm, step, exchange, None, traced, sums)
        after = draws.now()
        same = all(map(torch.equal, drawn, after))
        eager.draws = not all(map(torch.equal, state, after))  # of the generators of the device, not only the CPU's
        draws.put_back(state)
        exact = _exact(binding, batch, max_norm, step, exchange, traced, sums)
    finally:
        draws.put_back(state)
    if not same:
        raise Unfit("a replay draws other random numbers than eager")
    compare(ours, eager, exact, low=_is_low(ours))


def _on_copies(binding: Binding, options: Options, captured: Captured, inputs: list[Tensor]) -> Sequence[Tensor]:
    """A replay as if on ``inputs`` (binding's static, then the batch): what it writes is written there."""
    number = len(binding.static)
    own = binding.static[: number - 1]  # the last is the row, which captured iterations do not have
    kept = [tensor.clone() for tensor in own]
    for tensor, given in zip(own, inputs, strict=False):
        tensor.copy_(given)
    options.probe(binding)
    values = [value.clone() for value in captured.run(inputs[number:])]
    for tensor, given, old in zip(own, inputs, kept, strict=False):
        given.copy_(tensor)
        tensor.copy_(old)
    return values


def _eager(
    binding: Binding,
    batch: Any,
    max_norm: float | None,
    step: Any,
    exchange: Any,
    dtype: torch.dtype | None,
    traced: Any,
    sums: Sequence[Tensor],
) -> Result:
    """``verify.reference``, with the gradients' mean over the ranks."""
    if exchange is None:
        return reference(binding, batch, max_norm, step, dtype, traced=traced, sums=sums)
    result = reference(binding, batch, None, step, dtype)
    means = exchange.mean([result.grads[each.name] for each in binding.trained])
    if max_norm is not None:
        norm = torch.stack([g.double().square().sum() for g in means if g is not None]).sum().sqrt()
        coefficient = (max_norm / (norm + EPS)).clamp(max=1.0)
        means = [None if g is None else (g * coefficient).to(g.dtype) for g in means]
    result.grads = {each.name: grad for each, grad in zip(binding.trained, means, strict=True)}
    return result


def _exact(
    binding: Binding,
    batch: Any,
    max_norm: float | None,
    step: Any,
    exchange: Any,
    traced: Any,
    sums: Sequence[Tensor],
) -> Result | None:
    """The step in float64; None where the model cannot be computed in it."""
    try:
        return _eager(binding, batch, max_norm, step, exchange, torch.float64, traced, sums)
    except (RuntimeError, TypeError, ValueError):  # a float32 made inside, an operation without float64
        return None


def _is_low(ours: Result) -> bool:
    """Whether the step may compute in 16 bits: replays run eager's own operations, so only noise is at stake."""
    return ours.loss.element_size() == 2
