"""Texts of ``get_hook_info()``, and what ``get_priority`` makes of its inputs: ``hook_info.json``."""

from __future__ import annotations

from typing import Any

from .events import GENERIC, STAGES, make_probe
from .parts import Toy, make_runner, sgd

DEFAULTS: dict[str, Any] = dict(
    lr_config=dict(policy="step", step=[1]),
    optimizer_config=dict(grad_clip=dict(max_norm=1.0)),
    checkpoint_config=dict(interval=1),
    log_config=dict(interval=5, hooks=[dict(type="TextLoggerHook")]),
)
PRIORITIES: list[Any] = [
    -1, 0, 1, 50, 100, 101, True, 1.0, 1.5, None, "50", "", "highest", "VERY_HIGH", "High", "above_normal", "Normal",
    "BELOW_NORMAL", "low", "very_low", "LOWEST", "lower", [50], "Priority.HIGH", "Priority.LOWEST",
]  # fmt: skip
CASES: dict[str, dict[str, Any]] = {"priorities": {}}
for _kind in ("epoch", "iter"):
    CASES[f"{_kind} nothing"] = dict(kind=_kind, training={})
    CASES[f"{_kind} defaults"] = dict(kind=_kind, training=DEFAULTS)
    CASES[f"{_kind} defaults and ema"] = dict(
        kind=_kind, training=dict(DEFAULTS, custom_hooks_config=[dict(type="EMAHook", priority=45)])
    )
    CASES[f"{_kind} probes"] = dict(
        kind=_kind, training=DEFAULTS, probes=[("all", 33), ("generic", "LOW"), ("none", 0), ("one", "NORMAL")]
    )


def priorities(api: Any) -> list[list[Any]]:
    rows = []
    for value in PRIORITIES:
        asked = value
        if isinstance(value, str) and value.startswith("Priority."):
            asked = api.Priority[value.partition(".")[2]]
        try:
            rows.append([value, api.get_priority(asked)])
        except Exception as error:
            rows.append([value, type(error).__name__])
    return rows


def run(case: dict[str, Any], api: Any, folder: str) -> Any:
    if not case:
        return priorities(api)
    model = Toy()
    runner = make_runner(api, case["kind"], 1, model=model, optimizer=sgd(model), work_dir=folder)
    if case["training"]:
        # Fresh dicts: mmcv takes keys out of those that it is given.
        training = {k: list(v) if isinstance(v, list) else dict(v) for k, v in case["training"].items()}
        training["log_config"] = dict(interval=5, hooks=[dict(type="TextLoggerHook")])
        runner.register_training_hooks(**training)
    kinds = dict(all=STAGES, generic=GENERIC, none=[], one=["after_val_iter"])
    for kind, priority in case.get("probes", []):
        runner.register_hook(make_probe(api, kind, kinds[kind], print), priority)
    return runner.get_hook_info()
