"""MMDataParallel in one process, MMDistributedDataParallel in two (gloo): train_step and val_step through both."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastrunner import (
    DataContainer,
    IterBasedRunner,
    MMDataParallel,
    MMDistributedDataParallel,
    collate,
    get_state_dict,
    init_dist,
    is_module_wrapper,
)

WORLD_SIZE = 2


class Detector(nn.Module):
    """As OpenMMLab writes them: train_step calls the module itself, batches hold DataContainers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)
        self.unused = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.calls = []

    def forward(self, img, img_metas, return_loss=True):
        self.calls.append(("forward", type(img).__name__, [meta["name"] for meta in img_metas]))
        return self.fc(self.norm(img)).square().mean()

    def train_step(self, data, optimizer, **kwargs):
        self.calls.append(("train_step", type(optimizer).__name__, sorted(kwargs)))
        loss = self(**data)
        return dict(loss=loss, log_vars=dict(loss=loss.item()), num_samples=len(data["img"]))

    def val_step(self, data, optimizer=None, **kwargs):
        self.calls.append(("val_step", type(optimizer).__name__, sorted(kwargs)))
        return dict(loss=self(**data), num_samples=1)


def batch_of(*rows):
    samples = [
        dict(
            img=DataContainer(torch.tensor(row), stack=True, pad_dims=1),
            img_metas=DataContainer(dict(name=f"{i}"), cpu_only=True),
        )
        for i, row in enumerate(rows)
    ]
    return collate(samples, samples_per_gpu=len(rows))


def test_one_process_on_the_cpu():
    model = MMDataParallel(Detector(), device_ids=[0])  # where there is no GPU, as in MMCV, the CPU
    assert is_module_wrapper(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=2)
    runner.register_optimizer_hook({})
    before = model.module.fc.weight.clone()
    runner.run([[batch_of([1.0, 2.0], [3.0, 5.0])], [batch_of([1.0, 2.0])]], [("train", 1), ("val", 1)])
    assert not torch.equal(model.module.fc.weight, before)
    assert model.module.calls[:4] == [
        ("train_step", "SGD", []),
        ("forward", "Tensor", ["0", "1"]),
        ("val_step", "NoneType", []),  # as MMCV's iteration runner calls it
        ("forward", "Tensor", ["0"]),
    ]
    assert model(**batch_of([1.0, 2.0], [3.0, 5.0])).shape == ()
    assert "fc.weight" in get_state_dict(model)


def test_several_devices_are_sent_to_torchrun():
    model = MMDataParallel(Detector())
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"MMDataParallel trains on one device.*torchrun.*MMDistributedDataParallel"):
        model.train_step(batch_of([1.0, 2.0]), None)


@pytest.mark.cuda
def test_one_process_on_a_gpu():
    model = MMDataParallel(Detector(), device_ids=[0])
    outputs = model.train_step(batch_of([1.0, 2.0], [3.0, 5.0]), None)
    assert outputs["loss"].is_cuda
    assert MMDataParallel(model.module).device_ids == [0]
    assert (
        MMDataParallel(Detector(), device_ids=[-1]).train_step(batch_of([1.0, 2.0]), None)["loss"].device.type == "cpu"
    )


# ---------------------------------------------------------------- two processes


def process(rank: int, folder: str, port: int) -> None:
    """What each rank does; it writes what it saw to ``<folder>/<rank>.json``."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    init_dist("pytorch", backend="gloo")
    torch.manual_seed(rank)  # DDP starts all ranks from rank 0's weights
    inner = Detector()
    model = MMDistributedDataParallel(inner, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict[str, object] = dict(start=inner.fc.weight.tolist())
    batch = batch_of([1.0 + rank, 2.0], [3.0, 5.0 * rank])
    own = model.train_step(batch, optimizer, tag=1)["loss"]
    own.backward()
    seen["grad"] = inner.fc.weight.grad.tolist()
    seen["unused"] = inner.unused.weight.grad is None or inner.unused.weight.grad.eq(0).all().item()

    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=3, work_dir="out")
    runner.register_optimizer_hook({})
    runner.run([[batch], [batch]], [("train", 1), ("val", 1)])
    seen["weights"] = inner.fc.weight.tolist()
    seen["calls"] = [call[0] for call in inner.calls]
    with torch.no_grad():
        model(**batch)
    seen["forward"] = inner.calls[-1][:2]
    Path(f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(process, args=(folder, port), nprocs=WORLD_SIZE)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def test_gradients_are_the_mean_over_ranks(ranks):
    first, second = ranks
    assert first["start"] == second["start"]
    assert first["grad"] == second["grad"]
    torch.manual_seed(0)  # rank 0's weights
    model = Detector()
    for rank in range(WORLD_SIZE):  # in one process: the mean of both losses
        batch = {key: value.data[0] for key, value in batch_of([1.0 + rank, 2.0], [3.0, 5.0 * rank]).items()}
        (model.train_step(batch, None)["loss"] / WORLD_SIZE).backward()
    # float32; the two losses are divided before or after the sum
    torch.testing.assert_close(torch.tensor(first["grad"]), model.fc.weight.grad, rtol=1e-6, atol=0)


def test_ranks_stay_in_step_through_a_runner(ranks):
    first, second = ranks
    assert first["weights"] == second["weights"] != first["start"]
    assert first["unused"]
    assert first["calls"] == ["train_step", "forward"] * 2 + ["val_step", "forward", "train_step", "forward"] * 2 + [
        "val_step",
        "forward",
    ]
    assert first["forward"] == ["forward", "Tensor"]
