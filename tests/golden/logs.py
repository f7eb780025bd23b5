"""Console lines and ``.log.json`` records: ``logs.json``.

The clock moves only in the loader and in the model, so that times, averages of them and the ETA are exact too.
"""

from __future__ import annotations

import copy
import itertools
import os
from typing import Any
from unittest import mock

import torch

from .parts import WORKFLOWS, Clock, Loader, Toy, make_logger, make_runner, scrub, sgd

BATCHES, VAL_BATCHES = 5, 2
LENGTH = dict(epoch=2, iter=8)
META = dict(exp_name="toy", seed=3, env_info="line\nline", nested=dict(a=[1.23456789, "b"], c=(1, 2)))

CASES: dict[str, dict[str, Any]] = {}
for _kind in ("epoch", "iter"):

    def _add(name: str, *hooks: dict[str, Any], kind: str = _kind, **case: Any) -> None:
        CASES[f"{kind} {name}"] = dict(kind=kind, hooks=[dict(type="TextLoggerHook", **hook) for hook in hooks], **case)

    for _interval, _ignore in itertools.product((1, 2, 3), (True, False)):
        _add(f"every {_interval} ignore_last={_ignore}", dict(ignore_last=_ignore), interval=_interval)
    _add("val workflow", {}, interval=2, workflow="t1v1")
    _add("val workflow, two epochs", {}, interval=3, workflow="t2v1")
    _add("meta with exp_name", dict(interval_exp_name=3), interval=2, meta=META)
    _add("two groups", {}, interval=2, groups=2)
    _add("dict of optimizers", {}, interval=2, optimizers=2)
    _add("two loggers", dict(interval=2), dict(interval=3), interval=10)
    _add("reset_flag of the first", dict(interval=2, reset_flag=True), dict(interval=4), interval=10)
    _add("evaluation results", {}, interval=2, evaluation=True, workflow="t1v1")
    _add("no timer", {}, interval=2, timer=False)
    _add("the other unit", dict(by_epoch=_kind == "iter"), interval=2, workflow="t2v1")


def make_evaluation(api: Any) -> Any:
    """What EvalHook leaves in the log buffer."""

    def after_train_epoch(self: Any, runner: Any) -> None:
        runner.log_buffer.output["eval_iter_num"] = VAL_BATCHES
        runner.log_buffer.output["acc_top1"] = 12.345678
        runner.log_buffer.output["count"] = 3
        runner.log_buffer.output["note"] = "text"
        runner.log_buffer.ready = True

    return type("Evaluation", (api.Hook,), dict(after_train_epoch=after_train_epoch))()


class TwoOptimizers(Toy):
    """Steps its optimizers itself, as GANs do."""

    def train_step(self, data_batch: Any, optimizer: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = super().train_step(data_batch, optimizer, **kwargs)
        for each in optimizer.values():
            each.zero_grad()
        outputs["loss"].backward()
        for each in optimizer.values():
            each.step()
        return outputs


def run(case: dict[str, Any], api: Any, folder: str) -> dict[str, Any]:
    clock = Clock()
    model: Toy = TwoOptimizers(clock=clock) if "optimizers" in case else Toy(clock=clock)
    optimizer: Any = sgd(model, case.get("groups", 1))
    if "optimizers" in case:
        optimizer = dict(w=torch.optim.SGD([model.w], lr=0.1), b=torch.optim.SGD([model.b], lr=0.25, momentum=0.5))
    logger, lines = make_logger()
    runner = make_runner(
        api, case["kind"], LENGTH[case["kind"]], model=model, optimizer=optimizer, work_dir=folder, logger=logger,
        meta=copy.deepcopy(case.get("meta")),
    )  # fmt: skip
    by_epoch = case["kind"] == "epoch"
    runner.register_lr_hook(dict(policy="step", step=[1 if by_epoch else 4], by_epoch=by_epoch))
    if "optimizers" not in case:
        runner.register_optimizer_hook(dict(grad_clip=dict(max_norm=0.5)))
    if case.get("timer", True):
        runner.register_timer_hook(dict(type="IterTimerHook"))
    hooks = [{"by_epoch": by_epoch, **hook} for hook in case["hooks"]]
    runner.register_logger_hooks(dict(interval=case["interval"], hooks=hooks))
    if case.get("evaluation"):
        runner.register_hook(make_evaluation(api), "LOW")
    workflow = WORKFLOWS[case.get("workflow", "t1")]
    no_gpu = mock.patch("torch.cuda.is_available", return_value=False)  # with one, lines say how much memory is used
    with clock.installed(), no_gpu:
        loaders = [Loader(BATCHES if mode == "train" else VAL_BATCHES, clock=clock) for mode, _ in workflow]
        runner.run(loaders, workflow)
    (name,) = (name for name in os.listdir(folder) if name.endswith(".log.json"))
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        records = file.read().splitlines()
    order = next(k for k, line in enumerate(lines) if line.startswith("Hooks will be executed"))
    console = [scrub(line, folder, runner) for k, line in enumerate(lines) if k != order]  # hook_info.json has that one
    return dict(console=console, file=scrub(name, folder, runner), records=records)
