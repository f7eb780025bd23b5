"""Recipe ``auto``: what computes the iterations of a run is found out beside the training.

    look -> precision and layout, where they may be chosen -> whole iterations -> modules -> settled

Training goes on with the recipe below all the time; one other process at a time compiles. A candidate takes over at the
boundary of an iteration, after it was verified, and only if it saves more than ``GAIN`` of one, measured on a batch of
the run, on steps that training does not see. Whole iterations come first: where they pay, modules are not tried.

What was found is kept on disk (``decisions.py``); the next run of the same model starts with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from . import decisions
from .background import Job, whole_order
from .compiled_beside import CompiledBeside
from .config import StepConfig
from .decisions import Decision
from .eager import Stepping
from .guards import SilentState, batch_key
from .precision import Way, choose, lay_out, ways
from .torch_private import Unfit
from .trial import Snapshot, iteration, sample, timed

GAIN = 0.05  # what a candidate has to save of an iteration before it takes over
MEASURED = 5  # iterations of either kind that this is measured on
PATIENCE = 12  # iterations after which modules are compiled, if no whole iteration is by then


class Auto:
    """Decides, and has the ``train_step`` that iterations call meanwhile and afterwards.

    Args:
        model: the runner's; ``bare`` is it without wrapper.
        optimizer: one of torch's interface.
        updater: has the ``zero_grad`` and ``step`` that iterations call.
        config: what the user said; amp and channels_last may be "auto".
        warn: told, once each, what went wrong.

    Attributes:
        stepping: ``train_step`` without compiled modules, in the precision and layout that were chosen: for graphs.
        settled: nothing more is tried.
    """

    def __init__(
        self, model: Any, bare: nn.Module, optimizer: Any, updater: Any, config: StepConfig, warn: Callable[[str], None]
    ) -> None:
        self._model, self._bare, self._optimizer, self._updater = model, bare, optimizer, updater
        self._config, self._warn = config, warn
        self._ways = ways(config, bare)
        self.stepping = Stepping(model, self._ways[0].amp, self._ways[0].channels_last, None)
        self._run: Callable[..., Any] = self.stepping.train_step
        self.settled = self._whole_may_begin = False
        self._num, self._since = 0, 0  # train_steps so far, and when a whole iteration was last heard of
        self._whole = ""  # "compiling", "taken", "no"
        self._parts: CompiledBeside | None = None
        self._key: str | None = None
        self.known: Decision | None = None
        self._told: list[str] = []

    def train_step(self, data_batch: Any, optimizer: Any = None, **kwargs: Any) -> Any:
        if self.settled:
            return self._run(data_batch, optimizer, **kwargs)
        number, self._num = self._num, self._num + 1
        if number == 0:
            self._recall(data_batch)
        elif number == 1:
            before = SilentState(self._bare)
            outputs = self._run(data_batch, optimizer, **kwargs)
            if moved := before.moved():
                self._settle(None, f"nothing is tried, since running a step twice would show: {moved[0]}")
            return outputs
        elif number == 2:
            self._choose(data_batch)
        else:
            self._go_on()
        return self._run(data_batch, optimizer, **kwargs)

    def _recall(self, batch: Any) -> None:
        """What an earlier run decided for this model, batch and machine."""
        try:
            kind = batch_key(batch)
        except TypeError:  # a leaf of the batch that has no value to compare: nothing is kept for it
            return
        choices = (self._config, str(self._ways))
        self._key = decisions.key_of(self._bare, self._optimizer, kind, choices)
        known = None if self._key is None else decisions.load(self._key, self._warn)
        if known is None or Way(known.amp, known.channels_last) not in self._ways:
            return
        self.known = known
        self._told.append(f"decided by an earlier run: {known.recipe}")
        self._told += known.measured
        self._take(Way(known.amp, known.channels_last))
        if known.recipe == "compile":
            self._begin_parts()
        else:
            self.settled, self._whole_may_begin = True, known.recipe == "graph"
        self._num = PATIENCE

    def _choose(self, batch: Any) -> None:
        """Measure precisions and layouts, if there are several; then whole iterations may be compiled."""
        self._whole_may_begin, self._since = True, self._num
        if len(self._ways) == 1:
            return
        way, told = choose(self._ways, self._model, self._bare, self._optimizer, self._updater, batch, GAIN)
        self._told += told
        self._take(way)

    def _take(self, way: Way) -> None:
        if way.channels_last and not self._ways[0].channels_last:
            lay_out(self._bare, self._optimizer, way)
        self.stepping.amp, self.stepping.channels_last = way.amp, way.channels_last

    def _go_on(self) -> None:
        """Modules, when it is clear that no whole iteration is compiled; and the end."""
        if self._whole == "taken":
            self._settle("graph")
        elif self._parts is not None:
            if self._parts.refused:
                self._run = self.stepping.train_step
                self._settle(None if self._parts.is_faulty else "fused")
            elif self._parts.took_over:
                self._settle("compile")
        elif self._whole == "no" or (self._whole == "" and self._num - self._since > PATIENCE):
            self._begin_parts()

    def _begin_parts(self) -> None:
        self._whole_may_begin = False
        judge = None if self.known is not None else self._parts_pay
        try:
            self._parts = CompiledBeside(self._bare, self._model.train_step, (), self._warn, judge)
        except Unfit as error:
            self._settle("fused", f"no modules are compiled: {error}")
            return
        way = self.stepping
        self._run = Stepping(self._model, way.amp, way.channels_last, self._parts.train_step).train_step

    def _parts_pay(self, compiled: Callable[..., Any], batch: Any) -> bool:
        """Whether an iteration with compiled modules is worth it; called within the precision that was chosen."""
        with Snapshot(self._bare, self._optimizer) as before:
            steps = {"compile": compiled, "fused": self._model.train_step}
            seconds = timed(
                {
                    name: partial(sample, partial(iteration, call, self._optimizer, self._updater, batch), before)
                    for name, call in steps.items()
                },
                MEASURED,
            )
        ours, below = seconds["compile"], seconds["fused"]
        self._told.append(f"{ours * 1e6:.0f} us an iteration with compiled modules, {below * 1e6:.0f} without")
        return ours <= (1 - GAIN) * below

    def _settle(self, recipe: str | None, why: str = "") -> None:
        """Nothing is looked at any more; a recipe is what the next run starts with."""
        self.settled, self._whole_may_begin = True, recipe == "graph"
        if why:
            self._told.append(why)
        if recipe is not None and self._key is not None and self.known is None:
            chosen = Decision(recipe, self.stepping.amp, self.stepping.channels_last, tuple(self._told))
            decisions.save(self._key, chosen, self._warn)

    def may_begin(self) -> bool:
        """Whether the other process is free for a whole iteration, and its turn has come."""
        return self._whole_may_begin

    def whole(self, state: str, told: str = "") -> None:
        """A whole iteration is "compiling", "ready" (to be verified), "taken", "no" (it would not pay), "failed"."""
        self._since = self._num
        if told:
            self._told.append(told)
        self._whole = "" if state == "ready" else state
        if state == "failed":  # what failed once would fail for modules, too: one warning is enough
            self._settle(None)
        elif state == "taken":
            self._settle("graph")

    def explain(self) -> list[str]:
        """What was measured and decided, one line each."""
        lines = [f"auto: {each}" for each in self._told]
        if self.stepping.amp is not None or self.stepping.channels_last:
            lines.append(f"runs in {Way(self.stepping.amp, self.stepping.channels_last)}")
        return lines + ([] if self._parts is None else self._parts.explain())

    def close(self) -> None:
        """End what is being compiled."""
        if self._parts is not None:
            self._parts.close()


class Beside:
    """How a recipe of whole iterations joins ``auto``: what it has compiled elsewhere, by key, and whether it pays."""

    def __init__(self, auto: Auto) -> None:
        self._auto = auto
        self._jobs: dict[Any, Job | None] = {}  # None: it has ended
        self._below_s: list[float] = []  # how long the newest iterations on the recipe below took

    def may_begin(self) -> bool:
        """Whether it is this recipe's turn, and the other process is free."""
        return self._auto.may_begin() and all(job is None for job in self._jobs.values())

    @property
    def idle(self) -> bool:
        """Whether there is no graph and none to come: then an iteration has nothing to ask."""
        return not self._auto.may_begin() and not self.compiling

    def begin(self, key: Any, graph: GraphModule, args: Sequence[Tensor]) -> None:
        """Start compiling; raises what ``Job`` raises."""
        try:
            self._jobs[key] = Job(whole_order(graph, args))
        except Exception:
            self._auto.whole("failed")
            raise
        self._auto.whole("compiling")

    def knows(self, key: Any) -> bool:
        """Whether compiling was begun."""
        return key in self._jobs

    @property
    def compiling(self) -> bool:
        """Whether anything is being compiled, or has been and was not asked for since."""
        return any(job is not None for job in self._jobs.values())

    def poll(self, key: Any) -> str | None:
        """None while it is compiled; "" if nothing is (any more); or why that failed, once."""
        job = self._jobs.get(key)
        if job is None:
            return ""
        why = job.poll()
        if why is not None:
            self._jobs[key] = None
            self._auto.whole("failed" if why else "ready")
        return why

    def clock(self, below: Callable[[Any], None], runner: Any) -> None:
        """Run an iteration on the recipe below, and remember how long it took."""
        begin = time.perf_counter()
        below(runner)
        self._below_s = [*self._below_s[-7:], time.perf_counter() - begin]

    @property
    def has_clocked(self) -> bool:
        """Whether enough iterations were seen to compare with."""
        return len(self._below_s) >= MEASURED

    def pays(self, run: Callable[[list[Tensor]], Any], inputs: Sequence[Tensor]) -> str:
        """ "" if ``run`` saves more than ``GAIN`` of an iteration, or an earlier run found so; else how long both take.

        It writes into ``inputs``; random state stays.
        """
        if self._auto.known is not None:
            return ""
        state, times = torch.get_rng_state(), []
        for _ in range(MEASURED):
            begin = time.perf_counter()
            run([*inputs])
            times.append(time.perf_counter() - begin)
        torch.set_rng_state(state)
        ours, below = min(times), min(self._below_s)
        measured = f"{ours * 1e6:.0f} us an iteration as a graph, {below * 1e6:.0f} on the recipe below"
        pays = ours <= (1 - GAIN) * below
        self._auto.whole("taken" if pays else "no", measured)
        return "" if pays else measured

    def close(self) -> None:
        """End what is being compiled."""
        for job in self._jobs.values():
            if job is not None:
                job.close()
        self._jobs = {key: job for key, job in self._jobs.items() if job is None}
