"""Launches kernels for a GPU that is not there, up to the driver, and prints the names of what was launched as JSON.

What the interpreter skips: binding and specialising arguments, compiling for them, and the launcher's arguments. A
stand-in takes the place of the driver and launches nothing. A script of its own: in the tests' process Triton
interprets.
"""

from __future__ import annotations

import json
import types
from typing import Any

import torch
from fastrunner.kernels.ema import ema_
from fastrunner.kernels.grad_norm import grad_norm
from fastrunner.kernels.normalize_u8 import normalize_u8
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastrunner.optim import EmaTerm, FusedAdamW, FusedSGD, update
from fastrunner.optim.gpu_table import GpuTable

LAUNCHED: list[str] = []


class Launcher:
    """What Triton makes of a compiled kernel, to be called with the grid, handles, and the kernel's arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.num_arguments = source.fn.__name__, len(source.fn.arg_names)

    def __call__(self, *arguments: Any) -> None:
        assert len(arguments) == 9 + self.num_arguments
        assert min(arguments[:3]) >= 1
        LAUNCHED.append(self.name)


class Driver:
    """A GPU of compute capability 9.0."""

    launcher_cls = Launcher
    utils = types.SimpleNamespace(
        load_binary=lambda *arguments: (1, 1, 32, 0, 1024),  # module, function, registers, spills, most threads
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def make_table(*args: Any, isa: str | None, **options: Any) -> GpuTable:
    return GpuTable(*args, **options)


def steps(make: type, **options: Any) -> None:
    """With everything folded in, and with nothing."""
    params = [nn.Parameter(torch.ones(n, dtype=d)) for n in (5, 20_000) for d in (torch.float32, torch.bfloat16)]
    optimizer = make(params, lr=0.1, **options)
    averages = EmaTerm(params, [p.detach().float() for p in params], 0.1, of_masters=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.skip_nonfinite = True
    optimizer.step(max_norm=1.0, ema=averages)
    optimizer.skip_nonfinite = False
    optimizer.step()


if __name__ == "__main__":
    driver.set_active(Driver())
    update.TABLES["cpu"] = make_table
    steps(FusedSGD)
    steps(FusedSGD, momentum=0.9, dampening=0.1)
    steps(FusedAdamW)
    images, zeros = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(3)
    normalize_u8(images, zeros, zeros)
    ema_([zeros], [zeros], torch.tensor(0.1))
    grad_norm([zeros])
    print(json.dumps(LAUNCHED))
