"""float32 masters of parameters of 16 bits, in ``optimizer.state[p]["master"]``.

The parameter is its master, rounded. Where it is not, somebody has changed it (loaded a checkpoint, say): then the
parameter is right, and the master follows it. So a master never brings back weights that are gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
KEY = "master"


def needs_master(param: Tensor) -> bool:
    return param.dtype in HALF


def master_of(param: Tensor, slot: dict[str, Any]) -> Tensor:
    """The parameter's master, made if there is none; of its shape and layout."""
    master = slot.get(KEY)
    if not isinstance(master, Tensor) or master.dtype != torch.float32 or master.shape != param.shape:
        master = slot[KEY] = param.detach().to(torch.float32)
    return master


def followed(param: Tensor, slot: dict[str, Any]) -> Tensor:
    """The master, after it has taken over what was changed in the parameter."""
    master = master_of(param, slot)
    param = param.detach()
    return master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(torch.float32)))
