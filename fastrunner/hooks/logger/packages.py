"""Packages of loggers that may be missing, and MMCV's loggers that are not carried: one clear error each, at once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, NoReturn

from ...registry import HOOKS

NOT_CARRIED = {
    "ClearMLLoggerHook": "clearml",
    "DvcliveLoggerHook": "dvclive",
    "MlflowLoggerHook": "mlflow",
    "NeptuneLoggerHook": "neptune.new, which neptune has removed",
    "PaviLoggerHook": "pavi, a service inside one company",
    "SegmindLoggerHook": "segmind, a service that is gone",
}


def require(package: str, hook: str) -> None:
    """Raises ImportError that says what to install. Imports nothing."""
    if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:  # a stub in sys.modules counts
        raise ImportError(
            f"{hook} needs the package {package!r}, which is not installed: pip install {package}, or take "
            f"dict(type={hook!r}) out of log_config"
        )


def _refuse(name: str, of: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(
            f"fastrunner does not carry MMCV's {name} ({of}). Text-, Tensorboard- and WandbLoggerHook are "
            "there; a logger of your own is a subclass of LoggerHook with log(runner)"
        )

    return refuse


for _name, _of in NOT_CARRIED.items():
    HOOKS.register_module(name=_name, module=_refuse(_name, _of))
