"""Real text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

MOST = 8 << 20  # bytes that are read; the library has some 30 MB


@lru_cache(maxsize=1)
def library_bytes() -> Tensor:
    """The modules at the top of the standard library, by name, one after the other: uint8, (n,), n <= 8 MB.

    Raises:
        OSError: the library's sources are not there (a frozen Python).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:MOST]
    if len(text) < 1 << 16:
        raise OSError(f"{folder} has no sources of the standard library to read as text")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Bytes(Dataset[dict[str, Tensor]]):
    """Windows of ``length`` bytes, one after the other, and each window's next bytes."""

    def __init__(self, length: int) -> None:
        self.text, self.length = library_bytes(), length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """dict(img=int64 (length,), gt_label=int64 (length,)); the names are those that ``supervised`` reads."""
        begin = index * self.length
        piece = self.text[begin : begin + self.length + 1].long()
        return {"img": piece[:-1], "gt_label": piece[1:]}
