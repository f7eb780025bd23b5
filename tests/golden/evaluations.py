"""What EvalHook logs, saves and remembers, beside TextLoggerHook and CheckpointHook: ``evaluations.json``.

Scores are given: the n-th evaluation of a run has the n-th of ``SCORES``. Measured times are taken out of the lines.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .parts import WORKFLOWS, Loader, Toy, make_logger, make_runner, scrub, sgd

BATCHES = 4
LENGTH = dict(epoch=6, iter=12)
SCORES = [0.25, 0.5, 0.5, 0.0, 0.75, 0.125, 1.0, 0.875, -1.0, 0.5, 0.5, 2.0, 0.1]

CASES: dict[str, dict[str, Any]] = {}
for _kind in ("epoch", "iter"):

    def _add(name: str, kind: str = _kind, **case: Any) -> None:
        CASES[f"{kind} {name}"] = dict(kind=kind, **case)

    for _interval, _start in itertools.product((1, 2, 3), (None, 0, 1, 2, 4)):
        _add(f"every {_interval} from {_start}", hook=dict(interval=_interval, start=_start))
    _add("save_best", hook=dict(save_best="acc"))
    _add("save_best auto", hook=dict(save_best="auto"))
    _add("less is better", hook=dict(save_best="loss_val"))
    _add("rule", hook=dict(save_best="acc", rule="less"))
    _add("own keys", hook=dict(save_best="other", greater_keys=["oth"], less_keys=["acc"]))
    _add("begun before", hook=dict(save_best="acc", start=1), begin=2)
    _add("begun before, every 2", hook=dict(start=1, interval=2), begin=3)
    _add("val workflow", hook=dict(interval=2), workflow="t1v1")
    for _log in (1, 2, 3, 5):
        _add(f"every 2 beside a log every {_log}", hook=dict(interval=2), log=_log)
_add("by iteration in the epoch runner", kind="epoch", hook=dict(by_epoch=False, interval=3, save_best="acc"), log=3)


class Scored(Dataset):
    """Two samples a batch, and a list of scores."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(x=torch.tensor([0.5 * index, 1.0], dtype=torch.float64))

    def evaluate(self, results: list[Any], logger: Any = None, **kwargs: Any) -> dict[str, float]:
        self.seen.append(len(results))
        score = SCORES[self.calls]
        self.calls += 1
        return dict(acc=score, loss_val=score, other=-score)


class Evaluated(Toy):
    def forward(self, x: torch.Tensor, return_loss: bool = True) -> Any:
        output = super().forward(x)
        return output if return_loss else list(output)


def timeless(line: str) -> str:
    """The keys stay, their values are 0."""
    return re.sub(r'((?:eta|time)"?: )[\d:.e-]+', r"\g<1>0", line)


def run(case: dict[str, Any], api: Any, folder: str) -> dict[str, Any]:
    model, by_epoch = Evaluated(), case["kind"] == "epoch"
    logger, lines = make_logger()
    work_dir = os.path.join(folder, "work")
    runner = make_runner(
        api, case["kind"], LENGTH[case["kind"]], model=model, optimizer=sgd(model), work_dir=work_dir, logger=logger,
        meta=dict(seed=1),
    )  # fmt: skip
    log = dict(interval=case.get("log", 4), hooks=[dict(type="TextLoggerHook", by_epoch=by_epoch)])
    runner.register_training_hooks(dict(policy="fixed"), {}, None, log)
    dataset = Scored()
    hook = api.EvalHook(DataLoader(dataset, batch_size=2), **{"by_epoch": by_epoch, **case["hook"]})
    runner.register_hook(hook, "LOW")
    if "begin" in case:
        setattr(runner, "_epoch" if by_epoch else "_iter", case["begin"])
    workflow = WORKFLOWS[case.get("workflow", "t1")]
    with contextlib.redirect_stdout(io.StringIO()):  # mmcv's progress bars
        runner.run([Loader(BATCHES if mode == "train" else 1) for mode, _ in workflow], workflow)
    (name,) = (name for name in os.listdir(work_dir) if name.endswith(".log.json"))
    with open(os.path.join(work_dir, name), encoding="utf-8") as file:
        records = [timeless(line) for line in file.read().splitlines()[1:]]
    order = next(k for k, line in enumerate(lines) if line.startswith("Hooks will be executed"))
    console = [timeless(scrub(line, folder, runner)) for k, line in enumerate(lines) if k > order + 1]
    messages = {key: str(value).replace(folder, "<folder>") for key, value in runner.meta.get("hook_msgs", {}).items()}
    files = sorted(name for name in os.listdir(work_dir) if name.endswith(".pth"))
    return dict(console=console, records=records, hook_msgs=messages, files=files, seen=dataset.seen)
