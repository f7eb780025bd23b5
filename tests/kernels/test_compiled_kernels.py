"""The kernels, compiled ahead of time for GPUs that are not there: nothing spills, and memory is moved 16 bytes a time.

So it is on the path for aligned tensors: arrays of 16 bits beside float32 ones are moved 8 bytes a time, as many
elements as of the others. ``pytest tests/kernels/test_compiled_kernels.py -s`` prints the numbers. None of them says
how fast anything is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def output_of(script: str, *arguments: str, cache: Path) -> list[Any]:
    """What a script prints, a JSON value a line; it compiles, so it does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)  # compiled now, not found
    command = [sys.executable, "-W", "ignore", str(FOLDER / script), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.timeout(300)  # 6 s on an idle machine
@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_no_spills_and_16_byte_accesses(arch: int, tmp_path: Path) -> None:
    found = output_of("compile_kernels.py", str(arch), cache=tmp_path)
    assert len(found) == 17
    print(f"\nsm_{arch:<46} registers  shared B  loads of 16, 8 B  stores of 16, 8 B  B an element")
    for k in found:
        print(
            f"{k['name']:<50} {k['registers']:8} {k['shared']:9} {k['loads16']:13}, {k['loads8']}"
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


@pytest.mark.timeout(300)  # 12 s on an idle machine
def test_launches_reach_the_driver(tmp_path: Path) -> None:
    """The names of parameters, say, may clash with those in code that Triton generates; no interpreter notices."""
    (launched,) = output_of("launch_kernels.py", cache=tmp_path)
    norm, updates = ["_sum_squares_kernel"] * 2, 2  # float32 and bfloat16 apart
    prepare = ["_prepare_kernel"]
    assert launched == [
        *(*norm, *prepare, *["_sgd_kernel"] * updates),  # all folded in
        *["_sgd_kernel"] * updates,  # nothing
        *(*norm, *prepare, *["_sgd_kernel"] * updates),
        *(*prepare, *["_sgd_kernel"] * updates),  # dampening counts steps
        *(*norm, *prepare, *["_adam_kernel"] * updates),
        *(*prepare, *["_adam_kernel"] * updates),
        *("_normalize_u8_kernel", "_ema_kernel", "_sum_squares_kernel", "_finish_norm_kernel"),
    ]
