"""Initial values of parameters: plain functions, and the classes that ``init_cfg`` names.

    init_cfg = dict(type="Kaiming", layer="Conv2d", bias=0, override=dict(name="head", type="Constant", val=0))
A list of such dicts is applied in order. ``layer`` names classes (or direct base classes) of modules; without it
nothing is initialised, except by ``override``: the whole named module. The draws are torch's: one seed, MMCV's values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..log.setup import get_logger, logger_initialized
from ..registry import INITIALIZERS, build_from_cfg


def _fill(module: nn.Module, fill: Callable[[Tensor], Any], bias: float) -> None:
    """``fill`` the weight, where there is one, and set the bias, where there is one."""
    weight, offset = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        fill(weight)
    if offset is not None:
        nn.init.constant_(offset, bias)


def constant_init(module: nn.Module, val: float, bias: float = 0) -> None:
    """Weight = ``val``."""
    _fill(module, lambda weight: nn.init.constant_(weight, val), bias)


def xavier_init(module: nn.Module, gain: float = 1, bias: float = 0, distribution: str = "normal") -> None:
    """Glorot and Bengio 2010: variance ``gain**2 * 2 / (fan_in + fan_out)``."""
    draw = _one_of(distribution, uniform=nn.init.xavier_uniform_, normal=nn.init.xavier_normal_)
    _fill(module, lambda weight: draw(weight, gain=gain), bias)


def normal_init(module: nn.Module, mean: float = 0, std: float = 1, bias: float = 0) -> None:
    """Weight ~ N(``mean``, ``std**2``)."""
    _fill(module, lambda weight: nn.init.normal_(weight, mean, std), bias)


def trunc_normal_init(
    module: nn.Module, mean: float = 0, std: float = 1, a: float = -2, b: float = 2, bias: float = 0
) -> None:
    """N(``mean``, ``std**2``) cut to [``a``, ``b``], which are values, not numbers of standard deviations."""
    _fill(module, lambda weight: trunc_normal_(weight, mean, std, a, b), bias)


@torch.no_grad()
def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Fill by the inverse of the cumulative distribution, as MMCV does; torch's draws by now in another way."""

    def phi(x: float) -> float:
        return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0

    low, high = phi((a - mean) / std), phi((b - mean) / std)
    tensor.uniform_(2 * low - 1, 2 * high - 1).erfinv_()
    return tensor.mul_(std * math.sqrt(2.0)).add_(mean).clamp_(min=a, max=b)


def uniform_init(module: nn.Module, a: float = 0, b: float = 1, bias: float = 0) -> None:
    """Weight ~ U(``a``, ``b``)."""
    _fill(module, lambda weight: nn.init.uniform_(weight, a, b), bias)


def kaiming_init(
    module: nn.Module,
    a: float = 0,
    mode: str = "fan_out",
    nonlinearity: str = "relu",
    bias: float = 0,
    distribution: str = "normal",
) -> None:
    """He et al. 2015; ``a`` is the slope of leaky_relu's negative side."""
    draw = _one_of(distribution, uniform=nn.init.kaiming_uniform_, normal=nn.init.kaiming_normal_)
    _fill(module, lambda weight: draw(weight, a=a, mode=mode, nonlinearity=nonlinearity), bias)


def caffe2_xavier_init(module: nn.Module, bias: float = 0) -> None:
    """Caffe2's XavierFill: U with variance ``1 / fan_in``."""
    kaiming_init(module, a=1, mode="fan_in", nonlinearity="leaky_relu", bias=bias, distribution="uniform")


def bias_init_with_prob(prior_prob: float) -> float:
    """The bias at which a sigmoid gives ``prior_prob``."""
    return float(-math.log((1 - prior_prob) / prior_prob))


def _one_of(choice: str, **table: Any) -> Any:
    if choice not in table:
        raise ValueError(f"distribution must be one of {sorted(table)}, got {choice!r}")
    return table[choice]


