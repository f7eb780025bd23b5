"""The optimizer hook: zero_grad, backward, clip, step, in MMCV's order."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..optim.fused import FusedSGD
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
        self._fold = False
        self._plan: Any = None  # what ``_fold`` was decided for
        self._num_groups = -1

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
        elif self._folds(runner):
            grad_norm = optimizer.clipped_step(self.grad_clip["max_norm"])
            runner.log_buffer.update({"grad_norm": grad_norm}, outputs["num_samples"])
        else:
            clipped = self.clip_grads(runner.model.parameters())
            if clipped is not None:
                runner.log_buffer.update({"grad_norm": clipped}, outputs["num_samples"])
            optimizer.step()

    def _folds(self, runner: BaseRunner) -> bool:
        """Whether clipping can be folded into the optimizer's own pass, with the same result.

        Only for our optimizer itself, the plain L2 norm, ``clip_grads`` as it is here, and an optimizer that holds all
        of the model's parameters: MMCV's norm is taken over the model. Looked at when a plan is made (at the start and
        at each epoch), not at each iteration.
        """
        num_groups = len(runner.optimizer.param_groups)
        if self._plan is not runner._plan or self._num_groups != num_groups:
            self._plan, self._num_groups = runner._plan, num_groups
            self._fold = (
                type(runner.optimizer) is FusedSGD
                and type(self).clip_grads is OptimizerHook.clip_grads
                and "clip_grads" not in self.__dict__
                and self.grad_clip is not None
                and self.grad_clip.keys() <= {"max_norm", "norm_type"}
                and self.grad_clip.get("norm_type", 2) == 2
                and {id(p) for p in runner.model.parameters()}
                == {id(p) for group in runner.optimizer.param_groups for p in group["params"]}
            )
        return self._fold

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
