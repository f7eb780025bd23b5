"""What of DALI itself is used: its import, its outputs as torch's tensors, and what its errors say."""

from __future__ import annotations

import functools
import gc
import os
import weakref
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


_pipes: weakref.WeakSet[Any] = weakref.WeakSet()
_never_ended: list[Any] = []


def forks_safely(pipe: Any) -> Any:
    """``pipe``, which a forked child (a DataLoader's worker) will not end.

    A pipeline ends with its last reference, and waits for its threads. In a child there are none, so it would wait for
    ever: it need only be part of some garbage that happens to be collected there.
    """
    _watch_forks()
    _pipes.add(pipe)
    return pipe


@functools.cache
def _watch_forks() -> None:
    def in_child() -> None:
        gc.freeze()  # what the parent has left is not collected here; DALI's tensors neither
        _never_ended.extend(_pipes)

    os.register_at_fork(after_in_child=in_child)


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
