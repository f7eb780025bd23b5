"""Python's garbage collector, kept from stopping the loop where it likes.

A full sweep looks through everything that torch and its friends keep for ever, about 0.1 s each time. After warm-up all
that is frozen: sweeps then see only what came later. Young garbage is collected at due points, where the loop stops
anyway. The collector stays switched on: code that makes cycles faster than that is still collected in time.
"""

from __future__ import annotations

import gc
import time

WARM_UP_S = 5.0  # until the caches of the first iterations are there


class Garbage:
    """Of one run; ``look`` at due points, ``restore`` at the end. Does nothing where the user has switched it off."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._warm = False
        self._frozen = False  # by us

    def look(self) -> None:
        """Collect if the next iterations would do it anyway; freeze once after warm-up. Cost: 0.2 us if neither."""
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
        if gc.get_freeze_count() == 0:  # else somebody has done it, and it is not ours to undo
            gc.collect()
            gc.freeze()
            self._frozen = True

    def restore(self) -> None:
        """Give back what was frozen."""
        if self._frozen:
            gc.unfreeze()
            self._frozen = False
