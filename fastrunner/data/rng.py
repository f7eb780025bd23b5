"""Random numbers that depend on (seed, epoch, index) and nothing else, and the states of the global generators.

    key = mix(mix(seed) + epoch)          number j of sample i = mix(mix(key ^ mix(i)) + j * golden)

``mix`` is the finaliser of SplitMix64 over a counter (Steele, Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195).
So the number of threads, of workers and of ranks changes no sample, and a resume starts anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: SplitMix64's step


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's next output for each state in ``x``: a bijection of 64 bits, good in every one of them."""
    x = x + GOLDEN  # without it 0 stays 0
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key_of(seed: int, epoch: int) -> NDArray[np.uint64]:
    """uint64 (1,): what everything random in ``epoch`` follows from."""
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch):
        key = mix(key + np.uint64(part % 2**64))
    return key


def streams(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """uint64 (n,): the state each sample's numbers start from."""
    return mix(key_of(seed, epoch) ^ mix(indices.astype(np.uint64)))


def uniforms(seed: int, epoch: int, indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """``count`` numbers in [0, 1) for each sample: float64, (len(indices), count)."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    bits = mix(streams(seed, epoch, indices)[:, None] + steps) >> np.uint64(11)
    result: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return result


@lru_cache(maxsize=8)
def _key_int(seed: int, epoch: int) -> int:
    return int(key_of(seed, epoch)[0])


def _mix_int(x: int) -> int:
    """:func:`mix` of one number; numpy's scalars are 15 times slower."""
    x = (x + 0x9E3779B97F4A7C15) & _64_BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return x ^ (x >> 31)


_64_BITS = 2**64 - 1


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """64 bits for one sample, the same number as :func:`streams` gives."""
    return _mix_int(_key_int(seed, epoch) ^ _mix_int(index & _64_BITS))


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed python's, numpy's and torch's global generators for one sample. 9 us."""
    start = sample_seed(seed, epoch, index)
    random.seed(start)
    np.random.seed(start & 0xFFFFFFFF)
    torch.default_generator.manual_seed(start)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever happens inside, the global generators (python, numpy, torch on the CPU) are as before afterwards."""
    kept = capture()
    try:
        yield
    finally:
        put_back(kept)


def capture() -> tuple[Any, ...]:
    """The global generators' states, as each of them gives it: quick, for :func:`put_back` and :func:`plain`."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def put_back(kept: tuple[Any, ...]) -> None:
    python, numpy_state, torch_state = kept
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)


def plain(kept: tuple[Any, ...]) -> dict[str, Any]:
    """What :func:`capture` gave, as tensors and plain types: it can be saved and read with ``weights_only=True``."""
    (version, words, python_gauss), numpy_state, torch_state = kept
    _, key, pos, has_gauss, gauss = numpy_state
    return {
        "python": {"version": version, "words": list(words), "gauss": python_gauss},
        "numpy": {
            "key": torch.from_numpy(key.astype(np.int64)),
            "pos": int(pos),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": torch_state,
    }


def from_plain(state: dict[str, Any]) -> tuple[Any, ...]:
    """The inverse of :func:`plain`."""
    python, numpy_state = state["python"], state["numpy"]
    key = numpy_state["key"].cpu().numpy().astype(np.uint32)
    return (
        (python["version"], tuple(python["words"]), python["gauss"]),
        ("MT19937", key, numpy_state["pos"], numpy_state["has_gauss"], numpy_state["gauss"]),
        state["torch"].cpu(),
    )
