"""Whether other work can be folded into an optimizer's own pass without anybody noticing."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import _global_optimizer_pre_hooks


def is_fused(optimizer: object) -> bool:
    """Whether the optimizer is exactly one of this package: a user's subclass may do anything in ``step``."""
    return type(optimizer).__module__.startswith("fastrunner.") and hasattr(optimizer, "clipped_step")


def watches_step(optimizer: Any) -> str | None:
    """What sees gradients in the middle of clip and step, when a folded pass has not clipped them yet."""
    if optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks:
        return "the optimizer has step hooks"
    replaced = [name for name in ("step", "clipped_step", "zero_grad") if name in optimizer.__dict__]
    return f"{replaced[0]}() is replaced on the optimizer" if replaced else None
