"""The update as plain tensor operations against torch.optim, both in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastrunner.step.terms import AdamRule, SgdRule, average, clip_coefficient, norm_of

SGD = [
    dict(momentum=m, dampening=d, weight_decay=w, nesterov=n, maximize=x)
    for m, d, w, n, x in itertools.product((0, 0.9), (0, 0.3), (0, 0.1), (False, True), (False, True))
    if not n or (m and not d)
]
ADAM = [dict(weight_decay=w, betas=b, maximize=x) for w, b, x in itertools.product((0, 0.1), ((0.9, 0.999), (0.0, 0.5)), (False, True))]  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("kind", "rule", "options"),
    [(torch.optim.SGD, SgdRule, each) for each in SGD]
    + [(kind, AdamRule, each) for kind in (torch.optim.Adam, torch.optim.AdamW) for each in ADAM],
)
def test_updates_are_torchs(kind, rule, options):
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(5, dtype=torch.float64))
    ours = theirs.detach().clone()
    optimizer = kind([theirs], lr=0.1, **options)
    for step in range(1, 5):
        group = optimizer.param_groups[0]
        group["lr"] = 0.1 / step  # read from the row, not a constant
        mine = rule.of(group)
        state = [optimizer.state[theirs][key].clone() for key in mine.keys] if step > 1 else []
        theirs.grad = torch.randn(5, dtype=torch.float64)
        row = torch.tensor(mine.row(group, step), dtype=torch.float64)
        assert len(row) == mine.width
        optimizer.step()
        if step == 1:  # torch makes the state; a graph begins with what is there
            ours.copy_(theirs.detach())
            continue
        mine.apply(ours, theirs.grad, state, row)
        # float64's last bits, in another order of operations.
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)
        for key, tensor in zip(mine.keys, state, strict=True):
            torch.testing.assert_close(tensor, optimizer.state[theirs][key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_norm_and_clipping_are_torchs(max_norm):
    torch.manual_seed(0)
    grads = [torch.randn(shape) for shape in ((), (3,), (4, 5), (0,))]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    wanted = nn.utils.clip_grad_norm_(params, max_norm)
    norm = norm_of(grads)
    torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)  # float32 sums in another order
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(grad * clip_coefficient(norm, max_norm), param.grad, rtol=1e-6, atol=0)


def test_the_average_is_mmcvs():
    params, averages = [torch.randn(4)], [torch.randn(4)]
    wanted = averages[0] * (1 - 0.1) + 0.1 * params[0]
    average(averages, params, torch.tensor([0.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(averages[0], wanted, rtol=1e-6, atol=1e-7)
