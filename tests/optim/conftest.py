"""What several tests of optimizers use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrunner import _core


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this CPU has, in force."""
    monkeypatch.setenv("FASTRUNNER_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=["libtorch", "python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading tensors, in force: libtorch's own functions, and what Python offers."""
    monkeypatch.setenv("FASTRUNNER_HANDLES", "on" if request.param == "libtorch" else "off")
    return str(request.param)


@pytest.fixture
def nearest_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's square root on the CPU is MKL's, one ulp off for every fifth value; numpy's is the nearest float."""
    monkeypatch.setattr(Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
