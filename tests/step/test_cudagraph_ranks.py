"""Recipe ``cudagraph`` under MMDistributedDataParallel: two processes (gloo), each with the CPU stand-in."""

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
from torch.nn import functional as F

from fastrunner import Hook, IterBasedRunner, MMDistributedDataParallel, init_dist
from fastrunner.step import capture
from fastrunner.step.graph_stand_in import StandIn
from fastrunner.step.torch_private import Unfit

WORLD_SIZE, ITERS = 2, 26


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = F.cross_entropy(self.body(batch["x"]), batch["y"])
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["y"]))


class Losses(Hook):
    def after_run(self, runner):
        self.losses = runner.log_buffer.val_history["loss"]


def batch_of(rank, number, size):
    g = torch.Generator().manual_seed(100 * rank + number)
    return dict(x=torch.randn(size, 6, generator=g), y=torch.randint(0, 3, (size,), generator=g))


def run(rank, recipe, sizes, backend):
    capture.backend_for = lambda device: backend
    torch.manual_seed(0)
    model = MMDistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=len(sizes), work_dir=f"out{rank}", step=recipe)
    runner.register_training_hooks(dict(policy="fixed"), dict(grad_clip=dict(max_norm=0.5)))
    losses = Losses()
    runner.register_hook(losses)
    runner.run([[batch_of(rank, number, size) for number, size in enumerate(sizes)]], [("train", 1)])
    weights = torch.cat([param.detach().flatten() for param in model.parameters()]).tolist()
    means = model.module.body[1].running_mean.tolist()
    return dict(losses=losses.losses, weights=weights, means=means, explain=runner.step.explain())


def process(rank, folder, port):
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_dist("pytorch", backend="gloo")
    same, tail = [4] * ITERS, [4, 4, 4, 4, 3] * 5
    apart = [4 if rank == 0 or number % 2 else 5 for number in range(ITERS)]
    seen = {}
    for name, sizes in (("same", same), ("tail", tail), ("apart", apart)):
        backend = StandIn()
        seen[name] = run(rank, "cudagraph", sizes, backend)
        seen[name]["replays"] = backend.num_replays
        seen[name + " eager"] = run(rank, "eager", sizes, backend)
    short = StandIn(free=2**40 if rank == 0 else 10)
    seen["short"] = {**run(rank, "cudagraph", same, short), "replays": short.num_replays}
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


@pytest.mark.parametrize("name", ["same", "tail"])
def test_replays_with_the_exchange_in_them_train_as_ddp_does(name, ranks):
    for rank in ranks:
        assert rank[name]["replays"] > 2, rank[name]["explain"]
        # the same two numbers are added: DDP and we divide first
        assert rank[name]["losses"] == pytest.approx(rank[name + " eager"]["losses"], rel=1e-5)
        assert rank[name]["weights"] == pytest.approx(rank[name + " eager"]["weights"], rel=1e-4, abs=1e-6)
        assert rank[name]["means"] == pytest.approx(rank[name + " eager"]["means"], rel=1e-4, abs=1e-6)
    assert ranks[0][name]["weights"] == ranks[1][name]["weights"]


def test_ranks_with_other_shapes_never_agree(ranks):
    for rank in ranks:
        assert rank["apart"]["replays"] == 0
        assert rank["apart"]["losses"] == pytest.approx(rank["apart eager"]["losses"], rel=1e-6)


def test_what_one_rank_cannot_capture_none_replays_and_each_says_why(ranks):
    first, second = (rank["short"] for rank in ranks)
    assert first["replays"] == second["replays"] == 0
    assert "another rank cannot capture this step" in first["explain"][-1]
    assert "memory is short" in second["explain"][-1]
    assert first["weights"] == second["weights"]


def test_exchanges_that_cannot_be_captured_are_a_reason(monkeypatch):
    monkeypatch.setattr(capture.distributed, "get_backend", lambda group: "gloo")
    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.process_group = None
    with pytest.raises(Unfit, match="by gloo, which cannot be captured; nccl can"):
        capture.inside(wrapped, "nccl")


def test_buckets_hold_one_dtype_and_a_bounded_size(monkeypatch):
    monkeypatch.setattr(capture, "BUCKET_BYTES", 100)
    tensors = [torch.zeros(n, dtype=kind) for n in (10, 20, 5, 40) for kind in (torch.float32, torch.float64)]
    buckets = capture._buckets(tensors)
    assert sorted(id(each) for bucket in buckets for each in bucket) == sorted(map(id, tensors))
    for bucket in buckets:
        assert len({each.dtype for each in bucket}) == 1
        assert sum(each.numel() * each.element_size() for each in bucket[:-1]) < 100
