"""Recipe ``aot``: the graph recipe's graph, compiled ahead of time to a library that the core drives without Python.

``graph`` trains while another process compiles. The library takes over at the boundary of an iteration: if its results
are the graph's to the bit, which was verified, or else after it was verified against eager itself. It is kept on disk
(``aot_cache.py``), and is there at once the next time. Where none can be made the graph stays; the reason is said once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._core import AotLibrary, AotStep
from . import aot_cache, auto
from .auto import Beside
from .background import Job, whole_order
from .graph import Compiled, GraphStep
from .guards import quick_key
from .many import Many
from .torch_private import Unfit, ahead_missing
from .trace import Traced
from .verify import Run, verify

LOOK_S = 0.2  # between two looks at a process that compiles
SHORT_S = 250e-6  # under ``auto``: what Python costs a graph, some 10 us, is worth a library in iterations that short


class AotRun:
    """A library as a function of the flat list of inputs, bound to the tensors that it was called with last.

    Args:
        path: of the library.
        num_static: how many inputs come before those of the batch.
        note: called after each run.
    Raises:
        RuntimeError: the library cannot be loaded, or takes other inputs.
    """

    def __init__(self, path: Path, num_static: int, num_inputs: int, note: Callable[[], None]) -> None:
        self.path, self.library, self._num_static, self._note = path, AotLibrary(str(path)), num_static, note
        if self.library.num_inputs != num_inputs:
            raise RuntimeError(f"the library takes {self.library.num_inputs} tensors, not {num_inputs}")
        self._first: Tensor | None = None
        self._step: AotStep | None = None

    def __call__(self, inputs: list[Tensor]) -> Sequence[Any]:
        bound, leaves = inputs[: self._num_static], inputs[self._num_static :]
        if self._step is None or self._first is not bound[0]:
            self._first, self._step = bound[0], AotStep(self.library, bound, [], bound[-1], leaves)
        values = self._step(leaves)
        if values is None:
            raise RuntimeError("the batch is not of the kind that the library was compiled for")
        self._note()
        return values


@dataclass(frozen=True)
class Bound:
    """A library bound to the run's own tensors, for batches that are flat."""

    graph: Compiled
    step: AotStep


@dataclass
class Order:
    """A library that is being compiled.

    Attributes:
        job: None: the run ended before it was ready; the next one begins again.
        name: its key in the cache.
        around: key of the binding that it is made for.
        batches: copies, to verify it on.
    """

    job: Job | None
    name: str
    around: Any
    traced: Traced
    batches: list[Any]


