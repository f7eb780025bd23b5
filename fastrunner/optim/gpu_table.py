"""The parameters of an optimizer on a GPU: Triton kernels update what they can, torch's operations the rest.

The kernels take dense float32, bfloat16 and float16 parameters of any layout, with gradients of the same dtype and
layout. Nothing is read from the device: the norm of a clipped step stays there, and whether a step is skipped is
decided there. So a step may be captured in a CUDA graph, after one outside of it with the same parameters, gradients
and options. The graph keeps the options of its capture; what shall change between replays must be a tensor on the
device (``lr``, an average's momentum).

Launches: two for the norm (one, where only steps are counted), then an update for each combination of dtypes, nesterov,
decoupled weight decay, maximize, and momentum or none; so three in most runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._core import StaleTable
from ..kernels.chunks import BLOCK, CHUNK, address_rows, chunk_rows, launch_on, same_order, to_device
from ..kernels.ema import launch_ema
from ..kernels.grad_norm import CLIP_COEF, FOUND_INF, NORM, NUM_SCALARS, launch_sum_squares
from ..kernels.prepare import EMA_MOMENTUM, LR, launch_prepare
from ..kernels.update import Kind, Rows
from . import functional
from .algorithms import Algorithm
from .ema_term import EmaTerm
from .gpu_columns import STEP, Column, Layouts, grad_refusal, make_column, refusal
from .gpu_page import Page, capturing
from .gpu_rest import Live, sum_squares, update_rest
from .gpu_rules import RULES, Form, Launch, on_device, scalar
from .masters import KEY as MASTER
from .memory import shared_gradients, shared_memory
from .names import ParamGroups, State, name_of
from .options import option
from .tables import Table

_T = TypeVar("_T")
_K = TypeVar("_K")

# What captured CUDA graphs read at every replay; they may be replayed for as long as the process lives.
CAPTURED: list[Any] = []

MOST_STATES = 3  # Adam's with amsgrad
EMPTY = 16  # stands for the address of a gradient without elements, which has none, but is not missing
INF = float("inf")
_ONE_TYPE, _STRIDED = frozenset({Tensor}), frozenset({torch.strided})


class GpuTable:
    """One optimizer's parameters on a GPU, as they were when this was built; ``step`` says when they no longer are.

    Args:
        algorithm: what is computed.
        param_groups: the optimizer's, with the algorithm's options.
        state: the optimizer's. Gets an entry for each parameter that has a gradient and needs state.
        ema: averages that steps may take; of any parameters.
        masters: update 16-bit parameters through float32 masters. If not, they are updated in float32 and rounded.
        chunk, block: sizes for the kernels; for tests.
    Raises:
        ValueError: something in ``state`` is not a tensor of its parameter's shape.
        RuntimeError: a CUDA graph is being captured, and a table cannot be built into one.
    Cost: some microseconds a parameter; wanted when parameters or state are replaced. A step takes the host about 1 us
    a parameter, most of it for looking at gradients and parameters, and 2 us a group.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        param_groups: ParamGroups,
        state: State,
        *,
        ema: EmaTerm | None = None,
        masters: bool = True,
        chunk: int = CHUNK,
        block: int | None = None,
    ) -> None:
        device = next((p.device for group in param_groups for p in group["params"]), torch.device("cuda"))
        if capturing(device):
            raise RuntimeError(
                "a CUDA graph cannot capture this step, because the optimizer has to look at its parameters anew: "
                "do a step outside of the capture first, with the same parameters, gradients and options"
            )
        self.ema = ema
        self.rest: dict[tuple[int, int], str] = {}  # (group, parameter) -> why the kernels do not update it
        self._rule, self._masters = RULES[algorithm.name], masters
        self._device, self._chunk, self._block = device, chunk, block
        self._columns: list[Column] = []
        self._rest: list[tuple[int, str, Tensor]] = []
        self._sharing: set[int] = set()
        self._kept = False
        with torch.no_grad(), launch_on(device):
            self._sort(param_groups, state)
            self._remember(param_groups, state)
            self._build()

    def _sort(self, param_groups: ParamGroups, state: State) -> None:
        everything = [p for group in param_groups for p in group["params"]]
        self._sharing = shared_memory(everything)
        sharing = {
            **dict.fromkeys(shared_gradients(everything), "shares its gradient with another parameter"),
            **dict.fromkeys(self._sharing, "shares memory with another parameter"),
        }
        for g, group in enumerate(param_groups):
            form = self._rule.form(group)
            for i, param in enumerate(group["params"]):
                name = name_of(param_groups, g, i)
                column = sharing.get(id(param)) or self._column(param, g, name, form, state)
                if isinstance(column, Column):
                    self._columns.append(column)
                else:
                    self.rest[g, i] = column
                    self._rest.append((g, name, param))

    def _column(self, param: Tensor, group: int, name: str, form: Form, state: State) -> Column | str:
        if why := refusal(param) or (None if param.grad is None else grad_refusal(param.grad, param)):
            return why
        has_step = self._rule.has_step
        return make_column(param, group, name, form, state, has_step=has_step, masters=self._masters)

    def _remember(self, param_groups: ParamGroups, state: State) -> None:
        """What ``_check`` compares with."""
        params = [column.param for column in self._columns]
        self._params = Layouts(params)
        columns = self._columns
        self._per_column = [c.strides for c in columns], [c.param.dtype for c in columns], [c.waits for c in columns]
        self._members = [tuple(group["params"]) for group in param_groups]
        self._keys = [self._rule.key(group) for group in param_groups]
        self._counts = self._rule.counts(param_groups)
        self._remember_state(state)

    def _remember_state(self, state: State) -> None:
        self._slots = tuple(state.values())
        stored: list[tuple[dict[str, Any], str, Tensor]] = []
        for column in self._columns:
            tensors = dict(zip(column.form.keys, column.states, strict=False))
            tensors |= {} if column.master is None else {MASTER: column.master}
            tensors |= {} if column.step is None else {STEP: column.step}
            for key, tensor in tensors.items():
                if column.slot is not None and key not in column.fresh:
                    stored.append((column.slot, key, tensor))
        self._stored = [list(parts) for parts in zip(*stored, strict=True)] or [[], [], []]

    def _build(self) -> None:
        """Everything that lies on the device."""
        device, columns = self._device, self._columns
        self._page = Page(len(columns), len(self._members), device)
        self._idle = torch.zeros(
            NUM_SCALARS, dtype=torch.float32, device=device
        )  # stands for the scalars where there is no norm
        self._bias = torch.zeros(max(1, len(columns)), 2, dtype=torch.float32, device=device)
        # SGD has no step in its state. Where it matters, a buffer that exists counts as used before; but see take_over.
        used = [0.0 if set(c.form.keys) & set(c.fresh) else 1.0 for c in columns]
        self._used = to_device(torch.tensor(used, dtype=torch.float32, device="cpu"), device)
        rows = [
            [(c.param if c.master is None else c.master).data_ptr() for c in columns],
            [0 if c.master is None else c.param.data_ptr() for c in columns],
            [self._used.data_ptr() + 4 * i if c.step is None else c.step.data_ptr() for i, c in enumerate(columns)],
            [c.group for c in columns],
            *([c.states[i].data_ptr() if i < len(c.states) else 0 for c in columns] for i in range(MOST_STATES)),
        ]
        rows_there = to_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
        self._param_row, self._low_row, self._count_row, self._group_row, *self._state_rows = rows_there
        self._active = [i for i, column in enumerate(columns) if not column.waits]
        self._plan_norm()
        averages = self._plan_averages()
        self._plan_updates(averages)

    def take_over(self, before: Table) -> None:
        """How often SGD's buffers were used. They are in the state from their first step on, and only the device knows
        whether it skipped that. (A state that was saved and loaded does not tell either: its buffers count as used.)
        """
        if not isinstance(before, GpuTable) or not before._counts or self._rule.has_step:
            return
        counted = {id(t): i for i, column in enumerate(before._columns) for t in column.states}
        for i, column in enumerate(self._columns):
            if column.states and not column.fresh and id(column.states[0]) in counted:
                self._used[i].copy_(before._used[counted[id(column.states[0])]])

    def _chunks(self, places: Sequence[int]) -> Tensor:
        """The list of chunks of these columns, on the device."""
        columns = [self._columns[i] for i in places]
        numels, groups = [c.param.numel() for c in columns], [c.group for c in columns]
        return to_device(chunk_rows(numels, groups, tensors=places, chunk=self._chunk), self._device)

    def _plan_norm(self) -> None:
        by_dtype = _by(self._active, lambda i: self._columns[i].param.dtype)
        lists = [(dtype, self._chunks(places)) for dtype, places in by_dtype.items()]
        sizes = [len(chunks) for _, chunks in lists]
        self._partials = torch.zeros(sum(sizes) + bool(self._rest), dtype=torch.float64, device=self._device)
        parts = torch.split(self._partials[: sum(sizes)], sizes)
        self._norms = [(dtype, chunks, part) for (dtype, chunks), part in zip(lists, parts, strict=True)]

    def _plan_averages(self) -> list[Tensor | None]:
        """The average of each column that takes it with its update; the others are noted."""
        folded: list[Tensor | None] = [None] * len(self._columns)
        self._averages: list[Callable[[], None]] = []
        self._rest_averages: list[tuple[Tensor, Tensor]] = []
        alone: list[tuple[Tensor, Tensor]] = []
        if self.ema is None:
            return folded
        place = {id(self._columns[i].param): i for i in self._active}
        # Memory that two averages share, or an average and anything else.
        states = [t for column in self._columns for t in (*column.states, column.master) if t is not None]
        sharing = self._sharing | shared_memory([*self.ema.params, *self.ema.averages, *states])
        for param, average in zip(self.ema.params, self.ema.averages, strict=True):
            fits = all(t.device == self._device and refusal(t) is None for t in (param, average))
            i = place.get(id(param))
            if not fits or {id(param), id(average)} & sharing or not same_order(average, param):
                self._rest_averages.append((average, param))
            elif i is not None and (self._columns[i].master is None or self.ema.of_masters):
                folded[i] = average
            else:
                alone.append((average, param))
        for (average_dtype, value_dtype), pairs in _by(alone, lambda pair: (pair[0].dtype, pair[1].dtype)).items():
            rows = to_device(address_rows(*zip(*pairs, strict=True)), self._device)
            chunks = chunk_rows([a.numel() for a, _ in pairs], [0] * len(pairs), chunk=self._chunk)
            launch = functools.partial(
                launch_ema,
                to_device(chunks, self._device),
                rows[0],
                rows[1],
                self._page.values[0, EMA_MOMENTUM],
                average_dtype=average_dtype,
                value_dtype=value_dtype,
                block=self._block,
            )
            self._averages.append(launch)
        averages = [a for a in folded if a is not None]
        self._averaged = Layouts([*averages, *(t for pair in alone for t in pair)])
        return folded

    def _plan_updates(self, averages: list[Tensor | None]) -> None:
        addresses = [0 if a is None else a.data_ptr() for a in averages]
        average_row = to_device(torch.tensor(addresses, dtype=torch.int64, device="cpu"), self._device)

        def form_of(place: int) -> tuple[Form, Kind]:
            column, average = self._columns[place], averages[place]
            half = column.param.dtype if column.master is not None else None
            kind = Kind(
                param=torch.float32 if half else column.param.dtype,
                grad=column.param.dtype,
                state=column.states[0].dtype if column.states else None,
                average=None if average is None else average.dtype,
                low=half,
                maximize=column.form.maximize,
            )
            return column.form, kind

        self._launches = []
        for (form, kind), places in _by(self._active, form_of).items():
            rows = Rows(
                self._param_row,
                self._page.grads,
                self._group_row,
                tuple(self._state_rows[: len(form.keys)]),
                average_row if kind.average else None,
                self._low_row if kind.low else None,
                self._count_row if self._counts else None,
            )
            self._launches.append(Launch(self._chunks(places), rows, kind, form.variant))

    def step(
        self,
        param_groups: ParamGroups,
        state: State,
        *,
        max_norm: float | None = None,
        write_back: bool = True,
        average: bool = False,
        zero: bool = False,
        skip_nonfinite: bool = False,
    ) -> Tensor | None:
        """One step over all parameters that have a gradient.

        Args:
            param_groups, state: the optimizer's, again; options are read from them now.
            max_norm: bound on the joint L2 norm of all gradients; None: no clipping.
            write_back: store the clipped gradients.
            average: then take the average of ``ema``.
            zero: then set all gradients to None.
            skip_nonfinite: update nothing where the norm is not finite; averages are taken.
        Returns:
            The norm before clipping: float32, 0-D, on the device; None if neither ``max_norm`` nor ``skip_nonfinite``
            wants it.
        Raises:
            fastrunner._core.StaleTable: this table no longer describes the optimizer; nothing was written.
            TypeError: an option is not a number, or a sparse gradient was to be clipped.
            RuntimeError: torch cannot update one of the rest either, or too many steps were captured in a row.
        """
        average = average and self.ema is not None
        self._check(param_groups, state, average)
        addresses, grads = self._gradients()
        self._keep_if_captured()
        rest = [Live(g, name, p, p.grad) for g, name, p in self._rest if p.grad is not None]
        clip, wants_norm = max_norm is not None, max_norm is not None or skip_nonfinite
        with torch.no_grad(), launch_on(self._device):
            self._send(addresses, param_groups, INF if max_norm is None else max_norm, average)
            scalars = self._prepare(rest, wants_norm, skip_nonfinite)
            for launch in self._launches:
                kind = _with_options(launch.kind, average, clip, write_back, skip_nonfinite)
                self._rule.launch(launch, kind, self._bias, scalars, self._page.values, self._block)
            if rest:
                update_rest(
                    rest,
                    param_groups,
                    state,
                    is_sgd=not self._rule.has_step,
                    masters=self._masters,
                    clip_coef=scalars[CLIP_COEF] if clip else None,
                    found_inf=scalars[FOUND_INF] if skip_nonfinite else None,
                    write_back=write_back,
                )
            if average:
                self._average()
        self._publish(addresses, state)
        written = list(itertools.compress(self._params.tensors, addresses))
        increment_version([*written, *grads] if clip and write_back else written)
        if zero:
            for param in (*self._params.tensors, *(param for _, _, param in self._rest)):
                param.grad = None
        return scalars[NORM] if wants_norm else None

    def _check(self, param_groups: ParamGroups, state: State, average: bool) -> None:
        """Raise StaleTable unless parameters, options' kinds and state are what this was built for."""
        members = [group["params"] for group in param_groups]
        same = len(members) == len(self._members) and all(
            len(now) == len(then) and all(map(is_, now, then)) for now, then in zip(members, self._members, strict=True)
        )
        if not same:
            raise StaleTable("param_groups hold other parameters than before")
        if [self._rule.key(group) for group in param_groups] != self._keys:
            raise StaleTable("options changed that choose the kernel")
        if len(state) != len(self._slots) or not all(map(is_, state.values(), self._slots)):
            raise StaleTable("optimizer.state was replaced or added to")
        slots, keys, tensors = self._stored
        if not all(map(is_, map(dict.get, slots, keys), tensors)):
            raise StaleTable("a state tensor was replaced")
        if self._params.changed() or (average and self._averaged.changed()):
            raise StaleTable("a parameter or average has moved, or changed its shape or layout")

    def _gradients(self) -> tuple[list[int], list[Tensor]]:
        """Addresses of the columns' gradients, 0 for none, and the gradients that are there."""
        everyone = [p.grad for p in self._params.tensors]
        there = [grad is not None for grad in everyone]
        grads = [grad for grad in everyone if grad is not None]
        strides, dtypes, waiting = (list(itertools.compress(each, there)) for each in self._per_column)
        plain = _ONE_TYPE.issuperset(map(type, grads)) and _STRIDED.issuperset(g.layout for g in grads)
        plain = plain and list(map(Tensor.stride, grads)) == strides and [g.dtype for g in grads] == dtypes
        if not plain or any(map(Tensor.is_neg, grads)):
            for column, grad in zip(itertools.compress(self._columns, there), grads, strict=True):
                if why := grad_refusal(grad, column.param):
                    raise StaleTable(f"{column.name} {why}")
        if any(waiting):
            raise StaleTable("a parameter has its first gradient")
        found = [address or EMPTY for address in map(Tensor.data_ptr, grads)]
        if len(set(found)) != len(found) and len(set(found) - {EMPTY}) != len(found) - found.count(EMPTY):
            raise StaleTable("two parameters share a gradient")
        if len(found) == len(there):
            return found, grads
        rest = iter(found)
        return [next(rest) if is_there else 0 for is_there in there], grads

    def _send(self, addresses: list[int], param_groups: ParamGroups, max_norm: float, average: bool) -> None:
        """This step's addresses and options to the device."""
        device, values = self._device, self._page.values
        momentum = self.ema.momentum if average and self.ema is not None else 0.0
        try:
            options = [self._rule.numbers(group, device) for group in param_groups]
            self._page.send(addresses, (max_norm, scalar(momentum, device)), options)
        except (TypeError, ValueError):
            for g, group in enumerate(param_groups):
                for name in self._rule.names:
                    option(g, name, group[name])  # says which it is
            raise
        for place, value in (
            ((0, EMA_MOMENTUM), momentum),
            *(((1 + g, LR), o["lr"]) for g, o in enumerate(param_groups)),
        ):
            if type(value) is not float and on_device(value, device):
                values[place].copy_(value.detach().reshape(()))

    def _prepare(self, rest: list[Live], wants_norm: bool, skip_nonfinite: bool) -> Tensor:
        """The scalars of this step; fresh memory where they are written, since the norm is handed out."""
        if not wants_norm and not self._counts:
            return self._idle
        scalars = torch.empty(NUM_SCALARS, dtype=torch.float32, device=self._device) if wants_norm else self._idle
        if wants_norm:
            for dtype, chunks, part in self._norms:
                launch_sum_squares(chunks, self._page.grads, part, dtype=dtype, block=self._block or BLOCK)
            if self._rest:
                self._partials[-1] = sum_squares(rest) if rest else 0.0
        launch_prepare(
            scalars,
            self._page.grads,
            self._group_row,
            self._page.values,
            partials=self._partials if wants_norm else None,
            steps=self._count_row if self._counts else None,
            bias=self._bias if self._rule.has_step else None,
            skip_nonfinite=skip_nonfinite,
            block=self._block or BLOCK,
        )
        return scalars

    def _keep_if_captured(self) -> None:
        """Tables outlive the optimizer if a graph has them; parameters and state need not."""
        if not self._kept and capturing(self._device):
            self._kept = True
            CAPTURED.append((self._page, self._launches, self._averages, self._norms, self._partials, self._bias))
            CAPTURED.append((self._idle, self._used))

    def _average(self) -> None:
        """Averages that no update has taken."""
        assert self.ema is not None
        for launch in self._averages:
            launch()
        for average, value in self._rest_averages:
            average.copy_(functional.ema(average, value, self.ema.momentum))

    def _publish(self, addresses: list[int], state: State) -> None:
        """Put new state where it belongs, now that a step has written it."""
        fresh = [column for column in itertools.compress(self._columns, addresses) if column.fresh]
        for column in fresh:
            assert column.slot is not None
            column.slot.update(column.fresh)
            column.fresh.clear()
        if fresh or len(state) != len(self._slots):  # the rest may have added some, too
            self._remember_state(state)


@functools.lru_cache(maxsize=256)
def _with_options(kind: Kind, average: bool, clip: bool, write_back: bool, skip_nonfinite: bool) -> Kind:
    return dataclasses.replace(
        kind,
        average=kind.average if average else None,
        clip=clip,
        write_back=write_back,
        skip_nonfinite=skip_nonfinite,
    )


def _by(items: Sequence[_T], key: Callable[[_T], _K]) -> dict[_K, list[_T]]:
    """Items with the same key, in order."""
    lists: dict[_K, list[_T]] = {}
    for item in items:
        lists.setdefault(key(item), []).append(item)
    return lists
