"""Clip, update and average for captured iterations: a few operations over lists of tensors, nothing known to the host.

A replay runs what was recorded, so that an option that changes has to lie on the device. ``options`` holds them as the
param groups have them, float64:

    options = weight of the newest parameters in the averages | what the loss is divided by where gradients add up
              | lr, momentum or beta1, weight_decay of each group

and what Adam makes of them (terms.py has the formulas) comes from its step counter there. The same results as
``terms.py`` to rounding: each operation here is one launch for up to some hundred tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .binding import Binding, Trained
from .terms import AdamRule, Rule, SgdRule, clip_coefficient
from .torch_private import Unfit
from .verify import PROBE

AVERAGE, FACTOR, FIRST, EACH = 0, 1, 2, 3  # places in ``options``; the first group's, and entries of a group
_READ = {SgdRule: itemgetter("lr", "momentum", "weight_decay"), AdamRule: itemgetter("lr", "betas", "weight_decay")}


class Options:
    """The param groups' numbers on the device, sent when they have changed.

    Args:
        binding: whose optimizer.
        backend: where they are sent.
    """

    def __init__(self, binding: Binding, backend: Any) -> None:
        self._groups = binding.optimizer.param_groups
        self._adam = [isinstance(rule, AdamRule) for rule in binding.rules]
        self._read = [_READ[type(rule)] for rule in binding.rules]
        self._backend = backend
        self.tensor: Tensor = backend.static(torch.zeros(FIRST + EACH * len(binding.rules), dtype=torch.float64))
        self._sent: list[Any] = []

    def fill(self, average: float, factor: float = 1.0) -> None:
        """What the param groups say now, for the next replay. Cost: 0.3 us and 0.2 a group; a copy where it changed."""
        now: list[Any] = [average, factor]
        for read, group in zip(self._read, self._groups, strict=True):
            now += read(group)
        if now != self._sent:
            self._sent = now
            self._backend.send(self.tensor, [value[0] if type(value) is tuple else value for value in now])

    def probe(self, binding: Binding) -> None:
        """Options with which, from momenta of zeros, the gradients can be read off the state: see ``terms.Rule``."""
        values: list[float] = [PROBE, PROBE]
        for rule, group in zip(binding.rules, self._groups, strict=True):
            beta = group["betas"][0] if isinstance(rule, AdamRule) else group["momentum"]
            values += [0.0 if isinstance(rule, AdamRule) else rule.probe(group)[0], beta, 0.0]
        self._sent = []
        self._backend.send(self.tensor, values)


class DeviceUpdate:
    """The update of one binding.

    Args:
        binding: parameters, state, rules.
        options: as above.
        max_norm: clip to it; None: do not.
        averages: take the binding's average.
    """

    def __init__(self, binding: Binding, options: Tensor, max_norm: float | None, averages: bool) -> None:
        self._binding, self._options, self._max_norm, self._averages = binding, options, max_norm, averages
        self._skips = bool(getattr(binding.optimizer, "skip_nonfinite", False))

    def __call__(self, grads: Sequence[Tensor | None], found_inf: Tensor | None = None) -> Tensor | None:
        """Write parameters, state, counters and averages in place.

        Args:
            grads: of ``binding.trained``, None where a parameter has none in this step.
            found_inf: float32, shape (1,), on the device: where it is not 0, nothing but averages changes.
        Returns:
            The norm before clipping, float32, 0-D; None where nothing is clipped.
        Raises:
            Unfit: a gradient is there that was not before, or is missing.
        """
        binding, norm = self._binding, None
        pairs = [(each, grad) for each, grad in zip(binding.trained, grads, strict=True) if _has(binding, each, grad)]
        given = [grad for _, grad in pairs if grad is not None]
        if self._max_norm is not None or self._skips:
            norm = torch.stack([n.double() for n in torch._foreach_norm(given)]).square().sum().sqrt().float()
        if self._skips and norm is not None:
            bad = norm.isfinite().logical_not().float().reshape(1)
            found_inf = bad if found_inf is None else torch.maximum(found_inf, bad)
        if self._max_norm is not None and norm is not None:
            given = list(torch._foreach_mul(given, clip_coefficient(norm, self._max_norm)))
        lists: dict[tuple[int, torch.dtype], list[tuple[Trained, Tensor]]] = {}
        for (each, _), grad in zip(pairs, given, strict=True):
            lists.setdefault((each.group, grad.dtype), []).append((each, grad))
        written = [binding.static[at] for each, _ in pairs for at in (each.param, *each.state)]
        before = None if found_inf is None else [tensor.clone() for tensor in written]
        step = None if binding.counters is None else binding.counters[0].double() + 1
        for (group, dtype), members in lists.items():
            self._apply(group, dtype, members, step)
        if found_inf is not None and before is not None:
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(torch.where(found_inf != 0, old, tensor))
        if binding.counters is not None:
            binding.counters.add_(1 if found_inf is None else 1 - found_inf)
        self.average()
        return None if self._max_norm is None else norm

    def _apply(
        self, group: int, dtype: torch.dtype, members: Sequence[tuple[Trained, Tensor]], step: Tensor | None
    ) -> None:
        static, rule = self._binding.static, self._binding.rules[group]
        params = [static[each.param] for each, _ in members]
        states = [[static[each.state[i]] for each, _ in members] for i in range(len(rule.keys))]
        at = FIRST + EACH * group
        lr, beta, weight_decay = self._options[at : at + EACH].unbind()
        grads = [grad for _, grad in members]
        if rule.maximize:  # type: ignore[attr-defined]
            grads = list(torch._foreach_neg(grads))
        if isinstance(rule, SgdRule):
            _sgd(rule, params, grads, states, lr.to(dtype), beta.to(dtype), weight_decay.to(dtype))
        elif isinstance(rule, AdamRule):
            assert step is not None
            _adam(rule, params, grads, states, (lr, beta, weight_decay), step, dtype)

    def average(self) -> None:
        """Take the averages, if that is part of it."""
        if not self._averages:
            return
        static, weight = self._binding.static, self._options[AVERAGE]
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for average, param in self._binding.average_pairs:
            by_dtype.setdefault(static[average].dtype, []).append((static[average], static[param]))
        for dtype, pairs in by_dtype.items():
            averages, params = [a for a, _ in pairs], [p for _, p in pairs]
            torch._foreach_mul_(averages, (1 - weight).to(dtype))
            torch._foreach_add_(averages, torch._foreach_mul(params, weight.to(dtype)))


def row_on_device(binding: Binding, options: Tensor) -> Tensor:
    """What ``Binding.fill`` writes to a traced graph's row, worked out on the device: float64."""
    parts, step = [], None if binding.counters is None else binding.counters[0].double() + 1
    for group, rule in enumerate(binding.rules):
        at = FIRST + EACH * group
        lr, beta, weight_decay = options[at : at + EACH].unbind()
        if isinstance(rule, AdamRule):
            assert step is not None
            decay = 1 - lr * weight_decay if rule.decoupled else weight_decay
            parts += [lr / (1 - beta**step), (1 - rule.beta2**step).sqrt(), decay, beta]
        else:
            parts += [lr, beta, weight_decay]
    return torch.stack([*parts, 1 - options[AVERAGE], options[AVERAGE]])


