"""What the bench trains: shapes, layouts, orders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from fastrunner.bench.workloads import DATA, LOADERS, MODELS, make_loader
from fastrunner.bench.workloads.models import Network
from fastrunner.data import Digits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("data", DATA)
def test_models_fit_the_data(name, data):
    spec = DATA[data]
    network = Network(MODELS[name](spec.channels, spec.size, 10))
    images = torch.randint(0, 256, (4, spec.channels, spec.size, spec.size), dtype=torch.uint8)
    scores = network(images)
    assert scores.shape == (4, 10)
    nn.functional.cross_entropy(scores, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_cnn_has_the_size_it_says():
    assert sum(p.numel() for p in MODELS["cnn"](3, 64, 10).parameters()) == 24_346
    assert "24,346" in (MODELS["cnn"].__doc__ or "")


def test_images_are_normalised():
    images = torch.tensor([0, 64, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    scores = Network(nn.Identity())(images)
    assert scores.flatten().tolist() == [-2.0, -1.0, 0.0, 127 / 64]


def test_layout_and_precision_change_the_body_not_the_result():
    torch.manual_seed(0)
    body = MODELS["cnn"](3, 64, 10).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    seen = []
    body[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output.dtype)))
    wanted = Network(body)(images)
    last = Network(body, channels_last=True)(images)
    assert seen[-1][0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[-1][0].is_contiguous()
    torch.testing.assert_close(last, wanted, rtol=1e-4, atol=1e-4)  # another order of summation
    half = Network(body, amp_dtype=torch.bfloat16)(images)
    assert seen[-1][1] == torch.bfloat16
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, rtol=0.1, atol=0.05)  # bfloat16 has 8 bits; three layers


def test_both_loaders_of_digits_give_the_same_batches():
    dataset = Digits("train")
    ours, torchs = (
        make_loader(dataset, name, batch_size=100, num_workers=0, train=True, seed=4) for name in DATA["digits"].loaders
    )
    assert len(ours) == len(torchs) == 14
    for one, other in zip(ours, torchs, strict=True):
        assert torch.equal(one["img"], other["img"])
        assert torch.equal(one["gt_label"], other["gt_label"])


def test_tables_agree():
    assert set(LOADERS) == {loader for data in DATA.values() for loader in data.loaders}
