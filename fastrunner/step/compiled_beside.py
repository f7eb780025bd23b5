"""Compiled modules that another process compiles while training goes on without them; part of recipe ``auto``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .background import Job, halves_order
from .compiled import CompiledModules, in_words
from .torch_private import Unfit

Judge = Callable[[Callable[..., Any], Any], bool]  # (train_step with compiled modules, batch) -> whether it pays


class CompiledBeside(CompiledModules):
    """As ``CompiledModules``, but training never waits for the compiler.

    Args:
        judge: asked once, when the first code is there and verified; None: it pays.

    Attributes:
        took_over: compiled code has run in training.
        is_faulty: it was given up for something that another run need not see: a process that died, a full disk.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[..., Any],
        names: tuple[str, ...],
        warn: Callable[[str], None],
        judge: Judge | None,
    ) -> None:
        super().__init__(model, call, names, warn)
        self._judge = judge
        self._job: Job | None = None
        self.took_over = self.is_faulty = False

    def _compile(self, batch: Any, optimizer: Any, kwargs: dict[str, Any]) -> bool:
        try:
            if self._job is None:
                self._lower()
                self._job = Job(halves_order([half for piece in self._new() for half in piece.halves]))
            why = self._job.poll()
            if why is None:
                return False
            self._job = None
            if why:
                self.is_faulty = True
                self._give_up(why)
                return False
            self._load()
            self._verify(batch, optimizer, kwargs)
        except Unfit as error:
            self._give_up(str(error))
            return False
        except Exception as error:  # a full disk, a graph that cannot be handed over, whatever a compiler raises
            self.is_faulty = True
            self._give_up(in_words(error))
            return False
        judge = None if self.took_over else self._judge
        if judge is not None and not judge(partial(self._with_modules, **kwargs), batch):
            self._give_up("it would not pay", quiet=True)
            return False
        self.took_over = True
        return True

    def close(self) -> None:
        """End what is being compiled."""
        if self._job is not None:
            self._job.close()
            self._job = None
