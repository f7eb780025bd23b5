"""One optimizer's update in one pass, whoever's optimizer it is: ours, or exactly torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._core import StaleTable
from .algorithms import Adam, Algorithm, Sgd
from .ema_term import EmaTerm
from .names import ParamGroups, State
from .tables import ParamTable, Table


def _gpu_table(*args: Any, isa: str | None, **options: Any) -> Table:
    """Imports triton, which a run on the CPU never pays for."""
    try:
        from .gpu_table import GpuTable
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "updating parameters on a GPU takes triton: pip install 'fastrunner[triton]'"
        ) from error
    return GpuTable(*args, **options)


# Kind of device -> its table. The CPU's knows how to hand everything to torch, so it stands in where there is none.
TABLES: dict[str, Callable[..., Table]] = {"cpu": ParamTable, "cuda": _gpu_table}


def algorithm_of(optimizer: object) -> Algorithm | None:
    """What exactly this optimizer computes; None for one whose ``step`` may do anything else.

    Of torch's only the classes themselves: a subclass may override what it likes.
    """
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return Sgd()
    return Adam() if kind in (torch.optim.Adam, torch.optim.AdamW) else None


class Update:
    """Norm, clipping, update, average and zeroing over an optimizer's parameters in one pass.

    Keeps the table of addresses, and builds it anew when it no longer describes the optimizer.

    Args:
        algorithm: the optimizer's.
        masters: update 16-bit parameters through float32 masters; not for torch's own optimizers, which have none.
    """

    def __init__(self, algorithm: Algorithm, *, masters: bool = True) -> None:
        self._algorithm, self._masters = algorithm, masters
        self.isa: str | None = None  # forces an instruction set; for tests
        self.table: Table | None = None

    @property
    def rest(self) -> dict[tuple[int, int], str]:
        """(group, parameter) -> why torch updates it; as found in the last step, {} before the first."""
        return {} if self.table is None else dict(self.table.rest)

    def step(
        self,
        param_groups: ParamGroups,
        state: State,
        max_norm: float | None = None,
        write_back: bool = True,
        ema: EmaTerm | None = None,
        zero: bool = False,
        skip_nonfinite: bool = False,
    ) -> Any:
        """As ``ParamTable.step``, with ``ema`` the term to average with, or None.

        Returns:
            The norm before clipping: a number, or a 0-D tensor on a GPU.
        """
        request: dict[str, Any] = {
            "max_norm": max_norm,
            "write_back": write_back,
            "average": ema is not None,
            "zero": zero,
            "skip_nonfinite": skip_nonfinite,
        }
        table = self.table
        if table is not None and (ema is None or ema is table.ema):
            try:
                return table.step(param_groups, state, **request)
            except StaleTable:
                pass  # parameters, gradients or state are not what they were: look at them again
        self.table = None
        with torch.no_grad():
            self.table = self._make_table(param_groups, state, ema)
            if table is not None:
                self.table.take_over(table)
        return self.table.step(param_groups, state, **request)

    def _make_table(self, param_groups: ParamGroups, state: State, ema: EmaTerm | None) -> Table:
        device = next((p.device.type for group in param_groups for p in group["params"]), "cpu")
        make = TABLES.get(device, ParamTable)
        return make(self._algorithm, param_groups, state, ema=ema, masters=self._masters, isa=self.isa)
