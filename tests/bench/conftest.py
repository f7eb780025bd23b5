"""One torch thread: several would wait for each other whenever the machine does something else, and nothing here is
about speed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(same_start):
    torch.set_num_threads(1)
