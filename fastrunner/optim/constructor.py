"""How the parameters of a model become param groups: MMCV's ``paramwise_cfg``.

Without it, one group holds all parameters. With it, every parameter is a group of its own, in the order of
``named_parameters``, with its own lr and weight_decay.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..model.parallel import unwrap
from ..registry import OPTIMIZER_BUILDERS, OPTIMIZERS, build_from_cfg
from ..spelling import check_keys

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_DCN = ("DeformConv2d", "ModulatedDeformConv2d")  # of mmcv.ops; by name, since nothing here needs them
_KEYS = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
    "bypass_duplicate",
)


@OPTIMIZER_BUILDERS.register_module()
class DefaultOptimizerConstructor:
    """Builds an optimizer over the parameters of a model.

    Args:
        optimizer_cfg: dict(type=..., lr=..., weight_decay=..., ...).
        paramwise_cfg: factors on lr and weight_decay for some parameters, all 1 by default:
            ``custom_keys``: part of a name -> dict(lr_mult=, decay_mult=); the longest key that fits wins, and then
            no other rule counts. ``bias_lr_mult``, ``bias_decay_mult``: biases, except of norms and deformable
            convolutions. ``norm_decay_mult``: norm layers. ``dwconv_decay_mult``: depthwise convolutions.
            ``dcn_offset_lr_mult``: offset convolutions of deformable ones. ``bypass_duplicate``: skip a parameter
            that is in a group already.
    Raises:
        TypeError: not dicts.
        ValueError: a factor on weight_decay without a weight_decay.
        KeyError: an unknown key, or an unknown factor in ``custom_keys``.
    """

    def __init__(self, optimizer_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        if not isinstance(optimizer_cfg, dict):
            raise TypeError(f"optimizer_cfg should be a dict, got {type(optimizer_cfg).__name__}")
        self.optimizer_cfg = optimizer_cfg
        self.paramwise_cfg = {} if paramwise_cfg is None else paramwise_cfg
        self.base_lr = optimizer_cfg.get("lr")
        self.base_wd = optimizer_cfg.get("weight_decay")
        self._validate_cfg()

    def _validate_cfg(self) -> None:
        if not isinstance(self.paramwise_cfg, dict):
            raise TypeError(f"paramwise_cfg should be a dict or None, got {type(self.paramwise_cfg).__name__}")
        own = type(self) is DefaultOptimizerConstructor  # a subclass may have keys of its own
        if own:
            check_keys(self.paramwise_cfg, _KEYS, "paramwise_cfg")
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        if not isinstance(custom_keys, dict):
            raise TypeError(f"custom_keys should be a dict, got {type(custom_keys).__name__}")
        for key, factors in custom_keys.items() if own else ():
            check_keys(factors, ("lr_mult", "decay_mult"), f"custom_keys[{key!r}]")
        decays = [key for key in self.paramwise_cfg if key.endswith("_decay_mult")]
        decays += [f"custom_keys[{key!r}]" for key, factors in custom_keys.items() if "decay_mult" in factors]
        if decays and self.base_wd is None:
            raise ValueError(f"{', '.join(decays)} multiply weight_decay, but the optimizer's config has none")
        lrs = [key for key in self.paramwise_cfg if key.endswith("_lr_mult")]
        lrs += [f"custom_keys[{key!r}]" for key, factors in custom_keys.items() if "lr_mult" in factors]
        if lrs and self.base_lr is None:
            raise ValueError(f"{', '.join(lrs)} multiply lr, but the optimizer's config has none")

    def __call__(self, model: nn.Module) -> Any:
        model = _inside(model)
        params: Any = model.parameters()
        if self.paramwise_cfg:
            params = []
            self.add_params(params, model)
        return build_from_cfg(self.optimizer_cfg, OPTIMIZERS, default_args={"params": params})

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: bool | None = None
    ) -> None:
        """Append a group for each parameter of ``module`` and of what is in it.

        Args:
            prefix: path of ``module`` in the model.
            is_dcn_module: whether ``module`` is inside a deformable convolution.
        """
        for name, param in module.named_parameters(recurse=False):
            group: dict[str, Any] = {"params": [param]}
            if not param.requires_grad:
                params.append(group)
                continue
            if self.paramwise_cfg.get("bypass_duplicate", False) and self._is_in(group, params):
                warnings.warn(
                    f"{prefix} is duplicate. It is skipped since "
                    f"bypass_duplicate={self.paramwise_cfg['bypass_duplicate']}",
                    stacklevel=2,
                )
                continue
            custom = self._custom_factors(f"{prefix}.{name}")
            lr_mult, decay_mult = custom or self._factors(module, prefix, name, bool(is_dcn_module))
            if self.base_lr is not None:
                group["lr"] = self.base_lr * lr_mult
            if self.base_wd is not None:
                group["weight_decay"] = self.base_wd * decay_mult
            params.append(group)
        is_dcn_module = any(kind.__name__ in _DCN for kind in type(module).__mro__)
        for name, child in module.named_children():
            self.add_params(params, child, f"{prefix}.{name}" if prefix else name, is_dcn_module)

    def _is_in(self, param_group: dict[str, Any], param_group_list: list[dict[str, Any]]) -> bool:
        """Whether a parameter of the group is in one of the others."""
        taken = {id(param) for group in param_group_list for param in group["params"]}
        return any(id(param) in taken for param in param_group["params"])

    def _custom_factors(self, path: str) -> tuple[float, float] | None:
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        for key in sorted(sorted(custom_keys), key=len, reverse=True):
            if key in path:
                return custom_keys[key].get("lr_mult", 1.0), custom_keys[key].get("decay_mult", 1.0)
        return None

    def _factors(self, module: nn.Module, prefix: str, name: str, in_dcn: bool) -> tuple[float, float]:
        cfg = self.paramwise_cfg
        is_norm = isinstance(module, _NORMS)
        lr_mult = decay_mult = 1.0
        if name == "bias" and not (is_norm or in_dcn):
            lr_mult = cfg.get("bias_lr_mult", 1.0)
        if "conv_offset" in prefix and in_dcn and isinstance(module, nn.Conv2d):
            lr_mult = cfg.get("dcn_offset_lr_mult", 1.0)
        if is_norm:
            decay_mult = cfg.get("norm_decay_mult", 1.0)
        elif isinstance(module, nn.Conv2d) and module.in_channels == module.groups:
            decay_mult = cfg.get("dwconv_decay_mult", 1.0)
        elif name == "bias" and not in_dcn:
            decay_mult = cfg.get("bias_decay_mult", 1.0)
        return lr_mult, decay_mult


def _inside(model: nn.Module) -> nn.Module:
    """The module inside all wrappers, registered or not: one that holds only ``module`` is a wrapper."""
    model = unwrap(model)
    while [name for name, _ in model.named_children()] == ["module"] and not any(True for _ in model.parameters(False)):
        model = unwrap(model.module)
    return model
