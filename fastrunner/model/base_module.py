"""Modules that know how they are initialised: ``init_cfg`` in the constructor, ``init_weights()`` before training.

The outer module's ``init_cfg`` acts first and its children's after it, so the inner one wins.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..log.setup import print_log
from .initializers import init_logger, initialize, parameter_mean, update_init_info

InitCfg = dict[str, Any] | list[dict[str, Any]] | None


class BaseModule(nn.Module):
    """An ``nn.Module`` with ``init_weights``.

    Args:
        init_cfg: see :mod:`fastrunner.model.initializers`; copied. None: only the children's are used.
    """

    def __init__(self, init_cfg: InitCfg = None) -> None:
        super().__init__()
        self._is_init = False
        self.init_cfg = copy.deepcopy(init_cfg)

    @property
    def is_init(self) -> bool:
        return self._is_init

    def init_weights(self) -> None:
        """Initialise this module and everything in it, once.

        The outermost call writes to the log how each parameter got its values: into the files of the logger where it
        has some, else to the logger. After ``dict(type="Pretrained")`` the children are left as they were loaded.
        """
        top = not hasattr(self, "_params_init_info")
        if top:
            self._begin_record()
        try:
            if self._is_init:
                warnings.warn(
                    f"init_weights of {type(self).__name__} has been called more than once.", UserWarning, stacklevel=2
                )
            else:
                self._init_weights()
            if top:
                self._report()
        finally:
            if top:
                for module in self.modules():
                    module.__dict__.pop("_params_init_info", None)

    def _init_weights(self) -> None:
        name = type(self).__name__
        pretrained = False
        if self.init_cfg:
            print_log(f"initialize {name} with init_cfg {self.init_cfg}", init_logger())
            initialize(self, self.init_cfg)
            pretrained = isinstance(self.init_cfg, dict) and self.init_cfg["type"] == "Pretrained"
        if not pretrained:
            for child in self.children():
                if callable(init_weights := getattr(child, "init_weights", None)):
                    init_weights()
                    update_init_info(child, f"Initialized by user-defined `init_weights` in {type(child).__name__} ")
        self._is_init = True

    def _begin_record(self) -> None:
        """One record, parameter -> {init_info, tmp_mean_value}, reachable from every module inside."""
        record: dict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
        untouched = f"The value is the same before and after calling `init_weights` of {type(self).__name__} "
        for param in self.parameters():
            record[param] = {"init_info": untouched, "tmp_mean_value": parameter_mean(param)}
        for module in self.modules():
            module.__dict__["_params_init_info"] = record  # a plain attribute: torch must not take it for anything

    def _report(self) -> None:
        logger = init_logger()
        record: Any = self._params_init_info
        lines = [f"\n{name} - {param.shape}: \n{record[param]['init_info']} \n"
                 for name, param in self.named_parameters()]  # fmt: skip
        files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        for handler in files:
            handler.stream = handler.stream or handler._open()  # None before the first record of a delayed handler
            handler.stream.write("".join(["Name of parameter - Initialization information\n", *lines]))
            handler.stream.flush()
        if not files:
            for line in lines:
                logger.info(line)

    def __repr__(self) -> str:
        return super().__repr__() + (f"\ninit_cfg={self.init_cfg}" if self.init_cfg else "")


class Sequential(BaseModule, nn.Sequential):
    """``nn.Sequential`` with ``init_cfg``."""

    def __init__(self, *args: Any, init_cfg: InitCfg = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *args)


class ModuleList(BaseModule, nn.ModuleList):
    """``nn.ModuleList`` with ``init_cfg``."""

    def __init__(self, modules: Iterable[nn.Module] | None = None, init_cfg: InitCfg = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleList.__init__(self, modules)


class ModuleDict(BaseModule, nn.ModuleDict):
    """``nn.ModuleDict`` with ``init_cfg``."""

    def __init__(self, modules: Mapping[str, nn.Module] | None = None, init_cfg: InitCfg = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleDict.__init__(self, modules)


__all__ = ["BaseModule", "ModuleDict", "ModuleList", "Sequential"]
