"""The plan of a run: made from the hooks after ``before_run``, followed by the loop, made again when it is stale.

Between due points an iteration is one function without branches on hooks (``quiet``); at a due point ``at`` makes one
with the calls that are due at their places.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..hooks.hook import NEVER, Hook
from ..hooks.optimizer import OptimizerHook
from ..hooks.timer import IterTimerHook
from .burst import Bursts
from .dispatch import HookPlan, is_logger, is_ours
from .due import DuePoints
from .iteration import Places, Terms, make_iteration, make_plain_iteration
from .lower import Lowering, asked_plain, is_replaced, refuse_prefetch, why_plain
from .quiet import make_quiet, then_call
from .whole import make_whole

if TYPE_CHECKING:
    from ..runner.base import BaseRunner
    from .dispatch import Call, Calls

# Iterations between two looks at garbage, at the size of the log's histories, and at what a hook's due says now.
HOUSEKEEPING = 256


class RunPlan(HookPlan):
    """Stage tables, due points, and the iteration with what could be lowered into it.

    Args:
        runner: with its hooks, model and optimizer as they are now.
        previous: the plan before, whose due points stay.

    Attributes:
        plain: why every hook is called as in MMCV; None where hooks may be lowered.
        lowering: what was lowered and what not; None where ``plain`` says why nothing was.
        bursts: runs several iterations in one call; None: the recipe has none, or hooks do not allow it.
        graph: does the step of whole iterations; None: the recipe has none, or hooks do not allow it.
        next_due: the first iteration that needs ``at``.
        next_write: the first iteration at which an lr or momentum policy may change its value.
        quiet: the iteration before ``next_due``.
        stale: hooks, model or optimizer are others by now.
        no_prefetch: why no batches of the next epoch may be made before this one ends; None where they may.
    """

    def __init__(self, runner: BaseRunner, previous: RunPlan | None = None) -> None:
        self.plain = why_plain(runner)
        through = asked_plain() or is_replaced(runner, "call_hook")
        super().__init__(runner.hooks, runner.call_hook if through else None)
        self.lowering = Lowering(runner, self.hooks) if self.plain is None else None
        self.terms = Terms() if self.lowering is None else self.lowering.terms
        self._due: DuePoints = DuePoints(
            () if through else self.hooks, self.terms.hooks, self.plain is None, previous._due if previous else None
        )
        self.alone = self._due.alone and not through
        self._through = through
        self.no_prefetch = self.plain or refuse_prefetch(self.hooks)
        self.next_due = self.next_write = 0
        self._rewrite = True  # somebody may have written to the lr
        self._users_acted = False  # in the iteration before: they may have written to the lr
        self._basis = self._fold_basis(runner)
        self._made: dict[tuple[int, ...], Call] = {}
        why = self.plain or self.terms.refuse_graph(runner)
        self.graph = runner.step.graph(*self.terms.for_graph(runner)) if why is None else None
        noisy = next((hook for hook in self._due.always if not is_ours(hook)), None)
        if noisy is not None and why is None:
            why = f"{type(noisy).__name__} is called at every iteration, and may look for gradients"
        runner.step.note_hooks(why)
        self._doubt()
        self._writing = self._silent = self.quiet = self._iteration(runner, ())
        self.bursts = None
        if self.graph is not None and not self.why_single(runner):
            self.bursts = Bursts(self, self.terms, self.graph)
        if self.graph is None and self.terms.is_whole(runner) and not self._due.always:
            self._silent = make_quiet(self, runner, self.terms, writes=False)

    def at(self, runner: BaseRunner) -> Call:
        """The iteration at hand, at a due point or where it is not known yet that it is none.

        Raises:
            TypeError: a hook's ``due`` did not return an int.
        """
        if runner.host_reads.left:
            iteration = self._at(runner)
            self.next_due = 0
            return partial(runner.host_reads.watch, iteration)
        return self._at(runner)

    def _at(self, runner: BaseRunner) -> Call:
        if self._users_acted:
            if self._basis != self._fold_basis(runner):
                return runner.renew_plan().at(runner)
            self.next_write, self._rewrite, self._users_acted = 0, True, False
        called, at = self._due.called(runner)
        now, end = runner._iter, NEVER if runner._max_iters is None else runner._max_iters
        self.next_due = min(at, now + HOUSEKEEPING, end)
        self.quiet = self._writing
        if self.next_write > now:  # it is known when the lr changes next: until then nothing asks
            self.quiet, self.next_due = self._silent, min(self.next_due, self.next_write)
        runner.log_buffer.bound()
        runner.garbage.look()
        if not called:
            return self.quiet
        if not all(map(is_logger, called)):
            self._doubt()
        if not all(map(is_ours, called)):
            self._users_acted = True
            runner.log_writer.flush()  # what they print comes after what was logged
        key = tuple(map(id, called))
        if key not in self._made:
            self._made[key] = self._iteration(runner, called)
        return self._made[key]

    def why_single(self, runner: BaseRunner) -> str:
        """Why iterations run one at a time whatever lies between due points; empty: several may in one call."""
        if self.graph is None:
            return "the step is called from Python, iteration by iteration"
        if self.graph.why_single is not None:
            return self.graph.why_single
        if runner.max_epochs is not None:
            return "the epoch runner takes its batches one at a time"
        if type(self.terms.optimizer_hook) is not OptimizerHook:
            return "gradients add up, or the loss is scaled"
        whole = self._may_be_whole(runner, (), *self._places(()))
        return "" if whole else "somebody is called in every iteration"

    @property
    def rewrites(self) -> bool:
        """Whether users' code may have written to the lr, so that the next iteration writes it whatever is due."""
        return self._rewrite or self._users_acted

    def _fold_basis(self, runner: BaseRunner) -> object:
        hook = self.terms.optimizer_hook
        return None if hook is None else hook.fold_basis(runner.step.updater)

    def fire(self, calls: Calls, runner: BaseRunner) -> None:
        """Run the calls of one stage, after what was logged before has been written."""
        if calls:
            runner.log_writer.flush()
            self._doubt()
            super().fire(calls, runner)

    def _doubt(self) -> None:
        """Somebody's Python runs: what a graph relies on may change."""
        if self.graph is not None:
            self.graph.doubt()

    def only_ours(self, calls: Calls) -> bool:
        """Whether no user's hook is among the calls."""
        return all((hook := getattr(call, "__self__", None)) is not None and is_ours(hook) for call in calls)

    def called_hooks(self) -> tuple[list[tuple[Hook, int | None]], list[Hook]]:
        """The hooks that are called in some train iterations, with the next one, and those called in all."""
        return self._due.points(), self._due.always

    def somebody_acted(self) -> None:
        """A user's hook was called: what it may concern is looked at again in the next iteration."""
        self._due.somebody_acted()
        self.next_due = self.next_write = 0
        self._rewrite = True

    def mark_stale(self) -> None:
        """Hooks, model or optimizer have changed: the loop makes another plan before the next iteration."""
        self.stale = True
        self.next_due = 0

    def write_policies(self, runner: BaseRunner) -> None:
        """Call the lr and momentum policies whose value changes in this iteration, and note when the next one does."""
        now, self.next_write = runner._iter, NEVER
        rewrite, self._rewrite = self._rewrite, False
        for hook in self.terms.policies:
            at = now if rewrite else hook.due(runner)
            if at <= now:
                call = self.call_of(hook, "before_train_iter")
                if call is not None:
                    super().fire((call,), runner)  # writes lr or momentum, which a step reads each time
                at = now + 1
            self.next_write = min(self.next_write, at)
        if self.next_write > now + 1:
            self.next_due = 0  # nothing to write for a while: from the next iteration on nothing asks

    def finish(self, runner: BaseRunner, timer: IterTimerHook | None = None, late: Calls = ()) -> None:
        """The rest of an iteration whose hooks changed before train_step, with those that are there now.

        Args:
            timer, late: what is left of the stage before.
        """
        if timer is not None:
            timer.before_iter(runner)
        self.fire(late, runner)
        plan = runner.current_plan()
        called, _ = plan._due.called(runner)
        plan._iteration(runner, called, started=True)(runner)

    def finish_step(self, runner: BaseRunner) -> None:
        """The stage after an iteration whose train_step changed hooks, model or optimizer: with those there are now."""
        plan = runner.current_plan()
        called, _ = plan._due.called(runner)
        ids = {id(hook) for hook in (*called, *plan._due.always, *plan.terms.hooks)}
        runner._uncounted = "iter"
        plan.fire(plan.after_train_iter if plan._through else plan._calls_of(ids, "after_train_iter"), runner)
        runner._uncounted = ""

    def _iteration(self, runner: BaseRunner, called: Sequence[Hook], started: bool = False) -> Call:
        """The iteration that calls these hooks, and those that are always called."""
        ids = {id(hook) for hook in (*called, *self._due.always)}
        if self.plain is None:
            terms, places = self._places(ids)
            if not started and terms.is_whole(runner) and not any(places[:4]):
                below = make_quiet(self, runner, terms, writes=True)
                below = then_call(self, below, places.last) if places.last else below
            else:
                below = make_iteration(self, runner, terms, places, started=started)
            if self.graph is None or started or not self._may_be_whole(runner, called, terms, places):
                return below
            return make_whole(self, terms, self.graph, below, places.after, places.last)
        if self._through:
            before, after = self.before_train_iter, self.after_train_iter
        else:
            before, after = self._calls_of(ids, "before_train_iter"), self._calls_of(ids, "after_train_iter")
        return make_plain_iteration(self, () if started else before, after)

    def _may_be_whole(self, runner: BaseRunner, called: Sequence[Hook], terms: Terms, places: Places) -> bool:
        """Rules 2 and 3: nobody acts between forward and update, and none but our own hooks may look for gradients."""
        if places.before or places.late or places.between or terms.ema is not self.terms.ema:
            return False
        return not self._due.always and all(map(is_ours, called))

    def _calls_of(self, ids: Collection[int], stage: str) -> Calls:
        calls = (self.call_of(hook, stage) for hook in self.hooks if id(hook) in ids)
        return tuple(call for call in calls if call is not None)

    def _places(self, called: Collection[int]) -> tuple[Terms, Places]:
        """What is lowered in an iteration, and where the called hooks (by id) stand in it."""
        terms = self.terms
        calls: dict[str, list[Call]] = {name: [] for name in Places._fields}
        place = "before"
        for hook in self.hooks:
            if hook is terms.timer:
                place = "late"
            elif id(hook) in called and (call := self.call_of(hook, "before_train_iter")):
                calls[place].append(call)
        place = "after" if terms.optimizer_hook is None else "between"
        for hook in self.hooks:
            call = self.call_of(hook, "after_train_iter")
            if call is None:
                continue
            if hook is terms.optimizer_hook:
                place = "after"
            elif hook is terms.timer:
                place = "last"
            elif hook is terms.ema:
                if calls["after"]:  # a hook that is due here comes before the average, and sees the one before it
                    terms = replace(terms, ema=None)
                    calls["after"].append(call)
            elif id(hook) in called:
                calls[place].append(call)
            else:
                continue
            if place != "between":
                calls["plain_rest"].append(call)
        return terms, Places(**{name: tuple(each) for name, each in calls.items()})
