"""Running averages of what is logged, with nothing read from the device before a log is due.

    average(n)[key] = sum(value_i * count_i) / sum(count_i)         over the last n entries of each key

``update`` only keeps references, one row a call. When someone looks (``average``, ``val_history``) the rows become one
history a key; the averages of tensors on another device are taken there, and travel to the host together.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

from torch import Tensor

from .history import History, check_dict, check_single, last_means

STRETCH = 1024  # rows between two looks at the size of the histories

# (count, vars), or of a whole iteration (count, log_vars, data_time, time) and, where it clips, grad_norm
Row = tuple[Any, ...]
_OURS = frozenset(("data_time", "time", "grad_norm"))  # keys that a row of a whole iteration adds to log_vars
_DICTS = {dict, OrderedDict}  # kinds that are read without asking their methods
Names = tuple[str, ...]
Column = tuple[str, Sequence[Any], Sequence[int]]  # key, values, counts


class LogBuffer:
    """MMCV's log buffer: ``val_history``, ``n_history`` (key -> list), ``output`` (what to log next) and ``ready``.

    Attributes:
        window: keep at least this many entries of each key and drop older ones; None keeps everything until
            ``clear()``. The runner sets it where histories would otherwise grow for the whole run.
    """

    def __init__(self) -> None:
        self.window: int | None = None
        self.output: OrderedDict[str, Any] = OrderedDict()
        self.ready = False
        self._rows: list[Row] = []
        self.append = self._rows.append  # a row whose values can be kept as they are
        self._settled = 0  # rows since the histories were last shortened
        self.plain_len = -1  # log_vars of this length were found to be plain; -1: look at them each time
        self._histories: dict[str, History] = {}
        self._plain: dict[Names, bool] = {}  # names -> whether their values can be kept as they are
        self._copied: set[str] = set()  # keys whose tensors change in place after they were logged

    @property
    def val_history(self) -> OrderedDict[str, list[float]]:
        """key -> values, oldest first. Reads the device."""
        self._settle()
        return OrderedDict((key, list(history.floats())) for key, history in self._histories.items())

    @property
    def n_history(self) -> OrderedDict[str, list[int]]:
        """key -> counts, parallel to ``val_history``."""
        self._settle()
        return OrderedDict((key, list(history.counts)) for key, history in self._histories.items())

    def update(self, vars: dict[str, Any], count: int = 1) -> None:
        """Remember one value a key, each with weight ``count``. Values: numbers, or tensors of one element.

        Tensors are kept as they are (detached, not copied, not read). A tensor that the model goes on writing to is
        copied, from the moment that this shows. Cost: a third of a microsecond, and 0.02 a key.

        Raises:
            TypeError: not a dict.
            ValueError: a tensor of several elements.
        """
        if type(vars) is not dict:
            check_dict(vars)
        self._rows.append((count, vars.copy() if self._plain.get(tuple(vars)) else self.kept(vars)))
        if len(self._rows) > STRETCH:
            self.bound()

    def append_many(
        self, count: int, log_vars: dict[str, Any], waited: float, took: float, norms: list[float] | None
    ) -> None:
        """Whole iterations that ran in one call, as if each had appended its row.

        Args:
            count: weight of each iteration's values.
            log_vars: key -> a float for each iteration.
            waited, took: data_time and time of each, in seconds.
            norms: grad_norm of each; None: nothing was clipped.
        """
        if not log_vars or not _OURS.isdisjoint(log_vars):
            raise ValueError(f"these keys cannot be columns: {sorted(log_vars)}")
        self._settle()
        length = len(next(iter(log_vars.values())))
        counts, ones = [count] * length, [1] * length
        columns = [("data_time", [waited] * length, ones), *((name, each, counts) for name, each in log_vars.items())]
        if norms is not None:
            columns.append(("grad_norm", norms, counts))
        for name, values, weights in [*columns, ("time", [took] * length, ones)]:
            self._history(name).extend(values, weights)
        self._settled += length

    def average(self, n: int = 0) -> None:
        """Put the mean of each key's last ``n`` entries (0: all) into ``output``, as numpy float64, and set ``ready``.

        Raises:
            ValueError: ``n`` is negative, or a value is a tensor of several elements.
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        self._settle()
        self.output.update(zip(self._histories, last_means(list(self._histories.values()), n), strict=True))
        self.ready = True

    def clear_output(self) -> None:
        """Forget what was averaged, keep the histories."""
        self.output.clear()
        self.ready = False

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._histories.clear()
        self.clear_output()

    def bound(self) -> None:
        """Where many rows wait or have gone: move them to the histories, and drop what is older than the window."""
        if len(self._rows) > STRETCH:
            self._settle()
        if self._settled > STRETCH and self.window is not None:
            self._settled = 0
            for history in self._histories.values():
                history.keep_last(self.window, slack=STRETCH)

    def kept(self, vars: dict[str, Any]) -> dict[str, Any]:
        """A copy of ``vars``: tensors detached, and copied where the model goes on writing to them."""
        names = tuple(vars)
        known, plain = names in self._plain, True
        kept = dict(vars)
        for name, value in vars.items():
            if isinstance(value, Tensor):
                check_single(name, value)
                if not known and _written_to(value):
                    self._copied.add(name)
                if value.requires_grad:  # or the graphs of a whole log interval would stay alive
                    kept[name], plain = value.detach(), False
                if name in self._copied:
                    kept[name], plain = kept[name].clone(), False
        if not known:
            self._plain[names] = plain
        return kept

    def look_at(self, log_vars: dict[str, Any]) -> dict[str, Any]:
        """``kept``, for the row of a whole iteration; ``plain_len`` then says whether the next one needs it."""
        check_dict(log_vars)
        kept = self.kept(log_vars)
        self.plain_len = len(log_vars) if self._plain[tuple(log_vars)] else -1
        return kept

    def _settle(self) -> None:
        """Move the values of all rows to the histories of their keys."""
        if not self._rows:
            return
        rows = self._rows[:]
        self._settled += len(rows)
        self._rows.clear()  # the list itself stays: ``append`` is bound to it
        columns = _same_keys(rows)
        for name, values, counts in _merged(rows) if columns is None else columns:
            self._history(name).extend(values, counts)
            if type(values[0]) is not float and name not in self._copied and name != "grad_norm":
                self._check_kept(name, values)

    def _history(self, name: str) -> History:
        history = self._histories.get(name)
        if history is None:
            history = self._histories[name] = History(name)
        return history

    def _check_kept(self, name: str, values: Sequence[Any]) -> None:
        """Keep a key's next values differently, where these should not have been kept as they were."""
        tensors = values if type(values[0]) is Tensor else [value for value in values if isinstance(value, Tensor)]
        try:
            changed, with_graph = _written_to(*tensors), True in [value.requires_grad for value in tensors]
        except AttributeError:  # numbers among tensors
            self._check_kept(name, [value for value in values if isinstance(value, Tensor)])
            return
        if changed:
            self._copied.add(name)
            warnings.warn(
                f"log_vars[{name!r}] was changed in place after it was logged: its last {len(values)} values may be "
                "later ones than they should be. From now on it is copied.",
                stacklevel=2,
            )
        if changed or with_graph:
            self._plain = {names: plain and name not in names for names, plain in self._plain.items()}
            self.plain_len = -1


