"""supervised(): MMCV's contract around a plain module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrunner import supervised


@pytest.fixture
def model():
    torch.manual_seed(0)
    return supervised(nn.Linear(3, 4), nn.CrossEntropyLoss())


@pytest.mark.parametrize("as_dict", [True, False])
def test_train_step(model, as_dict):
    inputs, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    out = model.train_step(dict(img=inputs, gt_label=target) if as_dict else (inputs, target), None)
    scores = inputs.double() @ model.model.weight.double().T + model.model.bias.double()
    expected = -scores.log_softmax(1)[torch.arange(5), target].mean()
    # float32 against float64
    torch.testing.assert_close(out["loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert out["loss"].requires_grad
    assert not out["log_vars"]["loss"].requires_grad
    assert out["log_vars"]["acc"].item() == pytest.approx((scores.argmax(1) == target).sum().item() / 5)
    assert out["num_samples"] == 5


def test_val_step_makes_no_graph(model):
    assert not model.val_step((torch.randn(2, 3), torch.tensor([0, 1])))["loss"].requires_grad


def test_regression_has_no_accuracy():
    model = supervised(nn.Linear(3, 1), nn.MSELoss(), keys=("x", "y"))
    out = model.train_step(dict(x=torch.randn(2, 3), y=torch.randn(2, 1)))
    assert list(out["log_vars"]) == ["loss"]


@pytest.mark.parametrize("batch", [dict(image=1, label=2), torch.zeros(2), (1, 2, 3)])
def test_other_batches_are_refused_with_the_remedy(model, batch):
    with pytest.raises(TypeError, match=r"pairs or dicts with \('img', 'gt_label'\).*keys=\(inputs, target\)"):
        model.train_step(batch)
