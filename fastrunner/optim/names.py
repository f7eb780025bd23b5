"""Types that optimizers are made of, and what error messages call a parameter."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

ParamGroups = list[dict[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]


def name_of(param_groups: ParamGroups, group: int, index: int) -> str:
    """What error messages call a parameter."""
    names = param_groups[group].get("param_names")
    return f"parameter group {group}, parameter {index}" + (f" ({names[index]!r})" if names else "")