def _has(binding: Binding, each: Trained, grad: Tensor | None) -> bool:
    """Whether the step updates a parameter."""
    if grad is None:
        if each.state:
            raise Unfit(f"{each.name} has no gradient in this step, but had one before", passing=True)
        return False
    if grad.layout != torch.strided:
        raise Unfit(f"{each.name} has a sparse gradient")
    rule: Rule = binding.rules[each.group]
    if rule.keys and not each.state:
        raise Unfit(f"the first update of {each.name} is still to come", passing=True)
    return True


def _sgd(
    rule: SgdRule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
) -> None:
    if rule.decays:
        grads = list(torch._foreach_add(grads, torch._foreach_mul(params, weight_decay)))
    if rule.momentum:
        (buffers,) = states
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1 - rule.dampening)
        grads = list(torch._foreach_add(grads, torch._foreach_mul(buffers, momentum))) if rule.nesterov else buffers
    torch._foreach_sub_(params, torch._foreach_mul(grads, lr))


def _adam(
    rule: AdamRule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    options: tuple[Tensor, Tensor, Tensor],
    step: Tensor,
    dtype: torch.dtype,
) -> None:
    lr, beta1, weight_decay = options
    step_size = (lr / (1 - beta1**step)).to(dtype)
    root = (1 - rule.beta2**step).sqrt().to(dtype)  # of float64: 1 - beta2**step in float32 is not enough
    exp_avg, exp_avg_sq = states
    if rule.decays and rule.decoupled:
        torch._foreach_mul_(params, (1 - lr * weight_decay).to(dtype))
    elif rule.decays:
        grads = list(torch._foreach_add(grads, torch._foreach_mul(params, weight_decay.to(dtype))))
    torch._foreach_mul_(exp_avg, beta1.to(dtype))
    torch._foreach_add_(exp_avg, torch._foreach_mul(grads, (1 - beta1).to(dtype)))
    torch._foreach_mul_(exp_avg_sq, rule.beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - rule.beta2)
    denominators = list(torch._foreach_sqrt(exp_avg_sq))
    torch._foreach_div_(denominators, root)
    torch._foreach_add_(denominators, rule.eps)
    updates = list(torch._foreach_div(exp_avg, denominators))
    torch._foreach_mul_(updates, step_size)
    torch._foreach_sub_(params, updates)
