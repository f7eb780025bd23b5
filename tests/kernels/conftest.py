"""Where kernels run: on the GPU if there is one, else interpreted, on CPU tensors."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Triton's interpreter divides lanes that are masked off, too.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"))
