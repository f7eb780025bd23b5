"""Recipe ``fused``: clip, update and average of exactly torch's SGD, Adam and AdamW in the core's one pass.

The optimizer stays torch's: its param_groups are read, its state is written under torch's names, and a scheduler, a
checkpoint or a user finds what torch would have left there. Unclipped SGD has torch's bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..optim.ema_term import EmaTerm
from ..optim.update import Update, algorithm_of


class FusedPass:
    """Stands for a torch optimizer where an iteration zeroes gradients and takes its step.

    Args:
        optimizer: one that ``refuse`` has nothing against.
    Attributes:
        grad_norm: of the last step that clipped, before clipping: float32, 0-D.
    """

    grad_norm: Tensor | None = None

    def __init__(self, optimizer: Any) -> None:
        algorithm = algorithm_of(optimizer)
        assert algorithm is not None
        self.optimizer = optimizer
        self._update = Update(algorithm, masters=False)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @property
    def _optimizer_step_pre_hooks(self) -> Any:
        return self.optimizer._optimizer_step_pre_hooks

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, *, max_norm: float | None = None, write_back: bool = True, ema: EmaTerm | None = None) -> None:
        """As ``FusedSGD.step``; by torch where somebody has come to watch the optimizer's own step since."""
        optimizer = self.optimizer
        if watched(optimizer):
            if max_norm is not None:
                self.grad_norm = clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)
            optimizer.step()
            if ema is not None:
                ema.update()
            return
        norm = self._update.step(
            optimizer.param_groups, optimizer.state, ema=ema, max_norm=max_norm, write_back=write_back
        )
        if max_norm is not None:
            self.grad_norm = norm if isinstance(norm, Tensor) else torch.scalar_tensor(norm, dtype=torch.float32)

    def clipped_step(self, max_norm: float, *, write_back: bool = True) -> Tensor | None:
        """``clip_grad_norm_`` and ``step`` in one pass; the norm before."""
        self.step(max_norm=max_norm, write_back=write_back)
        return self.grad_norm


def watched(optimizer: Any) -> bool:
    """Whether the optimizer's own ``step`` has to be called: it has hooks, or somebody replaced it."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or "step" in optimizer.__dict__
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def refuse(optimizer: Any) -> str | None:
    """Why torch's own step has to run; None if the core's pass can stand in for it."""
    if algorithm_of(optimizer) is None:
        return f"{type(optimizer).__name__} is not exactly torch.optim.SGD, Adam or AdamW"
    if watched(optimizer):
        return "its step has hooks, or was replaced"
    for name in ("foreach", "capturable", "differentiable"):
        if any(group.get(name) for group in optimizer.param_groups):
            return f"it was made with {name}=True"
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        if (param.device.type, param.dtype) != ("cpu", torch.float32):  # elsewhere the norm would be less exact
            return f"a parameter is {param.dtype} on {param.device}"
    return None


def updater(optimizer: Any) -> Any:
    """The optimizer itself, or what stands for it in an iteration."""
    return optimizer if refuse(optimizer) else FusedPass(optimizer)
