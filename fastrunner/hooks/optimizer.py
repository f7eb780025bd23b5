"""The optimizer hook: zero_grad, backward, clip, step, in MMCV's order."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..optim.foldable import is_fused, watches_step
from ..registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class OptimizerHook(Hook):
    """Turns ``runner.outputs["loss"]`` into an update of the weights, at priority ABOVE_NORMAL.

    The gradients of an iteration stay readable, clipped, until the next one starts its backward. ``grad_norm`` goes to
    the log as a tensor: nothing here waits for the device.

    Args:
        grad_clip: arguments of ``torch.nn.utils.clip_grad_norm_``, e.g. ``dict(max_norm=1.0)``; None: no clipping.
        detect_anomalous_params: log each parameter that the loss does not depend on. Slow; for debugging.
    """

    def __init__(self, grad_clip: dict[str, Any] | None = None, detect_anomalous_params: bool = False) -> None:
        self.grad_clip = grad_clip
        self.detect_anomalous_params = detect_anomalous_params
        self._fold: tuple[Any, ...] = ()  # what the decision below was made for, and the decision

    def clip_grads(self, params: Iterable[nn.Parameter]) -> Tensor | None:
        """Clip in place and return the norm before; None where no parameter has a gradient."""
        params = [p for p in params if p.requires_grad and p.grad is not None]
        return clip_grad_norm_(params, **(self.grad_clip or {})) if params else None

    def after_train_iter(self, runner: BaseRunner) -> None:
        optimizer, outputs = runner.optimizer, runner.outputs
        if optimizer is None or type(optimizer) is dict:
            raise TypeError(
                f"OptimizerHook drives one optimizer, the runner has {type(optimizer).__name__}; "
                "a model that steps its optimizers inside train_step wants optimizer_config=None"
            )
        optimizer.zero_grad()
        if self.detect_anomalous_params:
            self.detect_anomalous_parameters(outputs["loss"], runner)
        try:
            outputs["loss"].backward()
        except (RuntimeError, AttributeError, KeyError):
            check_loss(outputs)  # says what is wrong with the loss, if it is the loss
            raise

        if self.grad_clip is None:
            optimizer.step()
        elif self._folds(runner.model, optimizer):
            grad_norm = optimizer.clipped_step(self.grad_clip["max_norm"])
            runner.log_buffer.update({"grad_norm": grad_norm}, outputs["num_samples"])
        else:
            clipped = self.clip_grads(runner.model.parameters())
            if clipped is not None:
                runner.log_buffer.update({"grad_norm": clipped}, outputs["num_samples"])
            optimizer.step()

    def _folds(self, model: nn.Module, optimizer: Any) -> bool:
        """Whether clipping is folded: decided again where optimizer, model, groups or arguments are others."""
        if not is_fused(optimizer):  # a mock's groups have no length
            return False
        now = (id(optimizer), id(model), *self.fold_basis(optimizer))
        if self._fold[:-1] != now:
            self._fold = (*now, self.refuse_fold(model, optimizer) is None)
        return bool(self._fold[-1])

    def fold_basis(self, optimizer: Any) -> tuple[Any, ...]:
        """What a user's code may change in the middle of a run, and a decision about folding rests on."""
        clip = None if self.grad_clip is None else dict(self.grad_clip)
        return clip, len(optimizer.param_groups), watches_step(optimizer)

    def refuse_fold(self, model: nn.Module, optimizer: Any) -> str | None:
        """Why clipping cannot be folded into the optimizer's own pass with the same result; None if it can.

        MMCV's norm is taken over the model, with ``clip_grad_norm_``, before the optimizer's step hooks.
        """
        if not is_fused(optimizer):
            return f"{type(optimizer).__name__} has no pass to fold clipping into; FusedSGD has"
        if type(self).clip_grads is not OptimizerHook.clip_grads or "clip_grads" in self.__dict__:
            return "clip_grads is overridden"
        if not self.clips_by_norm():
            return f"only an L2 norm is folded, not {self.grad_clip}"
        if watched := watches_step(optimizer):
            return watched
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in model.parameters()}:
            return "the optimizer does not hold exactly the model's parameters"
        return None

    def clips_by_norm(self) -> bool:
        """Whether clipping is ``clip_grad_norm_`` with an L2 norm and nothing else."""
        clip = self.grad_clip or {}
        return clip.keys() <= {"max_norm", "norm_type"} and clip.get("norm_type", 2) == 2

    def detect_anomalous_parameters(self, loss: Tensor, runner: BaseRunner) -> None:
        """Log, as errors, the parameters that require a gradient and that ``loss`` does not depend on."""
        reached, queue = set(), [loss.grad_fn]
        seen = set(queue)
        while queue:
            node = queue.pop()
            if node is None:
                continue
            if hasattr(node, "variable"):
                reached.add(id(node.variable))
            for parent, _ in node.next_functions:
                if parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        for name, param in runner.model.named_parameters():
            if param.requires_grad and id(param) not in reached:
                runner.logger.log(
                    level=logging.ERROR, msg=f"{name} with shape {param.size()} is not in the computational graph \n"
                )


def check_loss(outputs: dict[str, Any]) -> None:
    """Raise an error that says what is wrong with ``outputs["loss"]``, if something is.

    Raises:
        KeyError: there is no loss.
        TypeError: it is not a tensor.
        ValueError: it is not a scalar, or has no graph to go back through.
    """
    remedy = "train_step must return dict(loss=<0-D tensor that depends on the parameters>, ...)"
    if "loss" not in outputs:
        raise KeyError(f"train_step returned no 'loss', only {sorted(outputs)}; {remedy}")
    loss = outputs["loss"]
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss is a {type(loss).__name__}, not a tensor; {remedy}")
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}, not one value; {remedy}, e.g. loss.mean()")
    if not loss.requires_grad:
        raise ValueError(f"the loss does not depend on any parameter that requires a gradient; {remedy}")
