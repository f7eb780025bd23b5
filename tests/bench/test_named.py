"""The comparison's workloads: shapes, counts against the papers', learning, factories and configs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastrunner.bench.workloads.named import NAMED, Workload, WorkloadError, find
from fastrunner.bench.workloads.networks import GPT, ViT, resnet18
from fastrunner.bench.workloads.text import Bytes, library_bytes

LIGHT = ["toy", "mlp", "digits-cnn", "gpt-nano"]


@pytest.mark.parametrize("name", LIGHT)
def test_it_trains(name):
    """The loss of one batch falls when that batch is trained on."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    workload = find(name)
    torch.manual_seed(0)
    model, (batch, *_) = workload.make_model(), workload.make_batches(2, 0)
    assert len(batch["img"]) == workload.batch_size
    options = dict(workload.optimizer)
    optimizer = getattr(torch.optim, options.pop("type"))(model.parameters(), **options)
    losses = []
    for _ in range(8):
        outputs = model.train_step(batch, optimizer)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        losses.append(outputs["loss"].item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["mlp", "gpt-nano"])
def test_same_seed_same_batches(name):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    first, again, other = (find(name).make_batches(2, seed) for seed in (0, 0, 1))
    assert torch.equal(first[1]["img"], again[1]["img"])
    assert not torch.equal(first[0]["img"], other[0]["img"])


def test_resnet18():
    """11,689,512 parameters with 1,000 classes (torchvision's count); a 7 x 7 stem for large images."""
    large = resnet18(3, 224, 1000)
    assert sum(p.numel() for p in large.parameters()) == 11_689_512
    small = resnet18(3, 32, 10)
    assert small(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_gpt_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(11, 7, width=8, depth=2, heads=2).eval()
    ids = torch.randint(11, (1, 7))
    changed = ids.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 11
    before, after = model(ids), model(changed)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])
    assert model.head.weight is model.token.weight


def test_vit_looks_everywhere():
    torch.manual_seed(0)
    model = ViT(3, 16, 5, patch=8, width=8, depth=1, heads=2).eval()
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    scores = model(x)
    assert scores.shape == (1, 5)
    scores.sum().backward()
    assert bool((x.grad != 0).flatten(2).any(2).all())


def test_text_is_pythons_own():
    text = library_bytes()
    assert 1 << 16 < len(text) <= 8 << 20
    assert bytes(text[:200].tolist()).isascii()
    dataset = Bytes(16)
    sample = dataset[3]
    assert torch.equal(sample["img"][1:], sample["gt_label"][:-1])
    assert torch.equal(sample["gt_label"], dataset.text[49:65].long())
    assert dataset[len(dataset) - 1]["gt_label"].shape == (16,)


def test_a_factory(monkeypatch, tmp_path):
    Path("mine.py").write_text(
        "from fastrunner.bench.workloads.named import toy\n"
        "def as_workload():\n    return toy()\n"
        "def as_dict():\n    made = toy()\n"
        "    return dict(make_model=made.make_model, make_batches=made.make_batches, \n"
        "                optimizer=dict(type='SGD', lr=1))\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert isinstance(find("mine:as_workload"), Workload)
    assert find("mine:as_dict").optimizer == {"type": "SGD", "lr": 1}
    with pytest.raises(WorkloadError, match="mine:other does not load: AttributeError"):
        find("mine:other")


def test_a_config():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    workload = find(str(Path(__file__).parents[2] / "examples" / "digits_epoch.py"))
    batches = workload.make_batches(3, 0)
    assert len(batches) == 3
    assert len(batches[0]["img"]) == workload.batch_size
    assert not workload.optimizer["type"].startswith("Fused")
    assert hasattr(workload.make_model(), "train_step")


def test_unknown():
    with pytest.raises(WorkloadError, match=f"choose from {', '.join(NAMED)}, or name a factory"):
        find("cifar")
