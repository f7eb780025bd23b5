"""What a number was measured on, and whether the machine was quiet."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

# Load average (1 minute) per core above which a warning is printed. One busy neighbour on two cores was seen to stretch
# two-threaded work 3 to 7 times.
NOISY_LOAD = 0.25
NOISY_SPIN = 1.3  # the same work, the slowest tenth against the fastest: more than a clock that settles


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


def frequency_mhz() -> float | None:
    """The mean of the cores' clock rates as the kernel gives it; None where it gives none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    rates = [float(line.split(":", 1)[1]) for line in text.splitlines() if line.startswith("cpu MHz")]
    return sum(rates) / len(rates) if rates else None


def busy_s() -> float | None:
    """Seconds that the machine's cores have worked since it started, stolen time included; None where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def spin_ns(turns: int = 20_000) -> int:
    """A piece of work that is always the same: it takes longer only where the machine does."""
    begin = time.perf_counter_ns()
    for _ in range(turns):
        pass
    return time.perf_counter_ns() - begin


class _Sample:
    own_cpu_s = 0.0


class Watch:
    """Looks at the machine around each sample: how fast it is, and what others do on it."""

    def __init__(self) -> None:
        self.spins_ns: list[int] = []
        self.others: list[float] = []  # cores that somebody else used
        self.mhz: list[float] = []

    @contextmanager
    def sample(self) -> Iterator[_Sample]:
        """Around one sample; the body sets ``own_cpu_s``, the processor time that the sample itself took."""
        self.spins_ns.append(spin_ns())
        if (rate := frequency_mhz()) is not None:
            self.mhz.append(rate)
        seen, before, begin = _Sample(), busy_s(), time.perf_counter()
        yield seen
        after, wall = busy_s(), time.perf_counter() - begin
        if before is not None and after is not None and wall > 0.1:  # the kernel counts in steps of 10 ms
            self.others.append(max(0.0, (after - before - seen.own_cpu_s) / wall))

    def summary(self) -> dict[str, Any]:
        """Medians and extremes, and whether the machine was steady."""
        if not self.spins_ns:
            return {"noisy": False}
        spins = sorted(self.spins_ns)
        slow = spins[int(0.9 * (len(spins) - 1))] / spins[0]
        others = median(self.others) if self.others else None
        return {
            "spin_p90_over_min": slow,
            "others_cores": others,
            "mhz": [min(self.mhz), median(self.mhz), max(self.mhz)] if self.mhz else None,
            "load": list(os.getloadavg()),
            "noisy": slow > NOISY_SPIN or (others is not None and others > NOISY_LOAD),
        }
