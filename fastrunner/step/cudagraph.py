"""Recipe ``cudagraph``: whole iterations captured by CUDA graphs, and replayed without launching them one by one.

Each kind of batch goes through the same stages, every one of them a training iteration:

    seen      on the recipe below, and what it moves besides tensors is looked at
    measured  there too, ``MEASURED`` times: how long the device waits for the host is all that replays can save
    warm      on the side stream, ``WARM_UPS`` times, by the operations that are to be captured
    captured  recorded, compared with eager on two batches, replayed from then on

Where that does not pay, or cannot be, the recipe below runs it, and ``explain`` says why. Graphs are bounded: the least
used one goes. All of them share a pool.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .binding import Binding
from .capture import MeanOverRanks
from .captured import Body, Captured, EagerBody, LossScale, Terms, TracedBody
from .captured import Window as CapturedWindow
from .device_update import FACTOR, Options
from .graph_backend import Draws, GraphBackend
from .guards import SilentState, batch_key, quick_key
from .lift import at as users_line
from .torch_private import Unfit
from .verify import look
from .verify_captured import verify_captured
from .window import Window
from .worth import Next, Worth

MAX_GRAPHS = 8  # alive at a time; the least used one goes
MAX_CAPTURES = 24  # in a run: a model that has new shapes all the time is not worth more
MAX_BINDINGS = 2  # sets of parameters, state and modes whose graphs are kept: a mode may flip, and flip back
WARM_UPS = 3  # torch's advice: libraries choose algorithms and make workspaces in them

Below = Callable[[Any], None]


@dataclass
class Bound:
    """Graphs of one set of tensors. They have the addresses in them."""

    binding: Binding
    options: Options
    graphs: dict[Any, Captured] = field(default_factory=dict)
    warming: dict[Any, tuple[Captured, Body]] = field(default_factory=dict)

    def free(self) -> None:
        for graph in self.graphs.values():
            graph.free()


class CudaGraphStep:
    """Whole iterations of one model and optimizer. Called as ``graph.GraphStep`` is.

    Args:
        model: what is bound: the module without wrapper.
        step: ``train_step(batch, optimizer)`` of it, with the precision and layout of the run.
        optimizer: the runner's.
        warn: told once for each reason why there is no graph.
        backend: captures and replays.
        max_norm: clip to it; None: do not.
        ema: EMAHook, whose average is taken with the update; None: there is none.
        place: the runner's batch -> what ``step`` gets, on the device; None: as it is.
        exchange: between the ranks; None: there is one.
        traced: capture the graph that recipe ``graph`` would run, not the operations of ``fused``.
        adds_up: GradientCumulativeOptimizerHook, in whose windows gradients add up; None: each iteration is an update.
        scaler: Fp16OptimizerHook, whose loss scale is used; None: there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[..., Any],
        optimizer: Any,
        warn: Callable[[str], None],
        backend: GraphBackend,
        max_norm: float | None = None,
        ema: Any = None,
        place: Callable[[Any], Any] | None = None,
        exchange: MeanOverRanks | None = None,
        traced: bool = False,
        adds_up: Any = None,
        scaler: Any = None,
    ) -> None:
        self._model, self._step, self._optimizer = model, step, optimizer
        self._warn, self._backend, self._max_norm, self._ema = warn, backend, max_norm, ema
        self._place, self._exchange, self._traced = place, exchange, traced
        self.window = None if adds_up is None else Window(adds_up)
        self._scaler = scaler
        self._bounds: OrderedDict[int, Bound] = OrderedDict()  # the newest is the one that holds
        self._now: Bound | None = None
        self._order: OrderedDict[tuple[int, Any], Captured] = OrderedDict()  # of all bounds, the least used first
        self._last: tuple[Any, Captured] | None = None  # the graph that ran, and its key
        self._doubtful = True
        self._worth = Worth(None if exchange is None else lambda values: exchange.agree(values, backend.device))
        self._refused: dict[Any, str] = {}  # by kind of batch; under None: whatever the batch
        self._watch = (Next.BELOW, None)  # what the next iteration is for, and the kind of its batch
        self._host_s = 0.0  # of the newest iteration on the recipe below
        self.num_captures = self.num_calls = self.num_dropped = 0

    @property
    def graphs(self) -> list[Captured]:
        """All that there are, the least used first."""
        return list(self._order.values())

    why_single = "a replay is one iteration"  # see GraphStep

    def many(self, iteration: int) -> None:
        """A replay is one iteration."""

    def doubt(self) -> None:
        """Somebody's Python has run, or will: look at everything again before the next replay."""
        self._doubtful = True
        if self.window is not None:
            self.window.release()

    def explain(self) -> list[str]:
        """How many graphs there are, what they take, how often they ran, and why there are no others."""
        size = sum(graph.num_bytes for graph in self._order.values()) / 2**20
        dropped = f", {self.num_dropped} dropped" if self.num_dropped else ""
        lines = [f"{len(self._order)} CUDA graphs with {size:.0f} MiB in their pool{dropped}, {self.num_calls} replays"]
        return lines + self._worth.explain() + sorted({f"no CUDA graph: {why}" for why in self._refused.values()})

    def __call__(
        self, batch: Any, iteration: int, ends: bool = True, factor: float = 1.0
    ) -> tuple[dict[str, Any], Any] | None:
        """Run an iteration; (outputs, grad_norm), or None: ``around`` has to.

        Args:
            ends: the iteration ends in an update.
            factor: what the loss is divided by, where gradients add up.
        """
        if None in self._refused and self._exchange is None:
            return None
        average = None if self._ema is None else self._ema.average_at(iteration)
        weight = 0.0 if average is None else average.momentum
        if self._place is not None:
            batch = self._place(batch)
        shape = quick_key(batch)
        quick = shape is not None
        if not quick:
            try:
                shape = batch_key(batch)
            except TypeError as error:
                self._refuse(None, str(error))
        if self._exchange is not None:  # others wait for this rank's vote, whatever came here
            self._worth.vote(shape, None in self._refused or shape in self._refused)
        if None in self._refused or (self._doubtful and not self._settle()):
            return None
        bound = self._now
        assert bound is not None
        key = (shape, average is not None, ends)
        if self._last is not None and self._last[0] == key:
            graph: Captured | None = self._last[1]
        else:
            graph = self._switch(bound, key)
        if not quick:
            tensors: Any = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        else:
            tensors = list(batch.values()) if type(batch) is dict else batch
        if graph is None:
            done = self._prepare(bound, key, batch, tensors, (weight, factor))
            if not isinstance(done, Captured):
                return self._ran(iteration, ends, done)
            graph, bound = done, self._now
            assert bound is not None
        elif self.window is not None and not self.window.bind(bound.binding):
            return None
        bound.options.fill(weight, factor)
        values = graph.run(tensors)
        bound.binding.done(ends)
        self.num_calls += 1
        outputs = graph.build(values), values[-1] if graph.clips else None
        return outputs if self.window is None else self._ran(iteration, ends, outputs)

    def _ran(
        self, iteration: int, ends: bool, done: tuple[dict[str, Any], Any] | None
    ) -> tuple[dict[str, Any], Any] | None:
        """Note that an iteration was done here, if it was."""
        if done is not None and self.window is not None:
            self.window.ran(iteration, ends)
        return done

    def around(self, below: Below, runner: Any) -> None:
        """Run the iteration on the recipe below; where a graph is thought of, look what it moves or what it costs."""
        (watch, shape), self._watch = self._watch, (Next.BELOW, None)
        self.doubt()  # what it left in .grad is let go before the next replay
        if watch is Next.MEASURE:
            cost = self._backend.measure(lambda: below(runner), self._host_s)
            self._worth.kinds[shape].costs.append(cost)
            return
        if watch is not Next.LOOK:
            below(runner)
            return
        before, begin = SilentState(self._model), time.perf_counter()
        below(runner)
        self._host_s = time.perf_counter() - begin
        if moved := before.moved():
            self._refuse(None, moved[0])

    def close(self) -> None:
        """End of a run. Graphs with collectives in them go: the process group may be destroyed next."""
        if self._exchange is None:
            return
        for bound in self._bounds.values():
            bound.free()
        self._bounds.clear()
        self._order.clear()
        self._now = self._last = None
        self._doubtful = True

    def state_dict(self) -> dict[str, Any]:
        """Which kinds of batches have graphs, for a checkpoint: the run that goes on from it computes them so, too."""
        return {} if None in self._refused or self._exchange is not None else self._worth.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self._exchange is None:
            self._worth.batches.load_state_dict(state)

    def _settle(self) -> bool:
        """Whether a binding holds, or could be made anew."""
        if self._now is None or not self._now.binding.holds():
            self._last = self._now = None
            for number, bound in self._bounds.items():
                if bound.binding.holds():
                    self._bounds.move_to_end(number)
                    self._now = bound
                    break
            else:
                try:
                    self._now = self._bind()
                except Unfit as error:
                    if not error.passing:
                        self._refuse(None, str(error))
                    return False
        if self.window is None:
            self._optimizer.zero_grad()
        self._doubtful = False
        return True

    def _bind(self) -> Bound:
        average = None if self._ema is None else self._ema._term
        binding = Binding(
            self._model,
            self._optimizer,
            average,
            adds_up=self.window is not None,
            scaler=self._scaler,
            skips=not self._traced,
        )
        bound = self._bounds[id(binding)] = Bound(binding, Options(binding, self._backend))
        while len(self._bounds) > MAX_BINDINGS:
            self._forget(next(iter(self._bounds)))
        return bound

    def _forget(self, number: int) -> None:
        """Let a binding and its graphs go."""
        self._bounds.pop(number).free()
        for key in [key for key in self._order if key[0] == number]:
            del self._order[key]
        if self._now is not None and id(self._now.binding) == number:
            self._now = self._last = None

    def _switch(self, bound: Bound, key: Any) -> Captured | None:
        """The graph of another kind of batch than the one before, if there is one."""
        graph = bound.graphs.get(key)
        if graph is not None:
            self._last = key, graph
            self._order.move_to_end((id(bound.binding), key))
        return graph

    def _prepare(
        self, bound: Bound, key: Any, batch: Any, tensors: Sequence[Tensor], numbers: tuple[float, float]
    ) -> Captured | tuple[dict[str, Any], Any] | None:
        """What an iteration without a graph is: (outputs, grad_norm) of a warm-up, None for the recipe below."""
        shape = key[0]
        if shape in self._refused:
            return None
        try:
            now = self._worth.next(shape, batch)
        except Unfit as error:
            self._refuse(None if error.passing else shape, str(error))
            return None
        if now is Next.CAPTURE and self.num_captures >= MAX_CAPTURES:
            self._refuse(None, f"{MAX_CAPTURES} graphs were made, for shapes or parameters that changed")
            return None
        if now is not Next.CAPTURE:
            self._watch = now, shape
            return None
        if bound.binding.is_outgrown():
            self._forget(id(bound.binding))
            if not self._settle() or self._now is None:
                return None
            bound = self._now
        bound.options.fill(*numbers)
        try:
            if self.window is not None and not self._opens(self.window, bound.binding):
                return None
            warming = bound.warming.get(key)
            if warming is None:
                warming = bound.warming[key] = self._make(bound, key, batch)
            captured, body = warming
            if captured.num_warm_ups < WARM_UPS:
                return self._warm_up(bound, captured, body, key, tensors)
            self._record(bound, key, captured, body, batch)
        except (Unfit, torch.OutOfMemoryError) as error:
            bound.warming.pop(key, None)
            self._doubtful = True
            self._give_up(bound, shape, error)
            return None
        return bound.graphs[key]

    def _give_up(self, bound: Bound, shape: Any, error: Unfit | torch.OutOfMemoryError) -> None:
        """For now, or for good and with a reason."""
        if isinstance(error, torch.OutOfMemoryError):
            free = self._backend.free_bytes() / 2**20
            self._refuse(shape, f"memory is short: {_line(error)}; {free:.0f} MiB are free")
        elif error.passing:
            self._forget(id(bound.binding))  # a first update has brought new state, or will
        else:
            self._refuse(shape, f"{error}{'' if ' at /' in str(error) else _line_in_step(error)}")

    def _make(self, bound: Bound, key: Any, batch: Any) -> tuple[Captured, Body]:
        binding, options = bound.binding, bound.options
        kind = self._worth.kinds[key[0]]
        if not kind.looked:  # it comes from a checkpoint
            kind.looked = True
            if moved := look(binding, batch, self._step):
                raise Unfit(moved[0])
        window = None
        if self.window is not None:
            window = CapturedWindow(options.tensor[FACTOR], [sums.detach() for sums in binding.sums], key[2])
        terms = Terms(self._max_norm, key[1], _scale_of(binding), window, self._exchange)
        body: Body
        if self._traced:
            body = TracedBody(binding, options, self._step, terms, batch)
        else:
            body = EagerBody(binding, options, self._step, terms)
        return Captured(self._backend, body, binding, options, batch, _plain_tensors(self._model)), body

    def _opens(self, window: Window, binding: Binding) -> bool:
        """Let gradients add up where a graph finds them: of all parameters that were updated before."""
        names = [e.name for e in binding.trained if e.state or not binding.rules[e.group].keys]
        window.expect(frozenset(names))
        return window.bind(binding)

    def _warm_up(
        self, bound: Bound, captured: Captured, body: Body, key: Any, tensors: Sequence[Tensor]
    ) -> tuple[dict[str, Any], Any]:
        """An iteration by the operations to be captured. Where they fail, the generators and buffers are put back."""
        draws = Draws(self._backend, generators_of(self._model, self._backend.device))
        state = draws.now()
        buffers = [buffer.clone() for buffer in bound.binding.buffers.values()]
        try:
            done = captured.warm_up(tensors)
        except Exception as error:
            draws.put_back(state)
            with torch.no_grad():
                for buffer, old in zip(bound.binding.buffers.values(), buffers, strict=True):
                    buffer.copy_(old)
            if isinstance(error, (Unfit, torch.OutOfMemoryError)):
                raise
            raise Unfit(f"the step raised {type(error).__name__}: {_line(error)}") from error
        bound.binding.done(key[2])
        try:
            if self.window is not None:
                self.window.expect(body.has_grads)
        except Unfit as error:  # the iteration is done all the same
            del bound.warming[key]
            self._refuse(key[0], str(error))
        return done

    def _record(self, bound: Bound, key: Any, captured: Captured, body: Body, batch: Any) -> None:
        """Capture and verify; with several ranks, all of them or none."""
        draws = Draws(self._backend, generators_of(self._model, self._backend.device))
        self.num_captures += 1
        self._together(lambda: self._capture(captured, draws))
        sample = self._worth.batches.sample(key[0])
        step, terms = self._step, (self._max_norm, key[1], self._exchange, key[2])
        try:
            for each in [batch] if sample is None else [sample, batch]:
                args = draws, bound.binding, bound.options, captured, body.has_grads, each, step, terms
                self._together(lambda args=args: verify_captured(*args))  # type: ignore[misc]
        except BaseException:
            captured.free()
            raise
        del bound.warming[key]
        self._worth.batches.made(key[0])
        bound.graphs[key] = self._order[id(bound.binding), key] = captured
        self._last = key, captured
        while len(self._order) > MAX_GRAPHS:
            self._drop()

    def _capture(self, captured: Captured, draws: Draws) -> None:
        """With one graph less where memory is short."""
        try:
            captured.record(draws.generators)
        except torch.OutOfMemoryError:
            if not self._drop():
                raise
            captured.record(draws.generators)

    def _together(self, part: Callable[[], None]) -> None:
        """Do something that all ranks have to manage; raises where another one did not."""
        failed = None
        try:
            part()
        except (Unfit, torch.OutOfMemoryError) as error:
            failed = error
        if not self._worth.all_say(failed is None):
            raise failed or Unfit("another rank cannot capture this step")

    def _drop(self) -> bool:
        """Let the least used graph go; False where there is none."""
        if not self._order:
            return False
        (number, key), graph = self._order.popitem(last=False)
        graph.free()
        del self._bounds[number].graphs[key]
        self.num_dropped += 1
        return True

    def _refuse(self, shape: Any, why: str) -> None:
        if why not in self._refused.values():
            self._warn(f"no CUDA graph of the step: {why}. It runs on the recipe below.")
        self._refused[shape] = why


def _scale_of(binding: Binding) -> LossScale | None:
    """The loss scale among the tensors of a binding."""
    if binding.scale is None or binding.scale_rule is None:
        return None
    scale, growth = binding.static[binding.scale : binding.scale + 2]
    rule = binding.scale_rule
    return LossScale(scale, growth, rule.growth, rule.backoff, rule.interval, rule.fixed)


def generators_of(model: nn.Module, device: torch.device) -> list[torch.Generator]:
    """Generators of the device that modules keep as attributes: a graph must know them, or replays repeat a draw."""
    found = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Generator) and value.device.type == device.type
    }
    return list(found.values())


def _plain_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors that modules keep as plain attributes; constants, or ``SilentState`` would have said so."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def _line_in_step(error: BaseException) -> str:
    """`` at file:line`` of the user's step in which the error came up that an Unfit was raised from; or nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    trace, inside = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code is EagerBody._forward_backward.__code__:
            inside = trace.tb_next
        trace = trace.tb_next
    return users_line(inside)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