class BaseInit:
    """Applies ``init`` to the layers named.

    Args:
        bias: value for biases.
        bias_prob: instead of ``bias``: the probability that a sigmoid shall give at the start.
        layer: name or list of names of classes. None: every module (only ``override`` is applied so).
    Raises:
        TypeError: wrong types.
    """

    def __init__(
        self, *, bias: float = 0, bias_prob: float | None = None, layer: str | list[str] | None = None
    ) -> None:
        self.wholemodule = False
        if not isinstance(bias, (int, float)):
            raise TypeError(f"bias must be a number, but got a {type(bias)}")
        if bias_prob is not None and not isinstance(bias_prob, float):
            raise TypeError(f"bias_prob type must be float, but got {type(bias_prob)}")
        layers = [layer] if isinstance(layer, str) else [] if layer is None else layer
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise TypeError(f"layer must be a str or a list of str, but got a {type(layer)}")
        self.layer = layers
        self.bias = bias if bias_prob is None else bias_init_with_prob(bias_prob)

    def init(self, module: nn.Module) -> None:
        """Give one module its values; a subclass says how."""
        raise TypeError(f"{type(self).__name__} does not say how to initialise a module: override init()")

    def arguments(self) -> dict[str, Any]:
        """What the log says about the values."""
        return {"bias": self.bias}

    def __call__(self, module: nn.Module) -> None:
        for each in module.modules():
            kinds = (type(each).__name__, *(base.__name__ for base in type(each).__bases__))
            if self.wholemodule or any(name in kinds for name in self.layer):
                self.init(each)
        update_init_info(module, self._get_init_info())

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: " + ", ".join(f"{k}={v}" for k, v in self.arguments().items())