class AotGraphStep(GraphStep):
    """``GraphStep`` whose graphs become libraries while they run. Arguments as there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._orders: dict[Any, Order] = {}  # by kind of batch
        self._cached: dict[Any, AotRun] = {}  # from disk, being verified, by kind of batch
        self._not_ahead: dict[Any, str] = {}
        self._bound: tuple[list[Bound], list[Bound]] = ([], [])  # without and with an average
        self._bound_for: Any = None
        self._has_loaded = False
        self._next_look = 0.0
        self._later: dict[Any, tuple[str, Traced]] = {}  # under ``auto``: to be ordered, if the graph is taken
        self.num_ahead = 0

    @property
    def compiling(self) -> bool:
        """Whether a library is being compiled, or a graph."""
        return bool(self._orders) or super().compiling

    def explain(self) -> list[str]:
        if self._beside is not None and not (self.num_ahead or self._orders or self._not_ahead):
            return super().explain()
        lines = [f"{self.num_ahead} of the iterations ahead of time, without Python"]
        lines += [f"{len(self._orders)} libraries are being compiled"] if self._orders else []
        lines += sorted({f"not ahead of time: {why}" for why in self._not_ahead.values()})
        return [*super().explain(), *lines]

    def __call__(
        self, batch: Any, iteration: int, ends: bool = True, factor: float = 1.0
    ) -> tuple[dict[str, Any], Any] | None:
        """As ``GraphStep``: by a library without a look at the batch in Python, where one is bound and it fits."""
        if self._orders and time.monotonic() >= self._next_look:
            self._look_at_orders()
        binding, average = self._binding, None if self._ema is None else self._ema.average_at(iteration)
        if not self._doubtful and self._bound_for is binding and binding is not None:
            several = self._bound[average is not None]
            for at, bound in enumerate(several):
                binding.fill(None if average is None else average.momentum)
                values = bound.step(batch)
                if values is not None:
                    self._ran(1)
                    if at:
                        several.insert(0, several.pop(at))  # the next batch is likely to be like this one
                    return bound.graph.build(values), values[-1] if bound.graph.clips else None
        done = super().__call__(batch, iteration, ends, factor)
        if done is not None and self._has_loaded and self.window is None:
            self._bind_library(batch, average is not None)
        return done

    why_single = None

    def many(self, iteration: int) -> Many | None:
        """Bursts of the library that was bound first. While others are being compiled single calls look for them."""
        averages = self._ema is not None and iteration % self._ema.interval == 0
        binding, bounds = self._binding, self._bound[averages]
        if self._doubtful or self._orders or self.window is not None or binding is None or not bounds:
            return None
        graph, run = bounds[0].graph, bounds[0].graph.run
        if self._bound_for is not binding or not graph.logs_columns or not isinstance(run, AotRun):
            return None
        return Many(binding, bounds[0].step.burst, graph.build, run.library.num_outputs, graph.clips, self._ran)

    def _bind_library(self, batch: Any, averages: bool) -> None:
        """After a graph has run: bind the library that it is to the binding at hand, if it is one and is not bound."""
        if self._bound_for is not self._binding:
            self._bound, self._bound_for = ([], []), self._binding
        kind, binding = (quick_key(batch), averages), self._binding
        graph = next((graph for key, graph in self._ready.items() if key[:2] == kind), None)
        if graph is None or binding is None or not isinstance(graph.run, AotRun):
            return
        if not any(bound.graph is graph for bound in self._bound[averages]):
            step = AotStep(graph.run.library, binding.static, binding.written, binding.static[-1], batch)
            self._bound[averages].append(Bound(graph, step))

    def _ran(self, count: int) -> None:
        """Iterations were run that ``GraphStep`` does not know of."""
        assert self._binding is not None
        self._binding.steps += count
        self.num_calls += count
        self.num_ahead += count

    def _noted(self) -> None:
        self.num_ahead += 1

    def _compile(self, key: Any, batches: list[Any]) -> Compiled:
        num_ahead = self.num_ahead  # verifying does not count
        try:
            return super()._compile(key, batches)
        except Unfit as error:
            run = self._cached.pop(key, None)
            if run is None or error.passing:
                self._cancel(key)
                raise
            self._give_up(key, f"a library from the cache was wrong: {error}")
            compiled = super()._compile(key, batches)
            aot_cache.drop(run.path)  # not where the graph is found wrong, too: of NaN, say, nothing can be verified
            return compiled
        finally:
            self.num_ahead = num_ahead
            self._cached.pop(key, None)

    def _compiled_run(self, key: Any, traced: Traced, args: list[Tensor], batches: list[Any]) -> Run:
        """From disk, if it is there; else as a graph, while another process makes the library."""
        if why := ahead_missing():
            self._give_up(key, why)
        if key not in self._not_ahead:
            name = aot_cache.key_of(traced.graph, args)
            if path := aot_cache.find(name):
                try:
                    run = self._cached[key] = self._load(path, len(args))
                    return run
                except RuntimeError as error:
                    aot_cache.drop(path)
                    self._give_up(key, f"a library from the cache cannot be loaded: {error}")
            elif self._beside is None:
                self._order(key, name, traced, batches)
            else:
                self._later[key] = name, traced
        return super()._compiled_run(key, traced, args, batches)

    def _take_over(self, beside: Beside, key: Any, batch: Any) -> Compiled | None:
        """As in ``GraphStep``; a graph that is taken and short becomes a library."""
        graph = super()._take_over(beside, key, batch)
        later = self._later.pop(key, None)
        if graph is not None and later is not None and self._seconds(graph.run, batch) <= SHORT_S:
            self._order(key, *later, [batch])
        return graph

    def _seconds(self, run: Run, batch: Any) -> float:
        """Of an iteration, at best, on copies; random state stays."""
        assert self._binding is not None
        inputs = [tensor.clone() for tensor in self._binding.static]
        random, times = torch.get_rng_state(), []
        for _ in range(auto.MEASURED):
            begin = time.perf_counter()
            run([*inputs, *_leaves(batch)])
            times.append(time.perf_counter() - begin)
        torch.set_rng_state(random)
        return min(times)

    def _order(self, key: Any, name: str, traced: Traced, batches: list[Any]) -> None:
        """Let another process compile."""
        assert self._binding is not None
        self._cancel(key)
        copies = [pytree.tree_map(_copied, batch) for batch in batches]
        order = self._orders[key] = Order(None, name, self._binding.key, traced, copies)
        self._begin_order(key, order)

    def _begin_order(self, key: Any, order: Order) -> None:
        assert self._binding is not None
        try:
            args = [*self._binding.static, *_leaves(order.batches[-1])]
            order.job = Job(whole_order(order.traced.graph, args, order.name))
        except Exception as error:  # a full disk, a graph that cannot be handed over
            del self._orders[key]
            self._give_up(key, f"the compiling process could not start: {type(error).__name__}: {error}")

    def _look_at_orders(self) -> None:
        """Let libraries that are ready take over, if they are right."""
        self._next_look = time.monotonic() + LOOK_S
        for key, order in list(self._orders.items()):
            if self._doubtful or self._binding is None or self._binding.key != order.around:
                continue  # it is looked at when the graph runs again
            if order.job is None:
                self._begin_order(key, order)
                continue
            why = order.job.poll()
            if why is None:
                continue
            del self._orders[key]
            try:
                if why:
                    raise Unfit(why)
                self._replace(key, order)
            except (Unfit, RuntimeError) as error:
                self._give_up(key, str(error))

    def _replace(self, key: Any, order: Order) -> None:
        """Put a library into the place of its graph.

        Raises:
            Unfit: it computes something else, or has gone.
            RuntimeError: it cannot be loaded, or fails.
        """
        graph = self._graphs.get((order.around, key))
        if graph is None:  # the least used one, and gone
            return
        num_ahead = self.num_ahead
        binding, path = self._binding, aot_cache.find(order.name)
        assert binding is not None
        if path is None:
            raise Unfit("the compiled library is not in the cache any more, or is damaged")
        try:
            run = self._load(path, len(binding.static) + len(_leaves(order.batches[-1])))
            if not all(_same_bits(graph.run, run, binding.static, batch) for batch in order.batches):
                verify(binding, order.traced, run, order.batches, self._max_norm, self._step)
            ours, below = (self._seconds(each, order.batches[-1]) for each in (run, graph.run))
        except RuntimeError:
            aot_cache.drop(path)
            raise
        except Unfit:
            if all(bool(tensor.isfinite().all()) for tensor in binding.static):  # else it is the run that is wrong
                aot_cache.drop(path)
            raise
        finally:
            self.num_ahead = num_ahead
        if self._beside is not None and ours > (1 - auto.GAIN) * below:
            self._not_ahead[key] = f"it would not pay: {ours * 1e6:.0f} us as a library, {below * 1e6:.0f} as a graph"
            return
        self._last = None
        self._graphs[order.around, key] = self._ready[key] = replace(graph, run=run)

    def _load(self, path: Path, num_inputs: int) -> AotRun:
        assert self._binding is not None
        self._has_loaded = True
        return AotRun(path, len(self._binding.static), num_inputs, self._noted)

    def _give_up(self, key: Any, why: str) -> None:
        if why not in self._not_ahead.values():
            self._warn(f"the step is not compiled ahead of time: {why}. It runs as a graph.")
        self._not_ahead[key] = why

    def _cancel(self, key: Any) -> None:
        order = self._orders.pop(key, None)
        if order is not None and order.job is not None:
            order.job.close()

    def close(self) -> None:
        for order in self._orders.values():
            if order.job is not None:
                order.job.close()
                order.job = None
        super().close()


def _same_bits(graph: Run, library: Run, static: Sequence[Tensor], batch: Any) -> bool:
    """Whether a library gives, and leaves behind, the bits of the graph, which was verified. On copies."""
    random, found = torch.get_rng_state(), []
    try:
        for run in (graph, library):
            torch.set_rng_state(random)
            inputs = [tensor.clone() for tensor in static]
            values = run([*inputs, *_leaves(batch)])
            found.append([*inputs, *values, torch.get_rng_state()])
    finally:
        torch.set_rng_state(random)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _leaves(batch: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
