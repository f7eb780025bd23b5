"""Python's garbage collector, kept from stopping the loop where it likes.

A full sweep looks through everything that torch and its friends keep for ever, about 0.1 s each time. So what is there
when a run begins is frozen, which costs nothing: sweeps see only what came later. After warm-up, what the first
iterations have left is swept, and what stays of it is frozen too (0.2 ms, more where much was compiled). Young garbage
is collected at due points, where the loop stops anyway. The collector stays switched on: code that makes cycles faster
than that is still collected in time.

What is frozen is not collected until it is given back. When a process runs for the first time hardly any of it is
garbage. Later it may be the last run's model, if that hangs in a cycle: so further runs sweep everything before their
first iteration, or after warm-up if the last sweep was only just.
"""

from __future__ import annotations

import gc
import time

WARM_UP_S = 5.0  # until the caches of the first iterations are there
JUST_S = 10.0  # many short runs in a row do not sweep each time


class Garbage:
    """Of one run; ``look`` at due points, ``restore`` at the end. Does nothing where the user has switched it off.

    Attributes:
        last_sweep: of everything, in this process; None: there was no run yet.
    """

    last_sweep: float | None = None

    def __init__(self) -> None:
        self._begin = 0.0
        self._warm = True
        self._frozen = False  # by us
        self._swept = False  # nothing that is frozen is garbage

    def start(self) -> None:
        """The run begins. Cost: 0.4 ms, or 0.1 s where everything is swept."""
        self._begin, self._warm = time.perf_counter(), False
        if not _switched_on() or gc.get_freeze_count():  # somebody has done it, and it is not ours to undo
            return
        last, self._swept = Garbage.last_sweep, True
        if last is None:
            gc.collect(1)
            Garbage.last_sweep = self._begin - JUST_S
        elif self._begin - last >= JUST_S:
            self._sweep()
        else:
            self._swept = False
        gc.freeze()
        self._frozen = True

    def look(self) -> None:
        """Collect if the next iterations would do it anyway; freeze again after warm-up. Cost: 0.2 us if neither."""
        young, middle, _ = gc.get_count()
        often, seldom, _ = gc.get_threshold()
        if not gc.isenabled() or not often:
            return
        if not self._warm and time.perf_counter() - self._begin > WARM_UP_S:
            self._freeze()
        elif 2 * young > often:
            gc.collect(1 if middle > seldom else 0)

    def _freeze(self) -> None:
        self._warm = True
        if self._frozen:
            if self._swept:
                gc.collect()  # what is frozen is not looked at
            else:
                gc.unfreeze()
                self._sweep()
            gc.freeze()

    @staticmethod
    def _sweep() -> None:
        gc.collect()
        Garbage.last_sweep = time.perf_counter()

    def restore(self) -> None:
        """Give back what was frozen."""
        if self._frozen:
            gc.unfreeze()
            self._frozen = False


def _switched_on() -> bool:
    return gc.isenabled() and gc.get_threshold()[0] > 0
