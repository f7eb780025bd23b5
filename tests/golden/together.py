"""All hooks at once: who is called when, what is logged, saved and trained: ``together.json``.

``calls``: each call of a hook's stage as [hook.stage, epoch, iter], with model steps between them. The rest is of the
same run with nobody listening: weights, lr and momentum after each iteration, console lines, files.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from torch.utils.data import DataLoader

from .evaluations import Evaluated, Scored, timeless
from .parts import WORKFLOWS, Loader, make_logger, make_runner, scrub, sgd, weights

BATCHES = 3
LENGTH = dict(epoch=3, iter=8)

CASES: dict[str, dict[str, Any]] = {}
for _kind in ("epoch", "iter"):
    for _workflow in WORKFLOWS:
        CASES[f"{_kind} {_workflow}"] = dict(kind=_kind, workflow=_workflow)
    CASES[f"{_kind} accumulated"] = dict(
        kind=_kind, workflow="t1", optimizer=dict(type="GradientCumulativeOptimizerHook", cumulative_iters=2)
    )
    CASES[f"{_kind} cyclic"] = dict(kind=_kind, workflow="t1", lr=dict(policy="cyclic", by_epoch=False),
                                    momentum=dict(policy="cyclic", by_epoch=False))  # fmt: skip


def make(case: dict[str, Any], api: Any, folder: str) -> tuple[Any, list[str]]:
    by_epoch = case["kind"] == "epoch"
    model = Evaluated()
    logger, lines = make_logger()
    runner = make_runner(
        api, case["kind"], LENGTH[case["kind"]], model=model, optimizer=sgd(model), work_dir=folder, logger=logger,
        meta=dict(seed=1),
    )  # fmt: skip
    step = [1, 2] if by_epoch else [3, 6]
    runner.register_training_hooks(
        dict(case.get("lr", dict(policy="step", step=step, by_epoch=by_epoch, warmup="linear", warmup_iters=2))),
        dict(case.get("optimizer", dict(grad_clip=dict(max_norm=0.5)))),
        dict(interval=2, by_epoch=by_epoch, max_keep_ckpts=3),
        dict(interval=2, hooks=[dict(type="TextLoggerHook", by_epoch=by_epoch)]),
        dict(case.get("momentum", dict(policy="step", step=step, gamma=0.5, by_epoch=by_epoch))),
        custom_hooks_config=[
            dict(type="EMAHook", momentum=0.1, warm_up=2, priority=45),
            dict(type="SyncBuffersHook"),
            dict(type="EmptyCacheHook", after_iter=True, priority="VERY_LOW"),
            dict(type="ClosureHook", fn_name="after_train_iter", fn=lambda runner: None, priority="LOWEST"),
        ],
    )
    loader = DataLoader(Scored(), batch_size=2)
    runner.register_hook(api.EvalHook(loader, interval=2, by_epoch=by_epoch, save_best="acc"), "LOW")
    return runner, lines


def go(runner: Any, case: dict[str, Any]) -> None:
    workflow = WORKFLOWS[case["workflow"]]
    with contextlib.redirect_stdout(io.StringIO()):  # mmcv's progress bars
        runner.run([Loader(BATCHES if mode == "train" else 1) for mode, _ in workflow], workflow)


def listen(runner: Any, calls: list[list[Any]]) -> None:
    """Write down every call of every hook's stage, and every step of the model."""

    def wrap(hook: Any, stage: str, name: str) -> None:
        inner = getattr(hook, stage)

        def call(runner: Any) -> None:
            calls.append([name, runner.epoch, runner.iter])
            inner(runner)

        setattr(hook, stage, call)

    for hook in runner._hooks:
        for stage in hook.get_triggered_stages():
            wrap(hook, stage, f"{type(hook).__name__}.{stage}")
    runner.model.log = lambda event: calls.append([f"model.{event}", runner.epoch, runner.iter])


def run(case: dict[str, Any], api: Any, folder: str) -> dict[str, Any]:
    runner, _ = make(case, api, os.path.join(folder, "listened"))
    calls: list[list[Any]] = []
    listen(runner, calls)
    go(runner, case)

    work_dir = os.path.join(folder, "plain")
    runner, lines = make(case, api, work_dir)
    rows: list[dict[str, Any]] = []

    def after_train_iter(self: Any, runner: Any) -> None:
        rows.append(dict(lr=runner.current_lr(), momentum=runner.current_momentum(), weights=weights(runner.model)))

    runner.register_hook(type("Probe", (api.Hook,), dict(after_train_iter=after_train_iter))(), "LOWEST")
    go(runner, case)
    order = next(k for k, line in enumerate(lines) if line.startswith("Hooks will be executed"))
    console = [timeless(scrub(line, folder, runner)) for line in lines[order + 1 :]]
    files = sorted(name for name in os.listdir(work_dir) if name.endswith(".pth"))
    return dict(calls=calls, rows=rows, console=console, files=files)
