"""Recipe ``cudagraph`` on a real GPU: numerics, no host waits, memory, loaders in other streams, ranks.

What it does around captures is in test_cudagraph.py, on a stand-in. Complete, and never run on a GPU so far.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from step.captured_runs import captured_of
from step.runs import LossHook, make, state_of, train
from step.test_cudagraph import BELOW, FIRST, Net, Steps, adamw, plain, sgd
from step.test_window import HALF, run
from step.zoo import ZOO, Model, vectors
from torch.nn import functional as F

from fastrunner import (
    Fp16OptimizerHook,
    FusedAdamW,
    FusedSGD,
    GradientCumulativeFp16OptimizerHook,
    GradientCumulativeOptimizerHook,
    IterBasedRunner,
    MMDataParallel,
    MMDistributedDataParallel,
    init_dist,
)
from fastrunner.step import capture
from fastrunner.step.graph_backend import Cost, CudaBackend, shared

pytestmark = pytest.mark.cuda

MLP = ZOO["mlp"]
MIB = 2**20


class Always(CudaBackend):
    """Captures whatever it would gain: tiny models on a fast host may not wait."""

    def measure(self, iteration, expected_s):
        cost = super().measure(iteration, expected_s)
        assert cost.host > 0
        assert cost.device > 0
        return Cost(1.0, 0.1)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.setattr(capture, "backend_for", Always)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.cuda.set_sync_debug_mode("default")


def there(family):
    """The family on the GPU, its batches too."""
    return replace(
        family,
        model=lambda: family.model().cuda(),
        batch=lambda *args: {name: tensor.cuda() for name, tensor in family.batch(*args).items()},
    )


def seeded(family, recipe, iters, **options):
    torch.cuda.manual_seed(5)
    return train(there(family), recipe, iters, **options)


@pytest.mark.parametrize("name", ZOO)
def test_replays_train_as_eager_does(name):
    family, iters = ZOO[name], FIRST + 8
    runner, losses = seeded(family, "cudagraph", iters, ema=2 if name == "tied" else None)
    drawn = torch.cuda.get_rng_state()
    eager, wanted = seeded(family, "eager", iters, ema=2 if name == "tied" else None)
    step = captured_of(runner)
    if name in BELOW:
        assert step.num_calls == 0
    else:
        assert step.num_calls > 0, step.explain()
    # The same kernels; embeddings' gradients are summed with atomics, in any order.
    assert losses == pytest.approx(wanted, rel=max(family.rtol, 1e-4))
    assert torch.equal(drawn, torch.cuda.get_rng_state())
    ours, theirs = state_of(runner), state_of(eager)
    for key, value in theirs.items():
        if "num_batches" in key or key.endswith(" step"):
            assert torch.equal(ours[key].cpu(), value.cpu())


@pytest.mark.parametrize("optimizer", [lambda p: FusedSGD(p, lr=0.1, momentum=0.9), lambda p: FusedAdamW(p, lr=1e-2)])
def test_the_packages_own_optimizers_go_on_where_replays_stop_and_back(optimizer):
    """Their kernels update the iterations below; state and counters are the same tensors."""
    pytest.importorskip("triton")
    family, iters = replace(MLP, model=Net, optimizer=optimizer, clip=0.5), 3 * FIRST
    sizes = [4 if number < 2 * FIRST else 4 + number % 2 for number in range(iters)]
    batches = [{k: v.cuda() for k, v in vectors(number, size).items()} for number, size in enumerate(sizes)]
    runner, losses = seeded(family, "cudagraph", iters, batches=batches)
    assert captured_of(runner).num_calls > 0
    assert losses == pytest.approx(seeded(family, "eager", iters, batches=batches)[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("captures", ["compile", "graph"])
def test_compiled_and_traced_iterations_are_captured(captures, inductor_cache):
    step = dict(recipe="cudagraph", captures=captures)
    runner, losses = seeded(replace(MLP, model=Net), None, FIRST + 8, step=step)
    assert captured_of(runner).num_calls > 0, captured_of(runner).explain()
    assert losses == pytest.approx(seeded(replace(MLP, model=Net), "eager", FIRST + 8)[1], rel=1e-3)


@pytest.mark.parametrize("optimizer", [sgd, adamw, lambda p: FusedAdamW(p, lr=1e-2, skip_nonfinite=True)])
def test_the_host_never_waits(optimizer):
    """A replay with another lr each time, an average, and a clipped norm."""
    family = there(replace(MLP, model=Net, optimizer=optimizer, clip=0.5))
    runner, _ = make(family, "cudagraph", 10**6, ema=1)
    runner._max_iters = FIRST + 3
    batches = [family.batch(number) for number in range(4)]
    runner.run([batches], [("train", 1)])
    step = captured_of(runner)
    replays, norms = step.num_calls, []
    assert replays > 0
    assert step(batches[0], runner.iter) is not None  # whatever the end of the run has left to look at
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for number in range(5):
        for group in runner.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        done = step(batches[number % 4], runner.iter + 1 + number)
        assert done is not None
        norms.append(done[1])
    torch.cuda.set_sync_debug_mode("default")
    assert len({norm.item() for norm in norms}) == 5  # each replay's own


def test_a_replay_has_the_options_that_were_there_when_it_was_queued():
    """The host is far ahead of the device, and writes the next lr while no replay has begun."""
    model = lambda: Model(torch.nn.Linear(16, 10))  # noqa: E731
    family = there(replace(MLP, model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), clip=None))
    runner, _ = make(family, "cudagraph", 10**6)
    runner._max_iters = FIRST + 2
    batch = family.batch(0)
    runner.run([[batch]], [("train", 1)])
    step, weight = captured_of(runner), runner.model.body.weight
    assert step(batch, runner.iter) is not None
    before = weight.detach().clone()
    (gradient,) = torch.autograd.grad(runner.model.train_step(batch)["loss"], weight)
    torch.cuda._sleep(10**9)
    for lr in (0.0, 0.0, 0.5, 0.0):
        runner.optimizer.param_groups[0]["lr"] = lr
        assert step(batch, runner.iter) is not None
    torch.testing.assert_close(before - weight.detach(), 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_on_the_device():
    family = there(replace(MLP, model=Net, optimizer=lambda p: FusedSGD(p, lr=0.1, skip_nonfinite=True), clip=None))
    runner, _ = make(family, "cudagraph", 10**6)
    runner._max_iters = FIRST + 2
    batches = [family.batch(number) for number in range(4)]
    runner.run([batches], [("train", 1)])
    step = captured_of(runner)
    assert step(batches[0], runner.iter) is not None
    before = [p.detach().clone() for p in runner.model.parameters()]
    bad = {**batches[1], "x": torch.full_like(batches[1]["x"], float("inf"))}
    assert step(bad, runner.iter) is not None
    assert all(torch.equal(p, q) for p, q in zip(runner.model.parameters(), before, strict=True))
    assert step(batches[2], runner.iter) is not None


@pytest.mark.parametrize(
    "hook",
    [
        lambda: GradientCumulativeOptimizerHook(3, grad_clip=dict(max_norm=0.5)),
        lambda: Fp16OptimizerHook(dict(max_norm=0.5), loss_scale=dict(init_scale=256.0, growth_interval=3)),
        lambda: GradientCumulativeFp16OptimizerHook(2, loss_scale="dynamic"),
    ],
    ids=["accumulation", "loss scale", "both"],
)
def test_windows_and_loss_scales_as_below(hook):
    family = there(HALF)
    ours, mine = run(family, "cudagraph", hook(), iters=40)
    _, theirs = run(family, "eager", hook(), iters=40)
    assert captured_of(ours).num_calls > 8, captured_of(ours).explain()
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-2)  # float16
    assert (mine.norms is None) == (theirs.norms is None)


def test_graphs_of_several_shapes_share_a_pool():
    family = there(replace(ZOO["resnet"], clip=None))
    sizes = [size for size in (64, 48, 32, 16) for _ in range(12)]
    batches = [family.batch(number, size) for number, size in enumerate(sizes)]
    runner, _ = train(family, "cudagraph", len(sizes), batches)
    graphs = captured_of(runner).graphs
    assert len(graphs) == 4
    assert sum(graph.num_bytes for graph in graphs[1:]) <= graphs[0].num_bytes + 8 * MIB
    assert any("CUDA graphs with" in line for line in captured_of(runner).explain())


def test_memory_does_not_grow_with_replays():
    family = there(replace(MLP, model=Net))
    runner, _ = make(family, "cudagraph", 10**6)
    batches = [family.batch(number) for number in range(4)]
    runner._max_iters = FIRST + 20
    runner.run([batches], [("train", 1)])
    step = captured_of(runner)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for number in range(1000):
        assert step(batches[number % 4], number) is not None
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + MIB


def test_a_dropped_graph_gives_its_memory_back():
    family = there(replace(ZOO["resnet"], clip=None))
    runner, _ = train(family, "cudagraph", FIRST + 3, [family.batch(number, 64) for number in range(4)])
    step = captured_of(runner)
    (graph,) = step.graphs
    assert step._drop()
    del graph
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert step.graphs == []
    assert step._drop() is False


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_that_another_stream_brings_are_seen_whole(pinned):
    """A loader's thread pins memory and copies in a stream of its own while replays run and a capture is made."""
    family = there(replace(MLP, model=Net))
    host = [vectors(number, 256) for number in range(2 * FIRST)]
    stream = torch.cuda.Stream()

    def batches():
        for batch in host:
            with torch.cuda.stream(stream):
                moved = {k: (v.pin_memory() if pinned else v).cuda(non_blocking=True) for k, v in batch.items()}
            torch.cuda.current_stream().wait_stream(stream)
            for tensor in moved.values():
                tensor.record_stream(torch.cuda.current_stream())
            yield moved

    class Loader:
        def __len__(self):
            return len(host)

        def __iter__(self):
            return batches()

    def trained(recipe):
        torch.cuda.manual_seed(5)
        runner, losses = make(family, recipe, len(host))
        runner.run([Loader()], [("train", 1)])
        return runner, losses.losses

    runner, losses = trained("cudagraph")
    assert captured_of(runner).num_calls > 0
    assert losses == pytest.approx(trained("eager")[1], rel=1e-3)


