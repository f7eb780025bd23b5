"""Compiles kernels for GPUs that are not there, and prints what came out as JSON, one object a line.

    python compile_kernels.py 90 [80 100 ...]

A script of its own: in the tests' process Triton interprets. The compiler and its tools come with Triton's wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from fastrunner.kernels import adam, chunks, ema, grad_norm, normalize_u8, prepare, sgd, update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = 32
POINTERS = {
    **dict.fromkeys(("scalars", "bias", "mean_ptr", "inv_std_ptr"), "*fp32"),
    **dict.fromkeys(("values", "partials", "max_norm", "momentum"), "*fp64"),
    **dict.fromkeys(("num_partials", "num_tensors", "HW"), "i32"),
    "x_ptr": "*u8",
}
FLOAT, HALF = torch.float32, torch.bfloat16
FOLDED = dict(clip=True, write_back=True, skip_nonfinite=True)
KINDS = {
    "float32": update.Kind(FLOAT, FLOAT, FLOAT),
    "float32, all folded in": update.Kind(FLOAT, FLOAT, FLOAT, FLOAT, **FOLDED),
    "bfloat16 with masters, all folded in": update.Kind(FLOAT, HALF, FLOAT, FLOAT, HALF, **FOLDED),
    "bfloat16 without masters": update.Kind(HALF, HALF, HALF),
}


def accesses(
    read: list[torch.dtype | None], written: list[torch.dtype | None], block: int | None = None
) -> dict[str, int]:
    """Bytes an element, and vectorised loads and stores a thread and block, of arrays of these dtypes."""
    block = block or chunks.block_for(*read, *written)
    per_thread = block // (chunks.NUM_WARPS * WARP)
    sizes = [[dtype.itemsize * per_thread for dtype in dtypes if dtype] for dtypes in (read, written)]
    found = {"bytes": sum(map(sum, sizes)) // per_thread}
    for name, side in zip(("loads", "stores"), sizes, strict=True):
        found[f"{name}16"] = sum(size // 16 for size in side)
        found[f"{name}8"] = sum(size == 8 for size in side)
    return found


def of_update(kind: update.Kind, num_states: int) -> dict[str, int]:
    """The same for an update, which has a second loop for averages of parameters without a gradient."""
    states, average = [kind.state] * num_states, kind.average
    back = kind.grad if kind.write_back else None
    read, written = [kind.param, kind.grad, kind.low, *states, average], [kind.param, kind.low, *states, average, back]
    found = accesses(read, written)
    if average:
        alone = accesses([average, kind.param, kind.low], [average], kind.block)
        found = {key: found[key] + (alone[key] if key != "bytes" else 0) for key in found}
    return found


def variants() -> list[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """(name, kernel, its constants, what to expect)."""
    found: list[tuple[str, Any, dict[str, Any], dict[str, int]]] = []
    for name, kind in KINDS.items():
        constants = {**kind.constants(), "BLOCK": kind.block}
        momentum = {"MOMENTUM": True, "NESTEROV": kind.clip, "FIRST": kind.clip}
        found.append((f"SGD, {name}", sgd._sgd_kernel, {**constants, **momentum}, of_update(kind, 1)))
        for amsgrad in (False, True) if kind.clip else (False,):
            options = {"DECOUPLED": kind.clip, "AMSGRAD": amsgrad}
            title = f"Adam, {name}" + (", amsgrad" if amsgrad else "")
            found.append((title, adam._adam_kernel, {**constants, **options}, of_update(kind, 2 + amsgrad)))
    for name, dtype in (("float32", FLOAT), ("bfloat16", HALF)):
        of_dtype = chunks.DTYPES[dtype]
        norm = {"G": of_dtype, "BLOCK": chunks.BLOCK}
        found.append((f"norm, {name}", grad_norm._sum_squares_kernel, norm, accesses([dtype], [])))
        average = {"E": tl.float32, "V": of_dtype, "BLOCK": chunks.block_for(FLOAT, dtype)}
        found.append((f"average, {name}", ema._ema_kernel, average, accesses([FLOAT, dtype], [FLOAT])))
        planes = {"C": 3, "IN_LAST": False, "OUT_LAST": False, "BLOCK": normalize_u8.THREADS * 16 // dtype.itemsize}
        bytes_read = 16 // dtype.itemsize  # by a thread, of each plane: for 16 bytes of the result
        stores = {**accesses([], [dtype] * 3, planes["BLOCK"]), "bytes": 1 + dtype.itemsize}
        stores["loads8"] = 3 * (bytes_read == 8)
        found.append((f"uint8 -> {name}", normalize_u8._normalize_u8_kernel, {**planes, "_out": dtype}, stores))
    everything = {"NORM": True, "SKIP": True, "STEPS": True, "BIAS": True, "BLOCK": chunks.BLOCK}
    found.append(("preparation", prepare._prepare_kernel, everything, {"bytes": 0}))
    return found


def compiled(kernel: Any, constants: dict[str, Any], arch: int) -> dict[str, Any]:
    """Registers and so on of one variant."""
    constants = dict(constants)
    out = constants.pop("_out", None)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "*i64") for name in names}
    attributes = {}
    if out is not None:  # torch's allocations are aligned, and so is a number of pixels that is a multiple of 16
        signature["out_ptr"] = {FLOAT: "*fp32", HALF: "*bf16"}[out]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ("x_ptr", "out_ptr", "HW")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=chunks.LAUNCH)
    ptx = result.asm["ptx"]
    counted = {
        f"{name}{width}": len(re.findall(rf"\b{name[:2].replace('lo', 'ld')}\.global\S*\.v{width // 4}\.b32", ptx))
        for name in ("loads", "stores")
        for width in (16, 8)
    }
    return {**resources(result.asm["cubin"]), **counted, "shuffled": "convert_layout" in result.asm["ttgir"]}


def resources(cubin: bytes) -> dict[str, int]:
    """registers a thread, shared memory in bytes, and stack in bytes: where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {"registers": "REG", "shared": "SHARED", "stack": "STACK", "local": "LOCAL"}
    return {ours: int(re.findall(rf"\b{theirs}:(\d+)", text)[-1]) for ours, theirs in names.items()}


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        for name, kernel, constants, expected in variants():
            found = compiled(kernel, constants, arch)
            print(json.dumps({"arch": arch, "name": name, "expected": expected, **found}), flush=True)
