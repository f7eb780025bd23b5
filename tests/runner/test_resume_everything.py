"""A run with everything at once that is resumed anywhere ends as the one that was not interrupted, bit for bit.

Weights, averages, optimizer state, loss scale, accumulated gradients, lr and momentum, random numbers (dropout), the
order of samples, best score and its file, counters. Four batches an epoch, windows of three, evaluation every two.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastrunner import (
    ClosureHook,
    EMAHook,
    EpochBasedRunner,
    EvalHook,
    FusedSGD,
    IterBasedRunner,
    build_dataloader,
    supervised,
)

KINDS = [EpochBasedRunner, IterBasedRunner]
SAMPLES = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
TARGETS = SAMPLES[:, 0] * 2 - SAMPLES[:, 1]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, 0] - target).square().mean()


def make(kind, work_dir, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.ReLU(), nn.Linear(8, 1))
    model = supervised(net, loss_of)
    limit = dict(max_epochs=3) if kind is EpochBasedRunner else dict(max_iters=12)
    optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    runner = kind(model, optimizer=optimizer, work_dir=work_dir, **limit)
    runner.register_training_hooks(
        dict(policy="CosineAnnealing", min_lr=0.0, by_epoch=False, warmup="linear", warmup_iters=5),
        dict(
            type="GradientCumulativeFp16OptimizerHook",
            cumulative_iters=3,
            grad_clip=dict(max_norm=1.0),
            loss_scale=dict(init_scale=2.0**17, growth_interval=2),  # the first updates overflow
        ),
        dict(interval=1, by_epoch=False),
        dict(interval=2, hooks=[dict(type="TextLoggerHook", by_epoch=False)]),
        dict(policy="CosineAnnealing", min_momentum=0.8, by_epoch=False),
    )
    runner.register_hook(EMAHook(momentum=0.1, warm_up=3), "NORMAL")  # behind CheckpointHook, as in the four steps
    loader = build_dataloader(list(zip(SAMPLES, TARGETS, strict=True)), 4, 0, shuffle=False)
    runner.register_hook(EvalHook(loader, interval=2, by_epoch=False, save_best="error", rule="less", evaluate=error),
                         "LOW")  # fmt: skip
    return runner


def error(results):
    return dict(error=(torch.stack(results)[:, 0] - TARGETS).abs().mean().item())


def go(runner):
    train = build_dataloader(list(zip(SAMPLES, TARGETS, strict=True)), 2, 0, seed=3)
    val = build_dataloader(list(zip(SAMPLES, TARGETS, strict=True)), 4, 0, shuffle=False)
    runner.run([train, val], [("train", 1), ("val", 1)])
    (scaler,) = (hook.loss_scaler for hook in runner.hooks if hasattr(hook, "loss_scaler"))
    best = runner.meta["hook_msgs"]["best_ckpt"]
    return dict(
        weights={name: value.tolist() for name, value in runner.model.state_dict().items()},
        optimizer=[
            {key: value.tolist() if isinstance(value, Tensor) else value for key, value in slot.items()}
            for slot in runner.optimizer.state_dict()["state"].values()
        ],
        lr=runner.current_lr(),
        momentum=runner.current_momentum(),
        scaler=scaler.state_dict(),
        counters=(runner.epoch, runner.iter),
        best=(runner.meta["hook_msgs"]["best_score"], Path(best).name),
        draws=torch.rand(3).tolist(),
    )


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    return request.param, folder, go(make(request.param, str(folder), seed=0))


def test_the_run_is_worth_comparing(whole):
    _, _, expected = whole
    assert expected["counters"][1] == 12
    assert expected["scaler"]["scale"] not in (2.0**17, 2.0**16)  # it has overflowed, and moved since
    assert any(slot for slot in expected["optimizer"])


@pytest.mark.parametrize("at", range(1, 12))
def test_a_resume_anywhere_is_exact(whole, at):
    kind, folder, expected = whole
    again = make(kind, "again", seed=99)
    again.resume(f"{folder}/iter_{at}.pth")
    assert go(again) == expected


@pytest.mark.parametrize("at", [3, 7])
def test_a_stop_and_a_second_run_are_exact(whole, at):
    kind, _, expected = whole
    runner = make(kind, "stopped", seed=0)

    def stop(runner):
        if runner.iter + 1 == at:
            runner.stop("a signal")

    runner.register_hook(ClosureHook("after_train_iter", stop), "LOWEST")
    train = build_dataloader(list(zip(SAMPLES, TARGETS, strict=True)), 2, 0, seed=3)
    val = build_dataloader(list(zip(SAMPLES, TARGETS, strict=True)), 4, 0, shuffle=False)
    runner.run([train, val], [("train", 1), ("val", 1)])
    assert runner.iter == at
    random_state = torch.get_rng_state()
    resumed = make(kind, "resumed", seed=99)
    resumed.resume("stopped/latest.pth")
    assert go(resumed) == expected
    torch.set_rng_state(random_state)  # the other run was in this process too
    assert go(runner) == expected