def test_a_capture_does_not_mind_threads_that_pin_memory():
    from torch.utils.data import DataLoader

    data = [dict(x=vectors(number)["x"][0], y=vectors(number)["y"][0]) for number in range(8 * 2 * FIRST)]
    torch.manual_seed(0)
    model = MMDataParallel(Net().cuda(), device_ids=[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(data, batch_size=8, num_workers=1, pin_memory=True)
    runner = IterBasedRunner(model, optimizer=optimizer, max_iters=2 * FIRST, work_dir="out", step="cudagraph")
    runner.register_training_hooks(dict(policy="fixed"), dict(grad_clip=None))
    runner.run([loader], [("train", 1)])
    assert captured_of(runner).num_calls > 0, captured_of(runner).explain()


@pytest.mark.parametrize(
    "body",
    [
        lambda model, batch: plain(model, batch) * (1 + plain(model, batch).item()),
        lambda model, batch: plain(model, batch) * torch.tensor([1.0, 1.0], device="cuda").sum(),
        lambda model, batch: F.cross_entropy(
            model.layer(batch["x"][batch["x"][:, 0] > 9]).sum(0)[None], batch["y"][:1]
        ),
    ],
)
def test_what_cannot_be_captured_leaves_the_gpu_usable_and_the_run_goes_on(body, caplog):
    class There(Steps):
        def __init__(self):
            super().__init__(body)
            self.scale = self.scale.cuda()
            self.generator = None

    family = replace(MLP, model=There, clip=None)
    runner, losses = seeded(family, "cudagraph", FIRST + 4)
    assert captured_of(runner).num_calls == 0
    assert len([r for r in caplog.records if "no CUDA graph" in r.getMessage()]) == 1
    assert losses == pytest.approx(seeded(family, "eager", FIRST + 4)[1], rel=1e-4)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert (
        torch.rand(3, device="cuda").dropout(0.5, True).isfinite().all() if hasattr(torch.Tensor, "dropout") else True
    )


def test_a_measured_cost_tells_a_busy_device_from_a_waiting_one():
    backend, x = CudaBackend(torch.device("cuda")), torch.randn(4096, 4096, device="cuda")
    small = torch.zeros(8, device="cuda")

    def busy():
        y = x
        for _ in range(5):
            y = y @ x

    def waiting():
        for _ in range(300):
            small.add_(1)

    for _ in range(3):
        busy()
        waiting()
    assert backend.measure(busy, 1e-2).launch_bound < 0.5
    assert backend.measure(waiting, 1e-2).launch_bound > 0.2


def test_there_is_one_pool_and_one_side_stream_a_gpu():
    first, second = CudaBackend(torch.device("cuda")), CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    assert first._stream is second._stream
    assert first._pool == second._pool
    assert shared(torch.device("cuda"))[0] is first._stream
    assert first._stream != torch.cuda.default_stream()


# ---------------------------------------------------------------- one GPU a rank


def process(rank, folder, port, world_size):
    os.chdir(folder)
    capture.backend_for = Always
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_dist("pytorch", backend="nccl")
    seen = {}
    for recipe in ("cudagraph", "eager"):
        torch.manual_seed(0)
        torch.cuda.manual_seed(rank)
        model = MMDistributedDataParallel(Net().cuda(), device_ids=[rank])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        runner = IterBasedRunner(model, optimizer=optimizer, max_iters=30, work_dir=f"out{rank}", step=recipe)
        runner.register_training_hooks(dict(policy="fixed"), dict(grad_clip=dict(max_norm=0.5)))
        losses = LossHook()
        runner.register_hook(losses)
        runner.run([[vectors(100 * rank + number) for number in range(30)]], [("train", 1)])
        calls = captured_of(runner).num_calls if recipe == "cudagraph" else 0
        seen[recipe] = dict(losses=losses.losses, calls=calls, explain=runner.step.explain())
        seen[recipe]["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    Path(f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()  # the graphs, with collectives in them, are gone by now


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_replay_their_exchange(world_size, tmp_path):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(process, args=(str(tmp_path), port, world_size), nprocs=world_size)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    for rank in ranks:
        assert rank["cudagraph"]["calls"] > 0, rank["cudagraph"]["explain"]
        assert rank["cudagraph"]["losses"] == pytest.approx(rank["eager"]["losses"], rel=1e-3)
        assert rank["cudagraph"]["weights"] == ranks[0]["cudagraph"]["weights"]
