"""Two processes on the CPU (gloo): shares of the data, averaged buffers, one writer, a stop that hangs nobody."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runner.helpers import TinyModel
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from fastrunner import (
    CheckpointHook,
    ClosureHook,
    DistEvalHook,
    EpochBasedRunner,
    FusedSGD,
    GradientCumulativeOptimizerHook,
    IterBasedRunner,
    build_dataloader,
)
from fastrunner.dist import allreduce_grads, allreduce_params
from fastrunner.model.parallel import MMDistributedDataParallel

WORLD_SIZE = 2


class WithNorm(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def train_step(self, data_batch, optimizer=None, **kwargs):
        return super().train_step(self.norm(data_batch))


def process(rank: int, folder: str) -> None:
    """What each rank does; it writes what it saw to ``<folder>/<rank>.json``."""
    os.chdir(folder)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=30))
    seen = {}

    data = [torch.full((2,), float(i)) for i in range(10)]
    torch.manual_seed(rank)  # rank 0's seed decides the order
    seen["share"] = [int(x) for batch in build_dataloader(data, 1, 0) for x in batch[:, 0]]

    values = [torch.full((3,), float(rank)), torch.tensor(7 + rank)]
    allreduce_params(values, bucket_size_mb=1)
    seen["mean"] = [values[0].tolist(), values[1].item()]
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.full((2,), 2.0 * rank)
    allreduce_grads([param, nn.Parameter(torch.zeros(1))], coalesce=False)
    seen["grad"] = param.grad.tolist()

    seen["evaluated"] = evaluate(rank, folder)
    seen["accumulated"] = accumulate(rank)
    torch.manual_seed(10 + rank)

    model = WithNorm()
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), work_dir="out", max_iters=10)
    runner.register_optimizer_hook({})
    runner.register_hook(CheckpointHook(interval=2, by_epoch=False, sync_buffer=True))
    runner.register_hook(ClosureHook("after_train_iter", lambda r: r.stop("enough") if r.iter == 3 else None), "LOWEST")
    batches = [torch.randn(4, 2) + rank for _ in range(3)]
    runner.run([batches], [("train", 1)])  # rank 0 has just saved when it stops: nobody may wait for it
    seen["running_mean"] = model.norm.running_mean.tolist()
    seen["iter"] = runner.iter

    expected = torch.rand(1).item()  # what comes after the checkpoint, which the stop has written
    dist.barrier()
    runner.resume("out/latest.pth")
    seen["own_random_state"] = torch.rand(1).item() == expected
    torch.manual_seed(100 + rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.makedirs("bare", exist_ok=True)
        if rank == 0:
            shutil.copy("out/iter_4.pth", "bare/iter_4.pth")
        dist.barrier()
        runner.resume("bare/iter_4.pth")
    seen["warned"] = [str(warning.message) for warning in caught]
    seen["random_after_bare"] = torch.rand(1).item()
    seen["expected"] = expected
    Path(f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def evaluate(rank: int, folder: str) -> dict:
    """DistEvalHook over five samples: rank 0 has 0, 2, 4, rank 1 has 1, 3 and the padding 0."""
    found = {}
    for gpu_collect in (False, True):
        data = DataLoader(Numbered(), batch_size=2, sampler=DistributedSampler(Numbered(), shuffle=False))
        model = WithNorm()
        model.norm.running_mean.fill_(float(rank))
        model.test_step = lambda batch: [[rank, int(x)] for x in batch[:, 0]]
        work_dir = f"eval_{gpu_collect}"
        runner = EpochBasedRunner(
            model, optimizer=FusedSGD(model.parameters(), lr=0.0), work_dir=work_dir, max_epochs=1
        )
        collected = []
        hook = DistEvalHook(
            data, save_best="acc", gpu_collect=gpu_collect, evaluate=lambda r, c=collected: c.append(r) or dict(acc=1.0)
        )
        runner.register_hook(hook, "LOW")
        runner.run([[torch.zeros(2, 2)]], [("train", 1)])
        found[str(gpu_collect)] = collected
        found[f"mean {gpu_collect}"] = model.norm.running_mean.tolist()
        dist.barrier()
        found[f"files {gpu_collect}"] = sorted(os.listdir(work_dir))
    return found


def accumulate(rank: int) -> dict:
    """Windows of two over three iterations, with and without no_sync, and resumed inside a window."""
    found: dict = {"weights": {}}
    for name, no_sync, resume in (("each", False, None), ("once", True, None), ("again", True, "once/iter_1.pth")):
        torch.manual_seed(1)
        model = MMDistributedDataParallel(TinyModel())
        optimizer = FusedSGD(model.parameters(), lr=0.1)
        runner = IterBasedRunner(model, optimizer=optimizer, work_dir=name, max_iters=3)
        runner.register_optimizer_hook(GradientCumulativeOptimizerHook(2, no_sync=no_sync))
        runner.register_hook(CheckpointHook(1, by_epoch=False))
        synced = []
        runner.register_hook(
            ClosureHook("after_train_iter", lambda r, s=synced: s.append(r.model.require_backward_grad_sync))
        )
        if resume:
            dist.barrier()
            runner.resume(resume)
        generator = torch.Generator().manual_seed(rank)
        runner.run([[torch.randn(4, 2, generator=generator) for _ in range(3)]], [("train", 1)])
        found["weights"][name] = [p.tolist() for p in model.parameters()]
        found[name] = [*synced, model.require_backward_grad_sync]
    return found


class Numbered:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(process, args=(folder,), nprocs=WORLD_SIZE)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)], folder


def test_each_rank_gets_its_share(ranks):
    (first, second), _ = ranks
    assert len(first["share"]) == len(second["share"]) == 5
    assert sorted(first["share"] + second["share"]) == list(range(10))


def test_means_over_ranks(ranks):
    for rank, seen in enumerate(ranks[0]):
        assert seen["mean"] == [[0.5] * 3, 7 + rank]  # a counter is nobody's mean
        assert seen["grad"] == [1.0, 1.0]


def test_one_writes_all_stop_and_buffers_agree(ranks):
    (first, second), folder = ranks
    assert first["iter"] == second["iter"] == 4
    assert first["running_mean"] == second["running_mean"]
    assert sorted(os.listdir(f"{folder}/out")) == ["iter_2.pth", "iter_4.pth", "latest.pth", "rng"]


def test_results_of_all_ranks_are_evaluated_in_the_order_of_the_data(ranks):
    (first, second), _ = ranks
    for gpu_collect in ("False", "True"):
        assert first["evaluated"][gpu_collect] == [[[0, 0], [1, 1], [0, 2], [1, 3], [0, 4]]]
        assert second["evaluated"][gpu_collect] == []
        assert first["evaluated"][f"mean {gpu_collect}"] == second["evaluated"][f"mean {gpu_collect}"]  # rank 0's
        assert first["evaluated"][f"files {gpu_collect}"] == ["best_acc_epoch_1.pth"]


def test_ranks_exchange_accumulated_gradients_once_a_window(ranks):
    (first, second), _ = ranks
    for seen in (first["accumulated"], second["accumulated"]):
        assert seen["each"] == [True] * 4
        assert seen["once"] == [False, True, True, True]  # the last window has one iteration; then as it was
        assert seen["again"] == [True, True, True]
    weights, others = first["accumulated"]["weights"], second["accumulated"]["weights"]
    assert weights == others
    assert weights["again"] == weights["once"]  # each rank has found its own gradients beside the checkpoint
    for once, each in zip(weights["once"], weights["each"], strict=True):
        # sums in another order: the last bits of float32
        torch.testing.assert_close(torch.tensor(once), torch.tensor(each), rtol=1e-6, atol=1e-7)


def test_every_rank_goes_on_with_its_own_random_state(ranks):
    (first, second), folder = ranks
    assert (first["own_random_state"], second["own_random_state"]) == (True, True)
    assert first["expected"] != second["expected"]
    assert sorted(os.listdir(f"{folder}/out/rng")) == ["iter_2.pth.rank1", "iter_4.pth.rank1"]


def test_a_rank_without_a_file_of_its_own_says_so_and_keeps_what_it_has(ranks):
    (first, second), _ = ranks
    assert first["warned"] == []
    assert "rank 1 has no random state of its own" in second["warned"][0]
    assert second["random_after_bare"] == torch.rand(1, generator=torch.Generator().manual_seed(101)).item()
