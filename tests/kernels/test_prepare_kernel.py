"""Norm, steps and bias corrections of one small program."""

from __future__ import annotations

import math

import pytest
import torch
from fastrunner.kernels.prepare import launch_prepare, prepare_reference
from kernel_tables import addresses, values

BETAS = (0.9, 0.999)
NUM = 70  # tensors: more than a block of 32


def adam_row(lr: float, betas: tuple[float, float]) -> list[float]:
    return [lr, 0.0, *betas, 1e-8, *(math.log(beta) if beta else -math.inf for beta in betas)]


class Prepared:
    def __init__(
        self, device: torch.device, *, found_inf: bool, skip: bool, betas: tuple[float, float] = BETAS
    ) -> None:
        self.before = [float(i * i) for i in range(NUM)]
        self.steps = [torch.tensor(step, device=device) for step in self.before]
        grads = [torch.zeros(1, device=device) if i % 3 else None for i in range(NUM)]
        groups = torch.tensor([i % 2 for i in range(NUM)], device=device)
        self.bias, self.scalars = torch.zeros(NUM, 2, device=device), torch.zeros(3, device=device)
        partials = torch.full((5,), math.inf if found_inf else 4.0, dtype=torch.float64, device=device)
        launch_prepare(
            self.scalars,
            addresses(grads, device),
            groups,
            values([adam_row(1e-3, betas), adam_row(0.1, betas)], device, max_norm=1.0),
            partials=partials,
            steps=addresses(self.steps, device),
            bias=self.bias,
            skip_nonfinite=skip,
            block=32,
        )


@pytest.mark.parametrize("betas", [BETAS, (0.0, 0.5)])
def test_steps_and_bias_corrections(device: torch.device, betas: tuple[float, float]) -> None:
    found = Prepared(device, found_inf=False, skip=True, betas=betas)
    for i, (before, step) in enumerate(zip(found.before, found.steps, strict=True)):
        if i % 3 == 0:
            assert step.item() == before
            continue
        ((after, step_size, denom_bias),) = prepare_reference([before], (1e-3, 0.1)[i % 2], betas)
        assert step.item() == after
        # In float64, then rounded once to float32.
        assert found.bias[i].tolist() == pytest.approx([step_size, denom_bias], rel=2**-23)
    norm, coef, found_inf = found.scalars.tolist()
    assert (norm, found_inf) == (pytest.approx(math.sqrt(20), rel=2**-23), 0.0)
    assert coef == pytest.approx(1 / (math.sqrt(20) + 1e-6), rel=2**-22)


@pytest.mark.parametrize("skip", [False, True])
def test_a_skipped_step_is_not_counted(device: torch.device, skip: bool) -> None:
    found = Prepared(device, found_inf=True, skip=skip)
    counted = [step.item() - before for before, step in zip(found.before, found.steps, strict=True)]
    assert counted == [0.0 if skip or i % 3 == 0 else 1.0 for i in range(NUM)]
    assert found.scalars.tolist() == [math.inf, 0.0, 1.0]


def test_skipping_wants_a_norm() -> None:
    scalars, none = torch.zeros(3), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="skip_nonfinite wants partials"):
        launch_prepare(scalars, none, none, values([], torch.device("cpu")), skip_nonfinite=True)
