"""The fixtures of conftest.py do what the other tests rely on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uninitialised_floats_are_nan(dtype: torch.dtype) -> None:
    ones = torch.ones(5, dtype=dtype)
    for tensor in (torch.empty(5, dtype=dtype), torch.empty_like(ones), ones.new_empty(5)):
        assert tensor.isnan().all()


def test_uninitialised_integers_are_their_maximum() -> None:
    assert (torch.empty(5, dtype=torch.uint8) == 255).all()


def test_folder_is_empty_and_the_tests_own(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


def test_runs_as_a_single_process_with_one_thread() -> None:
    assert "RANK" not in os.environ
    assert torch.get_num_threads() == 1