def _same_keys(rows: Sequence[Row]) -> list[Column] | None:
    """The columns of rows of one layout, in the order MMCV's hooks log them; None where the keys differ."""
    first = rows[0][1]
    check_dict(first)  # where the plan appended it, nobody has looked yet
    if len(rows) > 1 and len(rows[0]) > 2 and not _OURS.isdisjoint(first):
        return None  # a key that both log: one after the other
    try:
        counts, vars, *own = zip(*rows, strict=True)
        if not set(map(type, vars)) <= _DICTS or set(map(len, vars)) != {len(first)}:
            return None
        if len(first) == 1:
            (name,) = first
            columns: list[Column] = [(name, list(map(itemgetter(name), vars)), counts)]
        else:
            values = zip(*map(itemgetter(*first), vars), strict=True) if first else ()
            columns = [(name, each, counts) for name, each in zip(first, values, strict=True)]
    except (KeyError, ValueError):  # other keys; rows of other lengths
        return None
    if not own:
        return columns
    ones = (1,) * len(rows)
    norms = [("grad_norm", own[2], counts)] if len(own) == 3 else []
    return [("data_time", own[0], ones), *columns, *norms, ("time", own[1], ones)]


def _merged(rows: list[Row]) -> list[Column]:
    """The columns of rows whose keys come and go, each key's values together."""
    rows = list(map(_plain, rows))
    layouts = list(zip(map(len, rows), map(tuple, map(itemgetter(1), rows)), strict=True))
    cuts = [i for i, (one, other) in enumerate(pairwise(layouts), 1) if one != other]
    waiting: dict[str, tuple[list[Any], list[int]]] = {}
    for begin, end in pairwise([0, *cuts, len(rows)]):
        columns = _same_keys(rows[begin:end]) or [each for row in rows[begin:end] for each in _same_keys([row]) or ()]
        for name, values, counts in columns:
            both = waiting.setdefault(name, ([], []))
            both[0].extend(values)
            both[1].extend(counts)
    return [(name, *both) for name, both in waiting.items()]


def _plain(row: Row) -> Row:
    """The row with a dict whose methods are Python's own."""
    check_dict(row[1])
    return row if type(row[1]) in _DICTS else (row[0], dict(row[1]), *row[2:])


def _written_to(*values: Tensor) -> bool:
    """Whether an operation has changed a tensor, or one that it shares memory with, in place."""
    try:
        return sum([value._version for value in values]) > 0
    except RuntimeError:  # made in inference mode: such tensors do not count
        return False
