"""Bare streams through memory: how fast this machine goes, whatever the arithmetic. A floor, not a benchmark."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Sample = Callable[[], float]  # nanoseconds of one run

# No chunks, no tables, no order of summation: as fast as this CPU goes through the memory.
SOURCE = """
extern "C" float read_stream(const float* g, long n) {
  float sum = 0;
#pragma omp parallel for simd reduction(+ : sum)
  for (long i = 0; i < n; ++i) sum += g[i] * g[i];
  return sum;
}
extern "C" void sgd_stream(float* p, const float* g, float* m, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    m[i] = 0.9f * m[i] + g[i];
    p[i] -= 1e-3f * m[i];
  }
}
extern "C" void sgd_stream_writing_back(float* p, float* g, float* m, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    g[i] *= 0.99f;
    m[i] = 0.9f * m[i] + g[i];
    p[i] -= 1e-3f * m[i];
  }
}
extern "C" void adamw_stream(float* p, const float* g, float* m, float* v, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    m[i] += 0.1f * g[i];
    v[i] += 0.1f * g[i];
    p[i] += m[i] + v[i];
  }
}
extern "C" void adamw_stream_writing_back(float* p, float* g, float* m, float* v, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    g[i] *= 0.99f;
    m[i] += 0.1f * g[i];
    v[i] += 0.1f * g[i];
    p[i] += m[i] + v[i];
  }
}
extern "C" void composite_stream(float* p, const float* g, float* m, float* v, float* a, long n) {
#pragma omp parallel for simd
  for (long i = 0; i < n; ++i) {
    m[i] += 0.1f * g[i];
    v[i] += 0.1f * g[i];
    p[i] += m[i] + v[i];
    a[i] += 0.1f * p[i];
  }
}
"""


def build() -> ctypes.CDLL:
    """The streams, compiled for this CPU; after torch, and so on torch's OpenMP threads."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "streams.cpp"), Path(folder, "streams.so")
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast"]
        subprocess.run(["g++", *flags, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def streams(num_floats: int, kinds: Sequence[str]) -> dict[str, Sample]:
    """Name -> one run over arrays of so many floats: the norm's read, and each kind's mix of reads and writes."""
    built = build()
    p, g, m, v, a = (torch.full((num_floats,), 1e-3) for _ in range(5))
    size = ctypes.c_long(num_floats)

    def sample(function: str, *arrays: Tensor) -> Sample:
        call, addresses = getattr(built, function), [ctypes.c_void_p(array.data_ptr()) for array in arrays]

        def run() -> float:
            start = time.perf_counter_ns()
            call(*addresses, size)
            elapsed = time.perf_counter_ns() - start
            assert arrays  # keeps the memory
            return elapsed

        return run

    found = {"stream, read": sample("read_stream", g)}
    if "sgd" in kinds:
        found["stream, sgd"] = sample("sgd_stream", p, g, m)
        found["stream, sgd, write-back"] = sample("sgd_stream_writing_back", p, g, m)
    if "adamw" in kinds:
        found["stream, adamw"] = sample("adamw_stream", p, g, m, v)
        found["stream, adamw, write-back"] = sample("adamw_stream_writing_back", p, g, m, v)
    if "composite" in kinds:
        found["stream, composite"] = sample("composite_stream", p, g, m, v, a)
    return found
