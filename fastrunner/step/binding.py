"""The tensors that a whole step reads and writes, as one flat list: what a graph is called with.

    inputs = parameters | buffers | optimizer state | sums of gradients | loss scale and its counter | step counters
             | row | tensors of the batch

They are the model's and the optimizer's own: a graph writes into them in place, so that whoever looks at
``model.state_dict()`` or ``optimizer.state`` sees the truth. Only Adam's step counters, one 0-D tensor a parameter, are
made views of one vector, so that one operation counts them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.ema_term import EmaTerm
from ..optim.fused_base import FusedOptimizer
from ..optim.update import algorithm_of
from .terms import AdamRule, Rule, ScaleRule, SgdRule
from .torch_private import Unfit

LAZY_HOOKS = ("torch.nn.utils.",)  # hooks of these modules are part of the computation: old weight_norm, spectral_norm


@dataclass(frozen=True)
class Trained:
    """A parameter that the step updates.

    Attributes:
        param: its number among the parameters.
        group: its parameter group.
        state: numbers of its state tensors in the flat list, in the rule's order; () where it has none yet.
    """

    name: str
    param: int
    group: int
    state: tuple[int, ...]


class Binding:
    """Parameters, buffers and state of one model and optimizer, as they are now.

    Args:
        model: what the runner drives.
        optimizer: exactly one of this package's or of torch's SGD, Adam, AdamW.
        averages: an average to take with the update.
        adds_up: gradients are summed over several iterations.
        scaler: a hook with a ``torch.amp.GradScaler``; None: the loss has no scale.
        skips: an optimizer's ``skip_nonfinite`` is no obstacle: the update does it.
    Raises:
        Unfit: something here cannot be part of a graph; it says what.

    Attributes:
        static: the flat list without the batch; detached, so that a call records nothing.
        rules: one a parameter group.
        sums: one a trained parameter, where gradients add up.
        scale: number of the loss scale in the flat list, behind it its counter; None where there is none.
        row: float64; what may change from step to step.
        written: what autograd has to know of as written to: parameters and buffers.
        key: what a graph is made for besides the batch; graphs of equal keys can be called with ``static``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        averages: EmaTerm | None = None,
        *,
        adds_up: bool = False,
        scaler: Any = None,
        skips: bool = False,
    ) -> None:
        self.model, self.optimizer, self.averages, self.scaler = model, optimizer, averages, scaler
        self._skips = skips
        _check_model(model)
        self.rules = _rules(optimizer, scaler is not None, skips)
        self.scale_rule = None if scaler is None else _scale_rule(scaler)
        self.params = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.num_params, self.num_buffers = len(self.params), len(self.buffers)
        self._state_tensors: list[tuple[dict[str, Any], str, Tensor]] = []
        self._slots: list[tuple[Tensor, dict[str, Any]]] = []
        self.trained = self._trained()
        self.counters = self._pack_counters()
        self.steps = int(self.counters[0]) if self.counters is not None else 0
        if (adds_up or scaler is not None) and any(rule.keys for rule in self.rules) and not self._slots:
            raise Unfit("the first update is still to come", passing=True)
        self.sums = [self._sum_for(each) for each in self.trained] if adds_up else []
        self.row = torch.zeros(sum(rule.width for rule in self.rules) + adds_up + 2, dtype=torch.float64)
        self._view: Any = memoryview(self.row.numpy().data)  # 40 ns a write
        widths = [rule.width for rule in self.rules]
        self._num_options = sum(widths)
        self._groups = [(rule.row, group, sum(widths[:number])) for number, (rule, group) in enumerate(zip(self.rules, optimizer.param_groups, strict=True))]  # fmt: skip # noqa: E501
        self._written_rows: list[Any] = [None] * len(self._groups)
        self.tensors: list[Tensor] = [
            *self.params.values(),
            *self.buffers.values(),
            *(tensor for _, _, tensor in self._state_tensors),
            *self.sums,
            *(self._scale_tensors() if scaler is not None else ()),
            *([self.counters] if self.counters is not None else ()),
            self.row,
        ]
        self.scale = self._num_before_scale() if scaler is not None else None
        self.static = [tensor.detach() for tensor in self.tensors]
        self.average_pairs = self._average_pairs()
        self.written = [*self.params.values(), *self.buffers.values()]
        self._modes = [(module, module.training) for module in model.modules()]
        self._tables = [
            (table, name, tensor)
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
        ]
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        self._requires = [p.requires_grad for p in self.params.values()]
        self._surroundings = _surroundings()
        self.key = self._key()

    def holds(self) -> bool:
        """Whether all of it still is what it was: to be asked after anybody's Python has run.

        Cost: 2 us a tensor; 80 us for a model of 18 modules and 36 tensors.
        """
        if self._surroundings != _surroundings() or any(m.training != mode for m, mode in self._modes):
            return False
        if any(table.get(name) is not tensor for table, name, tensor in self._tables):
            return False
        groups = self.optimizer.param_groups
        if len(groups) != len(self._groups) or any(
            a is not b for a, (_, b, _) in zip(groups, self._groups, strict=True)
        ):
            return False
        if any(self.optimizer.state.get(param) is not slot for param, slot in self._slots):
            return False
        if any(slot.get(name) is not tensor for slot, name, tensor in self._state_tensors):
            return False
        if [t.data_ptr() for t in self.tensors] != self._addresses:
            return False
        if [p.requires_grad for p in self.params.values()] != self._requires:
            return False
        try:
            _check_model(self.model)
            same_rules = _rules(self.optimizer, self.scaler is not None, self._skips) == self.rules
        except Unfit:
            return False
        if self.scale is not None and (
            _scale_rule(self.scaler) != self.scale_rule or self._scale_tensors()[0] is not self.tensors[self.scale]
        ):
            return False
        if self.counters is not None:
            if any(
                slot.get("step") is not view for (_, slot), view in zip(self._slots, self._counter_views, strict=True)
            ):
                return False
            self.steps = int(self.counters[0])
            if self.counters.ne(self.counters[0]).any():
                return False
        return same_rules and len(self._tables) == sum(
            len(module._parameters) + len(module._buffers) for module, _ in self._modes
        )

    def is_outgrown(self) -> bool:
        """Whether a parameter has got its state since: its first update was made in between."""
        keys = [self.rules[each.group].keys for each in self.trained]
        return any(
            wanted and not each.state and self.optimizer.state.get(self.tensors[each.param])
            for wanted, each in zip(keys, self.trained, strict=True)
        )

    def fill(self, average: float | None, factor: float = 1.0) -> None:
        """Write lr, momentum and what follows from them into the row for the next step.

        Args:
            average: weight of the newest parameters in the averages.
            factor: what the loss is divided by, where gradients add up.
        """
        view, step, written = self._view, self.steps + 1, self._written_rows
        for number, (row, group, at) in enumerate(self._groups):
            values = row(group, step)
            if values != written[number]:
                written[number] = values
                for value in values:
                    view[at] = value
                    at += 1
        at = self._num_options
        if self.sums:
            view[at] = factor
            at += 1
        if average is not None:
            view[at], view[at + 1] = 1 - average, average

    def values(self, groups: Sequence[dict[str, Any]], ahead: int, average: float | None) -> list[float]:
        """The row for the step ``ahead`` of the next one, with these parameter groups; ``average`` as for ``fill``."""
        step = self.steps + 1 + ahead
        values = [value for rule, group in zip(self.rules, groups, strict=True) for value in rule.row(group, step)]
        return [*values, 0.0, 0.0] if average is None else [*values, 1 - average, average]

    def forget_row(self) -> None:
        """Somebody else has written to the row."""
        self._written_rows = [None] * len(self._groups)

    @property
    def counts(self) -> bool:
        """Whether the row depends on the number of the step."""
        return any(rule.counts for rule in self.rules)

    def done(self, updates: bool = True) -> None:
        """A graph has written into the tensors: autograd's saved copies of them are void, as after torch's own step."""
        if updates:
            self.steps += 1
        torch.autograd.graph.increment_version(self.written if updates else list(self.buffers.values()))

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """(parameters, buffers, all of ``static``) of a flat list."""
        n = self.num_params
        return tensors[:n], tensors[n : n + self.num_buffers], tensors[: len(self.static)]

    def row_of(self, group: int, row: Tensor) -> Tensor:
        """The entries of one parameter group."""
        at = sum(rule.width for rule in self.rules[:group])
        return row[at : at + self.rules[group].width]

    def sums_in(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The sums of gradients of a flat list."""
        at = self.num_params + self.num_buffers + len(self._state_tensors)
        return tensors[at : at + len(self.sums)]

    def _sum_for(self, each: Trained) -> Tensor:
        """What the gradients of a parameter add up in: what they have added up in so far, if there is one."""
        param = self.params[each.name]
        grad = param.grad
        if grad is not None and grad.layout == torch.strided and grad.stride() == param.stride():
            return grad
        return torch.zeros_like(param, requires_grad=False)

    def _scale_tensors(self) -> list[Tensor]:
        """The scaler's own tensors, which it makes when it is first used."""
        scaler = self.scaler.loss_scaler
        scaler.scale(torch.zeros(1, device=next(iter(self.params.values())).device))
        return [scaler._scale, scaler._growth_tracker]

    def _num_before_scale(self) -> int:
        return self.num_params + self.num_buffers + len(self._state_tensors) + len(self.sums)

    def _trained(self) -> list[Trained]:
        param_groups = self.optimizer.param_groups
        groups = {id(p): g for g, group in enumerate(param_groups) for p in group["params"]}
        known = {id(p) for p in self.params.values()}
        if any(p.requires_grad and id(p) not in known for group in param_groups for p in group["params"]):
            raise Unfit("the optimizer holds parameters that are not the model's")
        trained, at = [], self.num_params + self.num_buffers
        for number, (name, param) in enumerate(self.params.items()):
            if not param.requires_grad:
                continue
            if id(param) not in groups:
                raise Unfit(f"{name} requires a gradient but is in no optimizer: its gradients would add up")
            slot, keys = self.optimizer.state.get(param, {}), self.rules[groups[id(param)]].keys
            tensors = [slot.get(key) for key in keys]
            has = bool(keys) and all(isinstance(tensor, Tensor) for tensor in tensors)
            if has:
                for key, tensor in zip(keys, tensors, strict=True):
                    assert isinstance(tensor, Tensor)
                    if tensor.shape != param.shape or tensor.dtype != param.dtype or tensor.device != param.device:
                        raise Unfit(f"{key} of {name} is unlike its parameter")
                    self._state_tensors.append((slot, key, tensor))
                self._slots.append((param, slot))
            trained.append(Trained(name, number, groups[id(param)], tuple(range(at, at + len(keys))) if has else ()))
            at += len(keys) if has else 0
        return trained

    def _pack_counters(self) -> Tensor | None:
        """All step counters as one vector, of which each slot's ``step`` is a view."""
        if not any(rule.counts for rule in self.rules) or not self._slots:
            return None
        values = [float(slot["step"]) for _, slot in self._slots]
        if min(values) != max(values):
            raise Unfit("parameters were updated different numbers of times")
        packed = _vector_of([slot["step"] for _, slot in self._slots])
        if packed is not None:
            self._counter_views = [slot["step"] for _, slot in self._slots]
            return packed
        packed = torch.tensor(values, dtype=torch.float32, device=self._slots[0][0].device)
        self._counter_views = list(packed.unbind())
        for (_, slot), view in zip(self._slots, self._counter_views, strict=True):
            slot["step"] = view
        return packed

    def _average_pairs(self) -> list[tuple[int, int]]:
        """(average, parameter) by number in the flat list."""
        if self.averages is None:
            return []
        numbers = {id(tensor): number for number, tensor in enumerate(self.tensors)}
        pairs = [(numbers.get(id(a)), numbers.get(id(p))) for a, p in zip(self.averages.averages, self.averages.params, strict=True)]  # fmt: skip # noqa: E501
        if any(a is None or p is None for a, p in pairs):
            raise Unfit("the averages are not buffers of the model")
        return pairs  # type: ignore[return-value]

    def _key(self) -> tuple[Any, ...]:
        return (
            *((tuple(t.shape), t.stride(), t.dtype, t.device) for t in self.tensors),
            tuple((each.param, each.group, each.state) for each in self.trained),
            self.rules,
            (len(self.sums), self.scale_rule),
            tuple(mode for _, mode in self._modes),
            tuple(self.average_pairs),
            self._surroundings,
        )


def _vector_of(steps: Sequence[Any]) -> Tensor | None:
    """The vector that counters are views of already, one after the other; None if they are not."""
    base = getattr(steps[0], "_base", None)
    if base is None or base.shape != (len(steps),):
        return None
    each = all(s._base is base and s.storage_offset() == i for i, s in enumerate(steps))
    return base if each else None


def _surroundings() -> tuple[Any, ...]:
    """Of the process: what operations mean besides their arguments."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


def _check_model(model: nn.Module) -> None:
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or everywhere._global_backward_hooks:
        raise Unfit("there are hooks for all modules of the process")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        hooks = [
            hook
            for table in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
            for hook in table.values()
        ]
        if any(not getattr(type(hook), "__module__", "").startswith(LAZY_HOOKS) for hook in hooks):
            raise Unfit(f"{where} has module hooks")
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.momentum is None:  # fmt: skip # noqa: E501
            raise Unfit(f"{where} has momentum=None, which reads its counter on the host")
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise Unfit(f"{where} exchanges gradients in hooks")
    for name, param in model.named_parameters():
        if type(param) is not nn.Parameter or param.layout != torch.strided:
            raise Unfit(f"{name} is a {type(param).__name__} with layout {param.layout}")
        if not param.dtype.is_floating_point or param.element_size() < 4:
            raise Unfit(f"{name} is {param.dtype}; graphs train float32 and float64 parameters")
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            raise Unfit(f"{name} has a tensor hook")


def _scale_rule(hook: Any) -> ScaleRule:
    """The constant part of a Fp16OptimizerHook's scaler.

    Raises:
        Unfit: not torch's own scaler, or switched off.
    """
    scaler = hook.loss_scaler
    if type(scaler) is not torch.amp.GradScaler or vars(scaler).keys() & {"scale", "unscale_", "step", "update"}:
        raise Unfit(f"the loss scaler is not exactly torch.amp.GradScaler, but {type(scaler).__name__}")
    if not scaler.is_enabled():
        raise Unfit("the loss scaler is switched off")
    return ScaleRule(
        scaler.get_growth_factor(),
        scaler.get_backoff_factor(),
        scaler.get_growth_interval(),
        hook._scale_update_param,
    )


def _rules(optimizer: Any, may_skip: bool = False, skips: bool = False) -> tuple[Rule, ...]:
    """The constant part of each group.

    Args:
        may_skip: an update may turn out to be none.
        skips: whoever asks does what ``skip_nonfinite`` of the optimizer says.
    Raises:
        Unfit: not exactly a known optimizer, or an option that a graph does not have.
    """
    ours = type(optimizer).__module__.startswith("fastrunner.") and isinstance(optimizer, FusedOptimizer)
    algorithm = type(optimizer)._algorithm if ours else algorithm_of(optimizer)
    if algorithm is None:
        raise Unfit(f"{type(optimizer).__name__} is not exactly SGD, Adam or AdamW, torch's or fastrunner's")
    if ours and (optimizer.clip_grad_norm or optimizer.ema_decay or (optimizer.skip_nonfinite and not skips)):
        raise Unfit(f"the {type(optimizer).__name__} clips, averages or skips by itself")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise Unfit("the optimizer has step hooks")
    if shadowed := [name for name in ("step", "zero_grad", "clipped_step") if name in vars(optimizer)]:
        raise Unfit(f"{shadowed[0]}() is replaced on the optimizer")
    make = SgdRule.of if algorithm.name == "sgd" else AdamRule.of
    rules: list[Rule] = []
    for number, group in enumerate(optimizer.param_groups):
        for name in ("amsgrad", "differentiable", "capturable"):
            if group.get(name):
                raise Unfit(f"parameter group {number} has {name}=True")
        if any(isinstance(group.get(name), Tensor) for name in ("lr", "momentum", "weight_decay")):
            raise Unfit(f"parameter group {number} has an option that is a tensor")
        rule = make(group)
        rules.append(replace(rule, counts_on_device=True) if may_skip and isinstance(rule, AdamRule) else rule)
    return tuple(rules)
