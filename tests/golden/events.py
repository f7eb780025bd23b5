"""Which hooks, model steps and batches follow each other, and what the counters say at each: ``events.json``.

A row is [event, epoch, iter, inner_iter, mode]. ``A`` is a hook that overrides all ten stages, ``B`` one that overrides
only the generic ones.
"""

from __future__ import annotations

import itertools
from typing import Any

from .parts import WORKFLOWS, Loader, Toy, make_runner

STAGES = [
    "before_run", "before_train_epoch", "before_train_iter", "after_train_iter", "after_train_epoch",
    "before_val_epoch", "before_val_iter", "after_val_iter", "after_val_epoch", "after_run",
]  # fmt: skip
GENERIC = ["before_epoch", "after_epoch", "before_iter", "after_iter"]
VAL_BATCHES = 2
NORMAL: list[tuple[str, str, int | str]] = [("A", "all", "NORMAL"), ("B", "generic", "NORMAL")]

CASES: dict[str, dict[str, Any]] = {
    f"{kind} {workflow} {batches} batches max {length}": dict(
        kind=kind, workflow=workflow, batches=batches, length=length
    )
    for kind, workflow, batches in itertools.product(("epoch", "iter"), WORKFLOWS, (1, 3, 5))
    for length in ((2, 3) if kind == "epoch" else (6, 7))
}
for _kind in ("epoch", "iter"):
    _case = dict(kind=_kind, workflow="t2v1", batches=2, length=3)
    CASES[f"{_kind} priorities and ties"] = dict(
        _case,
        probes=[
            ("n1", "all", "NORMAL"), ("low", "generic", "LOWEST"), ("45", "generic", 45), ("n2", "generic", 50),
            ("high", "all", "HIGHEST"), ("n3", "all", "normal"), ("55", "all", 55), ("high2", "generic", 0),
        ],
    )  # fmt: skip
    CASES[f"{_kind} arguments of run"] = dict(_case, kwargs=dict(flag=1))
CASES["epoch batch_processor"] = dict(kind="epoch", workflow="t1v1", batches=2, length=2, batch_processor=True)


def make_probe(api: Any, name: str, stages: list[str], log: Any) -> Any:
    """A hook whose class overrides ``stages``; each call is logged and nothing else."""
    methods = {stage: (lambda self, runner, stage=stage: log(f"{name}.{stage}")) for stage in stages}
    return type(f"Probe{name}", (api.Hook,), methods)()


class NoStep(Toy):
    """A model of the old kind: no train_step, no val_step."""

    train_step = property()  # type: ignore[assignment]
    val_step = property()  # type: ignore[assignment]


def run(case: dict[str, Any], api: Any, folder: str) -> list[list[Any]]:
    trace: list[list[Any]] = []

    def log(event: str) -> None:
        trace.append([event, runner.epoch, runner.iter, runner.inner_iter, runner.mode])

    arguments: dict[str, Any] = {}
    model = NoStep() if case.get("batch_processor") else Toy()
    if case.get("batch_processor"):
        arguments["batch_processor"] = lambda model, batch, train_mode, **kwargs: (
            log(f"batch_processor {train_mode} {sorted(kwargs)}") or dict(loss=model(batch["x"]).sum())
        )
    runner = make_runner(api, case["kind"], case["length"], model=model, work_dir=folder, **arguments)
    model.log = lambda event: log(f"model.{event}")
    for name, what, priority in case.get("probes", NORMAL):
        runner.register_hook(make_probe(api, name, STAGES if what == "all" else GENERIC, log), priority)

    workflow = WORKFLOWS[case["workflow"]]
    loaders = [Loader(case["batches"] if mode == "train" else VAL_BATCHES) for mode, _ in workflow]
    for (mode, _), loader in zip(workflow, loaders, strict=True):
        loader.log = lambda event, mode=mode: log(f"{mode} loader.{event}")
    runner.run(loaders, workflow, **case.get("kwargs", {}))
    log("the end")
    return trace
