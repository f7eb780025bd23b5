"""Loss, learning rate, momentum, gradient norm and weights of every iteration of small runs: ``values.json``.

Step policy with every warm-up, clipping, optimizers, and EMA as a custom hook at several priorities.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

from .parts import WORKFLOWS, Loader, Toy, make_runner, sgd, weights

BATCHES = 3
LENGTH = dict(epoch=3, iter=8)
WARM = dict(warmup_iters=4, warmup_ratio=0.1)

CASES: dict[str, dict[str, Any]] = {}
for _kind in ("epoch", "iter"):
    _step = dict(policy="step", step=[1, 2] if _kind == "epoch" else [5, 7])
    _clip = dict(grad_clip=dict(max_norm=0.5))

    def _add(name: str, kind: str = _kind, **case: Any) -> None:
        CASES[f"{kind} {name}"] = dict(kind=kind, **case)

    _add("no clipping", lr=_step, optimizer_config={})
    for _warmup in ("constant", "linear", "exp"):
        _add(f"{_warmup} warmup", lr=dict(_step, warmup=_warmup, **WARM), optimizer_config=_clip)
    _add("float32", lr=dict(_step, warmup="linear", **WARM), optimizer_config=_clip, dtype="float32")
    _add("two groups", lr=dict(_step, warmup="exp", **WARM), optimizer_config=_clip, groups=2)
    _add("norm of order 1", lr=_step, optimizer_config=dict(grad_clip=dict(max_norm=1.0, norm_type=1)))
    _add("int step, gamma, min_lr", lr=dict(policy="Step", step=1, gamma=0.5, min_lr=0.02), optimizer_config=_clip)
    _add("nesterov", lr=_step, optimizer_config={}, sgd=dict(nesterov=True, weight_decay=0.01))
    _add("fixed", lr=dict(policy="fixed", warmup="linear", **WARM), optimizer_config=_clip)
    _add("val workflow", lr=dict(_step, warmup="linear", **WARM), optimizer_config=_clip, workflow="t2v1")
    for _priority, _interval in itertools.product(("HIGHEST", "NORMAL", 45), (1, 2)):
        _add(
            f"ema {_priority} every {_interval}",
            lr=_step,
            optimizer_config=_clip,
            ema=dict(type="EMAHook", momentum=0.1, interval=_interval, warm_up=10, priority=_priority),
            workflow="t1v1",
        )
for _warmup in ("constant", "linear", "exp"):
    _by_epoch = dict(warmup=_warmup, warmup_by_epoch=True, warmup_iters=1, warmup_ratio=0.1)
    CASES[f"epoch {_warmup} warmup by epoch"] = dict(
        kind="epoch", lr=dict(policy="step", step=[1, 2], **_by_epoch), optimizer_config={}
    )
CASES["epoch lr by iteration"] = dict(
    kind="epoch", lr=dict(policy="step", step=[4, 5], by_epoch=False, warmup="linear", **WARM), optimizer_config={}
)


def make_probe(api: Any, rows: list[dict[str, Any]]) -> Any:
    def after_train_iter(self: Any, runner: Any) -> None:
        history = runner.log_buffer.val_history
        norms = list(history["grad_norm"]) if "grad_norm" in history else [None]
        rows.append(
            dict(
                iter=runner.iter,
                lr=runner.current_lr(),
                momentum=runner.current_momentum(),
                loss=runner.outputs["loss"].item(),
                grad_norm=norms[-1],
                weights=weights(runner.model),
            )
        )

    def at_epoch(stage: str) -> Any:
        return lambda self, runner: rows.append(dict(stage=stage, weights=weights(runner.model)))

    stages = ("before_run", "before_train_epoch", "after_train_epoch", "before_val_epoch", "after_run")
    return type(
        "Probe", (api.Hook,), dict(after_train_iter=after_train_iter, **{stage: at_epoch(stage) for stage in stages})
    )()


def run(case: dict[str, Any], api: Any, folder: str) -> list[dict[str, Any]]:
    dtype = getattr(torch, case.get("dtype", "float64"))
    model = Toy(dtype)
    optimizer = sgd(model, case.get("groups", 1), **case.get("sgd", {}))
    runner = make_runner(api, case["kind"], LENGTH[case["kind"]], model=model, optimizer=optimizer, work_dir=folder)
    rows: list[dict[str, Any]] = []
    runner.register_training_hooks(copy.deepcopy(case["lr"]), dict(case["optimizer_config"]), None, None)
    if "ema" in case:
        runner.register_custom_hooks(dict(case["ema"]))
    runner.register_hook(make_probe(api, rows), "LOWEST")
    workflow = WORKFLOWS[case.get("workflow", "t1")]
    runner.run([Loader(BATCHES if mode == "train" else 1, dtype) for mode, _ in workflow], workflow)
    return rows
