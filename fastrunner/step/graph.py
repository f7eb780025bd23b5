"""Recipe ``graph``: forward, loss, backward, clip, update and average in one compiled call.

A graph is made for a batch's structure and shapes (``guards.batch_key``) and for everything around it
(``binding.Binding.key``). Until there is one, where it does not fit, and where anybody may look at what it does not
leave behind (``.grad``), the recipe below runs the iteration; weights and state are shared, so any iteration may.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..plan.host_reads import unwatched
from .auto import Beside
from .batches import Batches
from .binding import Binding
from .guards import SilentState, batch_key, quick_key
from .many import Many
from .torch_private import Unfit, compile_graph, missing, tensor_guard
from .trace import Traced, trace_step
from .verify import Run, look, verify
from .window import Window

MAX_GRAPHS = 8  # alive at a time; the least used one goes
MAX_COMPILES = 24  # in a run: a model that has new shapes all the time is not worth more

Below = Callable[[Any], None]


@dataclass(frozen=True)
class Compiled:
    """A graph that has been verified."""

    run: Run
    build: Callable[[Sequence[Any]], dict[str, Any]]
    clips: bool
    updates: bool = True
    logs_columns: bool = False  # see ``Outputs``


class Prepared:
    """A graph with all that its next call needs: an iteration like the one before looks no further.

    Args:
        batch: the next ones are like it.
        plain: it is a dict or sequence of tensors; others are looked at each time.
        averages, ends: what the graph was made for besides.
    """

    __slots__ = ("averages", "check", "clips", "ends", "graph", "kind", "names", "size", "static")

    def __init__(self, graph: Compiled, binding: Binding, batch: Any, plain: bool, averages: bool, ends: bool) -> None:
        self.graph, self.static, self.averages, self.ends = graph, binding.static, averages, ends
        self.kind, self.size = type(batch), len(batch) if plain else 0
        self.names = [*batch] if self.kind is dict else None
        self.check = tensor_guard([*batch.values()] if self.kind is dict else batch) if plain else None

    def tensors(self, batch: Any, averages: bool, ends: bool) -> Any:
        """The tensors of a batch; None where it has to be looked at."""
        check = self.check
        if check is None or type(batch) is not self.kind or averages is not self.averages or ends is not self.ends:
            return None
        if self.names is None:
            return batch if len(batch) == self.size and check(*batch) else None
        return batch.values() if [*batch] == self.names and check(*batch.values()) else None


class GraphStep:
    """Whole iterations of one model and optimizer.

    Args:
        model: what is bound: the runner's.
        step: ``train_step(batch, optimizer)``, with the precision and layout of the run.
        optimizer: the runner's.
        warn: told once for each reason why there is no graph.
        max_norm: clip to it; None: do not.
        ema: EMAHook, whose average is taken with the update; None: there is none.
        beside: compiles in another process while the recipe below trains, and lets a graph take over only where that
            pays; None: compile here and now.
        adds_up: GradientCumulativeOptimizerHook, in whose windows gradients add up; None: each iteration is an update.
        scaler: Fp16OptimizerHook, whose loss scale is used; None: there is none.
    """

    def __init__(
        self,
        model: Any,
        step: Callable[..., Any],
        optimizer: Any,
        warn: Callable[[str], None],
        max_norm: float | None = None,
        ema: Any = None,
        beside: Beside | None = None,
        adds_up: Any = None,
        scaler: Any = None,
    ) -> None:
        self._beside = beside
        self._model, self._step, self._optimizer = model, step, optimizer
        self._warn, self._max_norm, self._ema = warn, max_norm, ema
        self.window = None if adds_up is None else Window(adds_up)
        self._scaler = scaler
        self._graphs: OrderedDict[Any, Compiled] = OrderedDict()
        self._ready: dict[Any, Compiled] = {}  # those that fit the binding, by batch
        self._binding: Binding | None = None
        self._last: Prepared | None = None  # the graph that ran
        self._doubtful = True
        self._batches = Batches()
        self._unsure: dict[Any, tuple[Any, Compiled, Traced]] = {}  # verified on one batch only, after a resume
        self._refused: dict[Any, str] = {}  # by batch; under None: whatever the batch
        self._look = False  # what the next iteration moves
        self.num_compiles = self.num_calls = 0

    def doubt(self) -> None:
        """Somebody's Python has run, or will: look at everything again before the next graph."""
        self._doubtful = True
        if self.window is not None:
            self.window.release()

    @property
    def compiling(self) -> bool:
        """Whether a graph is being compiled beside the training."""
        return self._beside is not None and self._beside.compiling

    def explain(self) -> list[str]:
        """How many graphs there are and how often they ran, and why there are no others."""
        lines = [f"{len(self._graphs)} graphs, {self.num_calls} iterations in one call each"]
        return lines + sorted({f"no graph: {why}" for why in self._refused.values()})

    def __call__(
        self, batch: Any, iteration: int, ends: bool = True, factor: float = 1.0
    ) -> tuple[dict[str, Any], Any] | None:
        """Run an iteration; (outputs, grad_norm), or None: ``around`` has to.

        Args:
            ends: the iteration ends in an update.
            factor: what the loss is divided by, where gradients add up.
        """
        if self._beside is not None and self._beside.idle:
            return None
        average = None if self._ema is None else self._ema.average_at(iteration)
        averages, call = average is not None, self._last
        tensors = None if call is None or self._doubtful else call.tensors(batch, averages, ends)
        if tensors is None:
            with unwatched():
                call = self._find(batch, averages, ends)
            if call is None:
                return None
            tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        assert call is not None
        binding, graph = self._binding, call.graph
        assert binding is not None
        if self.window is not None and not self.window.bind(binding):
            return None
        binding.fill(None if average is None else average.momentum, factor)
        values = graph.run([*call.static, *tensors])
        binding.done(ends)
        if self.window is not None:
            self.window.ran(iteration, ends)
        self.num_calls += 1
        return graph.build(values), values[-1] if graph.clips else None

    def _find(self, batch: Any, averages: bool, ends: bool) -> Prepared | None:
        """A graph for this batch that is there, or is made now; None: the recipe below has to."""
        if None in self._refused:
            return None
        shape = quick_key(batch)
        plain = shape is not None
        try:
            key = (shape if plain else batch_key(batch), averages, ends)
        except TypeError as error:
            self._refuse(None, str(error))
            return None
        if key[0] in self._refused or (self._beside is not None and self._waits(self._beside, key)):
            return None
        if self._doubtful and not self._settle():
            return None
        graph = self._ready.get(key)
        if graph is None:
            graph = self._prepare(key, batch)
            if graph is None:
                return None
        assert self._binding is not None
        last = self._last
        if last is None or last.graph is not graph or last.static is not self._binding.static:
            last = self._last = Prepared(graph, self._binding, batch, plain, averages, ends)
        return last

    # Why ``many`` never gives anything; None: it may.
    why_single: str | None = "the recipe calls its graphs from Python, one at a time"

    def many(self, iteration: int) -> Many | None:
        """What runs several iterations from this one on in one call; None: nothing does, now or with this recipe."""
        return None

    def around(self, below: Below, runner: Any) -> None:
        """Run the iteration on the recipe below; where a graph is thought of, look what it would not see."""
        if self._beside is not None and self._beside.idle:
            return below(runner)
        look, self._look = self._look, False
        self.doubt()  # what it left in .grad is let go before the next graph
        if not look:
            if self._beside is None:
                return below(runner)
            return self._beside.clock(below, runner)
        before = SilentState(self._model)
        below(runner)
        if moved := before.moved():
            self._refuse(None, moved[0])
        return None

    def _settle(self) -> bool:
        """Whether the binding holds, or could be made anew."""
        if self._binding is None or not self._binding.holds():
            self._ready.clear()
            try:
                self._binding = self._bind()
            except Unfit as error:
                self._binding = None
                if not error.passing:
                    self._refuse(None, str(error))
                return False
            for (around, batch), graph in self._graphs.items():
                if around == self._binding.key:
                    self._ready[batch] = graph
        if self.window is None:
            self._optimizer.zero_grad()
        self._doubtful = False
        return True

    def _bind(self) -> Binding:
        term = None if self._ema is None else self._ema._term
        return Binding(self._model, self._optimizer, term, adds_up=self.window is not None, scaler=self._scaler)

    def _trace(self, binding: Binding, batch: Any, key: Any) -> Traced:
        return trace_step(binding, batch, self._max_norm, self._step, averages=key[1], updates=key[2])

    def _prepare(self, key: Any, batch: Any) -> Compiled | None:
        """A graph for this batch, now if its time has come; None: not now."""
        shape = key[0]
        if self._beside is not None:
            if self._beside.knows(key):
                return self._take_over(self._beside, key, batch)
            if not self._beside.may_begin():
                return None
        if key in self._unsure:
            return self._confirm(key, batch)
        seen = self._batches.count(shape, batch)
        if why := self._batches.too_many():
            self._refuse(None, why)
            return None
        if seen == 1:
            self._look = True
            return None
        if not self._batches.recurs(shape):
            return None
        if self.num_compiles >= MAX_COMPILES:
            self._refuse(None, f"{MAX_COMPILES} graphs were made for other shapes")
            return None
        self.num_compiles += 1
        if self._beside is not None:
            self._begin(self._beside, key, batch)
            return None
        return self._try(key, batch)

    def _try(self, key: Any, batch: Any) -> Compiled | None:
        """Compile for a batch; None, and a reason, where that fails."""
        shape = key[0]
        sample = self._batches.sample(shape)
        try:
            return self._compile(key, [batch] if sample is None else [sample, batch])
        except Unfit as error:
            if error.passing:
                self._batches.again(shape)
                self._doubtful = True
            else:
                self._refuse(shape, str(error))
            return None

    def _confirm(self, key: Any, batch: Any) -> Compiled | None:
        """A graph that was made at the first iteration after a resume, verified on its second batch."""
        around, graph, traced = self._unsure.pop(key)
        assert self._binding is not None
        if around != self._binding.key:
            return self._try(key, batch)
        try:
            verify(self._binding, traced, graph.run, [batch], self._max_norm, self._step)
        except Unfit as error:
            self._refuse(key[0], str(error))
            return None
        self._keep(key, graph)
        return graph

    def _begin(self, beside: Beside, key: Any, batch: Any) -> None:
        """Start compiling in another process."""
        if lacks := missing():
            self._refuse(None, lacks)
            return
        try:
            binding = self._bind()
            traced = self._trace(binding, batch, key)
            leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
            self._binding = binding
            beside.begin(key, traced.graph, [*binding.static, *leaves])
        except Unfit as error:
            if not error.passing:
                self._refuse(key[0], str(error))
            self._batches.again(key[0], 1)
        except Exception as error:  # a full disk, a graph that cannot be handed over
            self._refuse(key[0], f"the compiling process could not start: {type(error).__name__}: {error}")

    def _waits(self, beside: Beside, key: Any) -> bool:
        """Whether a graph is still being compiled; a reason is noted where that failed."""
        why = beside.poll(key)
        if why:
            self._refuse(key[0], why)
        return why != ""

    def _take_over(self, beside: Beside, key: Any, batch: Any) -> Compiled | None:
        """The graph that was compiled elsewhere, if it is worth it on this batch."""
        if not beside.has_clocked:
            return None
        graph = self._try(key, batch)
        if graph is None:
            return None
        assert self._binding is not None
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        if not (measured := beside.pays(graph.run, [*(tensor.clone() for tensor in self._binding.static), *leaves])):
            return graph
        self._refused[key[0]] = f"it would not pay: {measured}"
        self._ready.pop(key, None)
        return None

    def close(self) -> None:
        """End what is being compiled."""
        if self._beside is not None:
            self._beside.close()

    def _compile(self, key: Any, batches: list[Any]) -> Compiled:
        """Trace, compile, verify.

        Raises:
            Unfit: one of these failed.
        """
        if lacks := missing():
            raise Unfit(lacks)
        self._binding = binding = self._bind()
        self._last = None
        self._ready.clear()
        for (around, other), graph in self._graphs.items():
            if around == binding.key:
                self._ready[other] = graph
        if unseen := self._batches.name(key[0]) in self._batches.resumed:
            self._check_resumed(binding, batches[-1])
        traced = self._trace(binding, batches[-1], key)
        if self.window is not None:
            self.window.expect(traced.has_grads)
        leaves = [leaf for leaf in pytree.tree_leaves(batches[-1]) if isinstance(leaf, Tensor)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of inductor, about itself
                run = self._compiled_run(key, traced, [*binding.static, *leaves], batches)
            verify(binding, traced, run, batches, self._max_norm, self._step)
        except Unfit:
            raise
        except Exception as error:  # whatever a compiler raises: training goes on without it
            text = str(error).strip().splitlines()
            raise Unfit(f"compiling raised {type(error).__name__}: {text[0][:300] if text else ''}") from error
        compiled = Compiled(run, traced.outputs.builder(), traced.clips, traced.updates, traced.outputs.logs_columns)
        self._batches.made(key[0])
        if unseen and len(batches) == 1:
            self._unsure[key] = binding.key, compiled, traced
        else:
            self._keep(key, compiled)
        return compiled

    def _compiled_run(self, key: Any, traced: Traced, args: list[Tensor], batches: list[Any]) -> Run:
        """The traced graph as a function of the flat list of inputs."""
        return compile_graph(traced.graph, args)[0]

    def _check_resumed(self, binding: Binding, batch: Any) -> None:
        """Look what a step moves, on copies: the iteration at hand has to be a graph's, as in the run before.

        Raises:
            Unfit: something that a graph does not see.
        """
        if moved := look(binding, batch, self._step):
            self._refuse(None, moved[0])
            raise Unfit(moved[0])

    def _keep(self, key: Any, graph: Compiled) -> None:
        assert self._binding is not None
        around = self._binding.key
        self._graphs[around, key] = self._ready[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            (other, batch), _ = self._graphs.popitem(last=False)
            if other == around:
                self._ready.pop(batch, None)

    def state_dict(self) -> dict[str, Any]:
        """Which kinds of batches have graphs, for a checkpoint: the run that goes on from it has to use them too."""
        return {} if None in self._refused or self._beside is not None else self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self._beside is None:
            self._batches.load_state_dict(state)

    def _refuse(self, key: Any, why: str) -> None:
        if why not in self._refused.values():
            self._warn(f"no graph of the step: {why}. It runs on the recipe below.")
        self._refused[key] = why
        self._last = None
