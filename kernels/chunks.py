"""Any number of tensors as one list of chunks that a kernel walks over, one program a chunk.

A kernel sees tensors as addresses: int64 (num_tensors,) in device memory, one such row for each role that a tensor has
(parameter, gradient, momentum buffer, ...); 0 stands for "none". The list of chunks is int64 (num_chunks, 4): tensor,
parameter group, first element, number of elements. It depends on nothing but sizes, so it is built once, while rows of
addresses may be refilled in every step.

Within a chunk, whole blocks are loaded and stored 16 bytes a thread where all addresses allow it, and the rest, a
tail shorter than a block or all of an unaligned tensor, one element at a time in blocks of ``TAIL``. The kernel decides
that by looking at the addresses: the host does not have to check gradients, which lie elsewhere in every iteration.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16_384  # elements a program goes through: enough programs to fill a GPU, enough work to pay for one
BLOCK = 1_024  # elements at once: with 4 warps, 8 a thread, so 32 or 16 bytes of each array
TAIL = tl.constexpr(256)  # the blocks of what cannot be vectorised; another size than BLOCK, so another layout
NUM_WARPS = 4

# Rounding after each operation, so that the interpreter, every GPU and a reference in torch have the same bits where
# the order of operations is the same. The kernels wait for memory: fused multiply-adds would not make them faster.
LAUNCH = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


@triton.jit
def elements(address, DTYPE: tl.constexpr):
    """A pointer to elements at an address, of which nothing is known."""
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def aligned(address, DTYPE: tl.constexpr):
    """The same for an address that is a multiple of 16. The compiler is told, and vectorises."""
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def vectorised(length, addresses, BLOCK: tl.constexpr):
    """How many elements to take in whole blocks: 0 if ``addresses``, or-ed together, are not multiples of 16."""
    return tl.where(addresses % 16 == 0, length // BLOCK * BLOCK, 0)


@triton.jit
def chunk_at(chunks, index):
    """(tensor, group, first element, number of elements) of a chunk."""
    row = chunks + index.to(tl.int64) * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3).to(tl.int32)


@triton.jit
def address_at(row, tensor, first, DTYPE: tl.constexpr):
    """Where element ``first`` of a tensor lies; the row's entry must not be 0."""
    return tl.load(row + tensor) + first * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def current(p_ptr, low_ptr, i, mask, MASTER: tl.constexpr):
    """A block of parameters in float32. A master whose rounded value is not the parameter any more takes that over."""
    p = tl.load(p_ptr + i, mask=mask).to(tl.float32)
    if MASTER:
        low = tl.load(low_ptr + i, mask=mask).to(tl.float32)
        p = tl.where(p.to(low_ptr.dtype.element_ty).to(tl.float32) == low, p, low)
    return p


def block_for(*dtypes: torch.dtype | None) -> int:
    """Elements at once for arrays of these dtypes; None does not count.

    Of mixed sizes 4 a thread: 16 bytes of float32, 8 of the 16-bit arrays. With 8 the compiler would give loads and
    stores of different widths to different threads, and move every value through shared memory between them.
    """
    return BLOCK if len({dtype.itemsize for dtype in dtypes if dtype}) == 1 else BLOCK // 2


def chunk_rows(
    numels: Sequence[int], groups: Sequence[int], *, tensors: Sequence[int] | None = None, chunk: int = CHUNK
) -> Tensor:
    """The list of chunks of tensors with these numbers of elements.

    Args:
        numels: number of elements of each tensor; empty tensors get no chunk.
        groups: parameter group of each.
        tensors: column of each in the rows of addresses; None: 0, 1, 2, ...
        chunk: elements a chunk, a multiple of 16: then chunks are as aligned as their tensor.
    Returns:
        int64 (num_chunks, 4) on the CPU, in the order of the tensors.
    """
    if chunk <= 0 or chunk % 16:
        raise ValueError(f"chunk must be a positive multiple of 16, got {chunk}")
    columns = range(len(numels)) if tensors is None else tensors
    rows = [
        (column, group, first, min(chunk, numel - first))
        for column, group, numel in zip(columns, groups, numels, strict=True)
        for first in range(0, numel, chunk)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4)


def address_rows(*lists: Sequence[Tensor]) -> Tensor:
    """The addresses of lists of tensors: int64 (num_lists, num_tensors) on the CPU."""
    return torch.tensor([[t.data_ptr() for t in tensors] for tensors in lists], dtype=torch.int64, device="cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


def check_lists(*lists: Sequence[Tensor]) -> None:
    """Raise ValueError if lists of tensors do not go together, element by element, or cannot be walked over in memory.

    All tensors must be on one device and of one of ``DTYPES``; those at one place in several lists must have one shape
    and, without gaps, one order of their elements in memory.
    """
    if len({len(tensors) for tensors in lists}) > 1:
        raise ValueError(f"the lists differ in length: {[len(tensors) for tensors in lists]}")
    device = next((t.device for tensors in lists for t in tensors), None)
    for i, together in enumerate(zip(*lists, strict=True)):
        for t in together:
            if t.device != device:
                raise ValueError(f"tensor {i} is on {t.device}, the first one on {device}")
            if t.dtype not in DTYPES:
                raise ValueError(f"tensor {i} is {t.dtype}; the kernels take {', '.join(map(str, DTYPES))}")
            if t.shape != together[0].shape or not same_order(t, together[0]):
                raise ValueError(
                    f"tensor {i}: shape {tuple(t.shape)} with strides {t.stride()}, its partner has shape "
                    f"{tuple(together[0].shape)} with strides {together[0].stride()}; both must be dense and alike"
                )


def same_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether both are dense and walking through their memory meets the same elements."""
    if tensor.layout != torch.strided or like.layout != torch.strided or not dense(like):
        return False
    return tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return tensor.numel() == 0
            expected *= size
    return True


def launch_on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device: make it the tensors' one. Nothing happens for tensors of the CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
