"""What a number was measured on, and whether the machine was quiet."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

# Load average (1 minute) per core above which a warning is printed. One busy neighbour on two cores was seen to stretch
# two-threaded work 3 to 7 times.
NOISY_LOAD = 0.25


def facts(device: torch.device) -> dict[str, Any]:
    """CPU, cores, threads, versions, instruction set of the core, load; the GPU only where it is used."""
    from fastrunner import __version__, _core

    load = os.getloadavg()
    cores = usable_cores()
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "isa": _core.active_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastrunner": __version__,
        "system": f"{platform.system()} {platform.release()}",
        "load": list(load),
        "noisy": load[0] > NOISY_LOAD * cores,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no control group, or an older kind
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
