"""Losses, gradient norms, weights and factors of the hooks that accumulate gradients: ``accumulation.json``.

On the CPU mmcv's loss scaler is off. Ours scales, by powers of two, which float64 takes back exactly.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

from .parts import WORKFLOWS, Loader, Toy, make_runner, sgd, weights

BATCHES = 3

CASES: dict[str, dict[str, Any]] = {}
for _kind, _n, _clip in itertools.product(("epoch", "iter"), (1, 2, 3, 4, 20), (None, 0.5)):
    for _length in (2, 3) if _kind == "epoch" else (7, 8, 12):
        CASES[f"{_kind} {_n} of {_length}, clip {_clip}"] = dict(
            kind=_kind,
            length=_length,
            config=dict(
                type="GradientCumulativeOptimizerHook",
                cumulative_iters=_n,
                grad_clip=_clip and dict(max_norm=_clip),
            ),
        )
for _kind, _scale in itertools.product(("epoch", "iter"), (512.0, "dynamic", dict(init_scale=65536.0))):
    _length = 2 if _kind == "epoch" else 7
    _case = dict(kind=_kind, length=_length)
    CASES[f"{_kind} fp16 {_scale}"] = dict(
        _case, config=dict(type="Fp16OptimizerHook", loss_scale=_scale, grad_clip=dict(max_norm=0.5))
    )
    CASES[f"{_kind} fp16 {_scale} accumulated"] = dict(
        _case, config=dict(type="GradientCumulativeFp16OptimizerHook", cumulative_iters=3, loss_scale=_scale)
    )
CASES["epoch val workflow"] = dict(
    kind="epoch", length=3, workflow="t2v1", config=dict(type="GradientCumulativeOptimizerHook", cumulative_iters=2)
)


def run(case: dict[str, Any], api: Any, folder: str) -> list[dict[str, Any]]:
    model = Toy()
    runner = make_runner(
        api, case["kind"], case["length"], model=model, optimizer=sgd(model), work_dir=folder, meta=dict(seed=1)
    )
    runner.register_optimizer_hook(copy.deepcopy(case["config"]))
    rows: list[dict[str, Any]] = []

    def after_train_iter(self: Any, runner: Any) -> None:
        history = runner.log_buffer.val_history
        rows.append(
            dict(
                loss=runner.outputs["loss"].item(),
                norms=list(history["grad_norm"]) if "grad_norm" in history else [],
                weights=weights(runner.model),
                grads=[None if p.grad is None else p.grad.tolist() for p in runner.model.parameters()],
            )
        )

    runner.register_hook(type("Probe", (api.Hook,), dict(after_train_iter=after_train_iter))(), "LOW")
    workflow = WORKFLOWS[case.get("workflow", "t1")]
    runner.run([Loader(BATCHES if mode == "train" else 1) for mode, _ in workflow], workflow)
    return rows