@INITIALIZERS.register_module(name="Constant")
class ConstantInit(BaseInit):
    def __init__(self, val: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val = val

    def init(self, module: nn.Module) -> None:
        constant_init(module, self.val, self.bias)

    def arguments(self) -> dict[str, Any]:
        return {"val": self.val, "bias": self.bias}


@INITIALIZERS.register_module(name="Xavier")
class XavierInit(BaseInit):
    def __init__(self, gain: float = 1, distribution: str = "normal", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain, self.distribution = gain, distribution

    def init(self, module: nn.Module) -> None:
        xavier_init(module, self.gain, self.bias, self.distribution)

    def arguments(self) -> dict[str, Any]:
        return {"gain": self.gain, "distribution": self.distribution, "bias": self.bias}


@INITIALIZERS.register_module(name="Normal")
class NormalInit(BaseInit):
    def __init__(self, mean: float = 0, std: float = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.std = mean, std

    def init(self, module: nn.Module) -> None:
        normal_init(module, self.mean, self.std, self.bias)

    def arguments(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "bias": self.bias}


@INITIALIZERS.register_module(name="TruncNormal")
class TruncNormalInit(BaseInit):
    def __init__(self, mean: float = 0, std: float = 1, a: float = -2, b: float = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.std, self.a, self.b = mean, std, a, b

    def init(self, module: nn.Module) -> None:
        trunc_normal_init(module, self.mean, self.std, self.a, self.b, self.bias)

    def arguments(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "mean": self.mean, "std": self.std, "bias": self.bias}


@INITIALIZERS.register_module(name="Uniform")
class UniformInit(BaseInit):
    def __init__(self, a: float = 0, b: float = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.a, self.b = a, b

    def init(self, module: nn.Module) -> None:
        uniform_init(module, self.a, self.b, self.bias)

    def arguments(self) -> dict[str, Any]:
        return {"a": self.a, "b": self.b, "bias": self.bias}


@INITIALIZERS.register_module(name="Kaiming")
class KaimingInit(BaseInit):
    def __init__(
        self,
        a: float = 0,
        mode: str = "fan_out",
        nonlinearity: str = "relu",
        distribution: str = "normal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.a, self.mode, self.nonlinearity, self.distribution = a, mode, nonlinearity, distribution

    def init(self, module: nn.Module) -> None:
        kaiming_init(module, self.a, self.mode, self.nonlinearity, self.bias, self.distribution)

    def arguments(self) -> dict[str, Any]:
        own = {"a": self.a, "mode": self.mode, "nonlinearity": self.nonlinearity, "distribution": self.distribution}
        return {**own, "bias": self.bias}


@INITIALIZERS.register_module(name="Caffe2Xavier")
class Caffe2XavierInit(KaimingInit):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(a=1, mode="fan_in", nonlinearity="leaky_relu", distribution="uniform", **kwargs)


@INITIALIZERS.register_module(name="Pretrained")
class PretrainedInit:
    """The weights of a checkpoint: all of them, or those under ``prefix``."""

    def __init__(self, checkpoint: str, prefix: str | None = None, map_location: Any = None) -> None:
        self.checkpoint, self.prefix, self.map_location = checkpoint, prefix, map_location

    def __call__(self, module: nn.Module) -> None:
        # Checkpoints know models, not the other way round: imported when a file is asked for.
        from ..checkpoint import sources

        logger = init_logger()
        if self.prefix is None:
            sources.load_checkpoint(module, self.checkpoint, self.map_location, strict=False, logger=logger)
        else:
            state = sources._load_checkpoint_with_prefix(self.prefix, self.checkpoint, self.map_location)
            sources.load_state_dict(module, state, strict=False, logger=logger)
        update_init_info(module, self._get_init_info())

    def _get_init_info(self) -> str:
        return f"{type(self).__name__}: load from {self.checkpoint}"


def initialize(module: nn.Module, init_cfg: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Initialise ``module`` as ``init_cfg`` says; a list is applied in order.

    Raises:
        TypeError: ``init_cfg`` or an ``override`` is neither a dict nor a list of dicts.
        ValueError: an ``override`` has no ``name``, or other arguments without a ``type``.
        RuntimeError: an ``override`` names what the module does not have.
        KeyError: an unknown ``type``; the nearest names are given.
    """
    for each in _dicts(init_cfg, "init_cfg"):
        cfg = copy.deepcopy(each)
        overrides = cfg.pop("override", None)
        build_from_cfg(cfg, INITIALIZERS)(module)
        if overrides is not None:
            cfg.pop("layer", None)
            for override in _dicts(overrides, "override"):
                _override(module, override, cfg)


def _dicts(value: Any, what: str) -> list[dict[str, Any]]:
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise TypeError(f"{what} must be a dict or a list of dict, but got {type(value)}")
    return items


def _override(module: nn.Module, override: dict[str, Any], cfg: dict[str, Any]) -> None:
    """Initialise the whole of one named child, by its own cfg or, where that is only a name, by ``cfg``."""
    own = copy.deepcopy(override)
    name = own.pop("name", None)
    if name is None:
        raise ValueError(f'`override` must contain the key "name", but got {override}')
    if own and "type" not in own:
        raise ValueError(f'`override` need "type" key, but got {own}')
    child = getattr(module, name, None)
    if child is None:
        known = [child_name for child_name, _ in module.named_children()]
        raise RuntimeError(f"module did not have attribute {name}, but init_cfg is {own or cfg}; it has {known}")
    initializer = build_from_cfg(own or cfg, INITIALIZERS)
    initializer.wholemodule = True
    initializer(child)


def init_logger() -> Any:
    """Where initialisation reports: the logger that was set up first, else ``fastrunner``."""
    return get_logger(next(iter(logger_initialized), "fastrunner"))


def parameter_mean(param: Tensor) -> float:
    """What stands for a parameter's values in the record. Reads the device."""
    return float(param.detach().double().mean()) if param.numel() and not param.is_meta else 0.0


def update_init_info(module: nn.Module, init_info: str) -> None:
    """Note ``init_info`` for the parameters of ``module`` whose values have changed, while BaseModule keeps a record.

    A value counts as changed when its mean has: one number a parameter, as in MMCV.

    Raises:
        ValueError: a parameter was made while the model was being initialised.
    """
    record = getattr(module, "_params_init_info", None)
    if record is None:
        return
    for name, param in module.named_parameters():
        if param not in record:
            raise ValueError(
                f"{name} of {type(module).__name__} appeared during init_weights(): change values in place "
                "(param.data.fill_(...)) instead of making a new Parameter"
            )
        mean = parameter_mean(param)
        if record[param]["tmp_mean_value"] != mean:
            record[param]["init_info"] = init_info
            record[param]["tmp_mean_value"] = mean


__all__ = [
    "BaseInit",
    "Caffe2XavierInit",
    "ConstantInit",
    "KaimingInit",
    "NormalInit",
    "PretrainedInit",
    "TruncNormalInit",
    "UniformInit",
    "XavierInit",
    "bias_init_with_prob",
    "caffe2_xavier_init",
    "constant_init",
    "initialize",
    "kaiming_init",
    "normal_init",
    "trunc_normal_",
    "trunc_normal_init",
    "uniform_init",
    "update_init_info",
    "xavier_init",
]
