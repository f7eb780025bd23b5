"""What ``train_step`` returned, as a flat list of tensors and back: graphs give tensors, hooks want the dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .torch_private import Unfit

_OURS = ("data_time", "time", "grad_norm")


class Outputs:
    """The structure of an outputs dict, learnt while tracing.

    Args:
        outputs: with the loss, and log_vars whose values are tensors, symbols that a host read left behind, or plain.
    Raises:
        Unfit: no loss, or something that is neither a tensor nor plain.

    Attributes:
        flat: what the graph returns: the loss, then all tensors and symbols.
        logs_columns: each of log_vars is one number without dimensions, under a key that the plan does not log itself.
        log_names: keys of log_vars.
    """

    def __init__(self, outputs: Any) -> None:
        if not isinstance(outputs, dict) or not isinstance(outputs.get("loss"), Tensor):
            raise Unfit("train_step did not return a dict with a tensor as its loss")
        log_vars = outputs.get("log_vars", {})
        if not isinstance(log_vars, dict) or "num_samples" not in outputs:
            raise Unfit("train_step did not return log_vars (a dict) and num_samples")
        self.num_samples = outputs["num_samples"]
        if not isinstance(self.num_samples, int):
            raise Unfit(f"num_samples is a {type(self.num_samples).__name__}, not an int")
        self.log_names = tuple(log_vars)
        leaves, self._spec = pytree.tree_flatten({**outputs, "log_vars": dict(log_vars)})
        self._places = [at for at, leaf in enumerate(leaves) if _is_variable(leaf)]
        for leaf in leaves:
            if not _is_variable(leaf) and not isinstance(leaf, (int, float, str, bytes, type(None))):
                raise Unfit(f"train_step returned a {type(leaf).__name__}")
        self.logs_columns = (
            bool(log_vars) and set(log_vars).isdisjoint(_OURS) and all(map(_is_number, log_vars.values()))
        )
        self.loss: Tensor = outputs["loss"]
        self.flat = [outputs["loss"].detach(), *(leaves[at] for at in self._places)]
        self._constants = [None if _is_variable(leaf) else leaf for leaf in leaves]
        # The plain case: nothing but a loss, log_vars of variables in the order of the leaves, and num_samples.
        self._plain = set(outputs) == {"loss", "log_vars", "num_samples"} and all(map(_is_variable, log_vars.values()))
        self._order = tuple(outputs)

    def builder(self) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """A function that makes the dict of what the graph returned (``flat``'s values, in its order)."""
        names, num, end = self.log_names, self.num_samples, 2 + len(self.log_names)
        if self._plain and self._order[:2] == ("loss", "log_vars"):
            if len(names) == 1:
                (name,) = names
                return lambda values: {"loss": values[0], "log_vars": {name: values[2]}, "num_samples": num}

            def plain(values: Sequence[Any]) -> dict[str, Any]:
                return {"loss": values[0], "log_vars": dict(zip(names, values[2:end], strict=True)), "num_samples": num}

            return plain
        constants, places, spec = self._constants, self._places, self._spec

        def general(values: Sequence[Any]) -> dict[str, Any]:
            leaves = list(constants)
            for at, value in zip(places, values[1:], strict=False):
                leaves[at] = value
            result: dict[str, Any] = pytree.tree_unflatten(leaves, spec)
            return result

        return general


def _is_number(value: Any) -> bool:
    return value.dim() == 0 if isinstance(value, Tensor) else not isinstance(value, (str, bytes, type(None)))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, torch.SymFloat, torch.SymInt))
