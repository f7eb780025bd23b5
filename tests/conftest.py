"""What every test starts from: poisoned memory, fixed seeds, one thread, an empty folder, no torchrun."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

NUM_THREADS = 1  # two threads that wait for each other crawl where something else has a core; tests of threads set 2
# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Triton reads this when it is imported and when
# kernels are defined, so it is set before any test is. With a GPU, the same tests run the compiled kernels there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts background jobs with SIGINT ignored; tests that raise it need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its kin come full of NaN (integers: their maximum), so that no test passes on lucky zeros.

    torch fills only under deterministic algorithms. The debug mode switches them on without importing inductor
    (``torch.use_deterministic_algorithms`` imports it: 3 s); "warn", because the tests are not about determinism.
    """
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def same_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds, threads, folder and environment do not depend on the tests before, the machine or the caller."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(NUM_THREADS)
    monkeypatch.chdir(tmp_path)  # a run without work_dir writes ./work_dirs
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
