"""The kernels, compiled ahead of time for GPUs that are not there: nothing spills, and memory is moved 16 bytes a time.

So it is on the path for aligned tensors: arrays of 16 bits beside float32 ones are moved 8 bytes a time, as many
elements as of the others.

The numbers are printed: ``pytest tests/kernels/test_compiled.py -s``. None of them says how fast anything is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compile_for(arch: int, cache: Path) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)  # compiled now, not found
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(arch)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.timeout(300)  # 6 s on an idle machine
@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_no_spills_and_16_byte_accesses(arch: int, tmp_path: Path) -> None:
    found = compile_for(arch, tmp_path)
    assert len(found) == 17
    print(f"\nsm_{arch:<38} registers  shared B  loads of 16, 8 B  stores of 16, 8 B  B an element")
    for k in found:
        print(
            f"{k['name']:<42} {k['registers']:8} {k['shared']:9} {k['loads16']:13}, {k['loads8']}"
            f" {k['stores16']:15}, {k['stores8']} {k['expected']['bytes'] or '':15}"
        )
    for kernel in found:
        name, expected = kernel["name"], kernel["expected"]
        assert kernel["stack"] == kernel["local"] == 0, f"{name}: registers are spilled"
        assert not kernel["shuffled"], f"{name}: values go from thread to thread between load and store"
        # 65,536 registers: with at most 128 a thread, 16 warps of an SM wait for memory at the same time.
        assert kernel["registers"] <= 128, name
        if expected["bytes"]:
            accesses = {key: kernel[key] for key in expected if key != "bytes"}
            assert {"bytes": expected["bytes"], **accesses} == expected, name
