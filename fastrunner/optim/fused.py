"""Optimizers whose step is one pass over memory: gradient norm, clipping, update and average together.

    grad_norm = ||(g_1, ..., g_k)||_2        g <- g * min(1, max_norm / (grad_norm + 1e-6))
    then SGD or Adam (formulas in csrc/loops/ and kernels/), then average <- average * decay + p * (1 - decay)
Source: torch.optim.SGD, Adam and AdamW with foreach=False and torch.nn.utils.clip_grad_norm_, operation by operation.
On the CPU and without clipping the result has torch's bits. With clipping it differs by what the norms differ, and
torch's is the less exact one: off by 1e-5 for a million elements and by 1e-3 for 25 million, where this one is off by
float32's last bit. On a GPU every operation rounds by itself.

Options of ``param_groups`` are read in each step and may be changed between steps; ``lr`` may be a tensor of one
element. State lies in ``optimizer.state[p]`` under torch's names, and ``state_dict`` goes into and comes from torch's
optimizer. Parameters of bfloat16 and float16 are updated through float32 masters (``masters.py``), with float32 state.
The compiled core updates parameters on the CPU, Triton kernels those on a GPU, where nothing is read by the host.
What they do not take (float64, not dense, with sparse gradients, sharing memory) is updated by torch's operations;
``rest`` names it.
Parameters, averages and written gradients get a new version for autograd; state does not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..registry import OPTIMIZERS
from .algorithms import Adam, Sgd
from .fused_base import FusedOptimizer, Params
from .options import check_adam, check_sgd


@OPTIMIZERS.register_module()
class FusedSGD(FusedOptimizer):
    """``torch.optim.SGD`` with clipping and averaging folded in: same options, same state, same results.

    Args:
        params, clip_grad_norm, ema_decay, skip_nonfinite: as in ``FusedOptimizer``.
        lr: step size, >= 0.
        momentum: factor of the momentum buffer, >= 0; 0 means no buffer.
        dampening: the buffer takes up ``1 - dampening`` of the gradient; not in its first step.
        weight_decay: L2 penalty, >= 0.
        nesterov: look-ahead; wants momentum > 0 and dampening == 0.
        maximize: climb instead of descend.
    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the parameters are on several devices.
    Cost: with momentum 20 B per float32 element; clipping adds 4 B for the norm, and 4 B for each gradient written
    back; averaging 8 B.
    """

    _algorithm = Sgd()
    _state_keys = ("momentum_buffer",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            # torch.optim.SGD's other keys, so that a state_dict loaded there lacks nothing. They choose nothing here.
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(
            params, defaults, clip_grad_norm=clip_grad_norm, ema_decay=ema_decay, skip_nonfinite=skip_nonfinite
        )

    @classmethod
    def _check_options(cls, index: int, group: dict[str, Any]) -> None:
        check_sgd(index, group)


@OPTIMIZERS.register_module()
class FusedAdam(FusedOptimizer):
    """``torch.optim.Adam`` with clipping and averaging folded in: same options, same state, same results.

    Args:
        params, clip_grad_norm, ema_decay, skip_nonfinite: as in ``FusedOptimizer``.
        lr: step size, >= 0.
        betas: how much of the averages of the gradient and of its square each step keeps, in [0, 1).
        eps: added to the root of the second, >= 0.
        weight_decay: L2 penalty, >= 0.
        amsgrad: divide by the root of the largest second average so far.
        maximize: climb instead of descend.
        decoupled_weight_decay: AdamW's decay instead of the L2 penalty.
    Raises:
        TypeError: an option is not a number.
        ValueError: an option is out of range, or the parameters are on several devices.
    Cost: 28 B per float32 element, 36 B with amsgrad; clipping adds 4 B for the norm, and 4 B for each gradient written
    back; averaging 8 B.
    """

    _algorithm = Adam()
    _state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            # torch.optim.Adam's other keys, so that a state_dict loaded there lacks nothing. They choose nothing here.
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params, defaults, clip_grad_norm=clip_grad_norm, ema_decay=ema_decay, skip_nonfinite=skip_nonfinite
        )

    @classmethod
    def _check_options(cls, index: int, group: dict[str, Any]) -> None:
        check_adam(index, group)


@OPTIMIZERS.register_module()
class FusedAdamW(FusedAdam):
    """``torch.optim.AdamW``: as ``FusedAdam``, but weights decay by ``lr * weight_decay`` apart from the gradient.

    Args: as ``FusedAdam``'s; ``weight_decay`` is 1e-2 by default.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            *(params, lr, betas, eps, weight_decay, amsgrad),
            maximize=maximize,
            decoupled_weight_decay=True,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            skip_nonfinite=skip_nonfinite,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of Adam, or of an older torch, does not make it one
            group["decoupled_weight_decay"] = True
