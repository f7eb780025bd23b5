"""One OpenMP runtime, torch's; and no hang in a forked child."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrunner import _core
from fastrunner.optim import FusedSGD


class DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def test_core_and_torch_share_one_openmp_runtime() -> None:
    """What libtorch_cpu finds as omp_get_max_threads lies in the file that the core found it in."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    info = DlInfo()
    assert ctypes.CDLL(None).dladdr(ctypes.cast(torch_cpu.omp_get_max_threads, ctypes.c_void_p), ctypes.byref(info))
    assert Path(info.file.decode()).samefile(_core.openmp_library())


def test_core_refuses_to_come_before_torch() -> None:
    """Loaded first, it would bring in the system's OpenMP, and torch would then run on that."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastrunner._core", {_core.__file__!r})
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print(error)
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "import torch before fastrunner._core: both have to run on torch's OpenMP runtime\nFalse\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads_in_child", [None, 1, 2])
def test_forked_child_steps(threads_in_child: int | None) -> None:
    """OpenMP's threads do not survive a fork; a region in the child that counts on them waits for ever."""
    torch.set_num_threads(2)
    param = torch.nn.Parameter(torch.ones(1_000_000))
    optimizer = FusedSGD([param], lr=0.5)
    param.grad = torch.ones_like(param)
    optimizer.clipped_step(1e9)  # in the parent two threads are running now
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child if it hangs; Python's handler would wait, too
        signal.alarm(20)
        if threads_in_child is not None:
            torch.set_num_threads(threads_in_child)
        optimizer.clipped_step(1e9)
        os._exit(0 if param.detach().numpy().max() == 0.0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
