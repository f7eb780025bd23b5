"""The ground a run stands on: what is installed, and the seeds of all random generators."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
import sys
from importlib import metadata

import numpy as np
import torch

from .dist import get_dist_info

__all__ = ["collect_env", "set_random_seed"]


def set_random_seed(seed: int, deterministic: bool = False, use_rank_shift: bool = False) -> None:
    """Seed Python, numpy and torch, GPUs included, and set PYTHONHASHSEED for child processes.

    Args:
        deterministic: let cuDNN choose deterministic algorithms only, without measuring which are fastest.
        use_rank_shift: add the rank, so that each process draws other numbers.
    """
    if use_rank_shift:
        seed += get_dist_info()[0]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of all devices
    os.environ["PYTHONHASHSEED"] = str(seed)
    if deterministic:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def collect_env() -> dict[str, str]:
    """Name -> version of what a run depends on, in the order in which reports print it; takes about 0.1 s."""
    from . import __version__

    env = {"sys.platform": sys.platform, "Python": sys.version.replace("\n", "")}
    env["CUDA available"] = str(torch.cuda.is_available())
    if torch.cuda.is_available():
        names: dict[str, list[str]] = {}
        for number in range(torch.cuda.device_count()):
            names.setdefault(torch.cuda.get_device_name(number), []).append(str(number))
        env.update({f"GPU {','.join(numbers)}": name for name, numbers in names.items()})
    env["GCC"] = _first_line(["gcc", "--version"])
    env["PyTorch"] = str(torch.__version__)
    env["PyTorch compiling details"] = torch.__config__.show()
    for title, package in (("TorchVision", "torchvision"), ("OpenCV", "opencv-python"), ("MMCV", "mmcv")):
        if found := _version(package):
            env[title] = found
    env["fastrunner"] = __version__
    if importlib.util.find_spec("fastrunner._core"):
        from . import _core

        env["fastrunner core"] = f"{_core.active_isa()} (of {', '.join(_core.supported_isas())})"
    return env


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "n/a"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
