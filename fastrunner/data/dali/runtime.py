"""What of DALI itself is used: its import, its outputs as torch's tensors, and what its errors say."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack


def import_dali() -> tuple[Any, Any, Any]:
    """DALI's Pipeline, fn and types; imported when the first loader is made (0.9 s), not with fastrunner."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise ImportError("reading images by DALI needs nvidia-dali: pip install fastrunner[dali]") from error
    return Pipeline, fn, types


def to_torch(output: Any, *, copy: bool) -> Tensor | list[Tensor]:
    """A pipeline's output as a tensor, or as a list of tensors where the samples differ in shape.

    Without ``copy`` it is DALI's own memory, which DALI takes back when the tensor is gone: its default executor makes
    new memory for each batch.
    """
    if output.is_dense_tensor():
        tensor: Tensor = from_dlpack(output.as_tensor().__dlpack__())  # 5 us; with the tensor itself 130
        return tensor.clone() if copy else tensor
    tensors = [from_dlpack(sample.__dlpack__()) for sample in output]
    return [tensor.clone() for tensor in tensors] if copy else tensors


def reason(error: BaseException, file: str | None = None) -> str:
    """What is wrong: of DALI's message only the line that says what, not where in the pipeline."""
    if file is not None and not os.path.exists(file):
        return "no such file"
    if file is not None and os.path.getsize(file) == 0:
        return "the file is empty"
    lines = [line.strip() for line in str(error).splitlines()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    return next((line for line in after if line), "unknown to DALI")
