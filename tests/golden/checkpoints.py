"""Which files CheckpointHook leaves on disk after each save, and what they and the runner's meta say:
``checkpoints.json``."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from .parts import WORKFLOWS, Loader, Toy, make_logger, make_runner, sgd

BATCHES = 2
LENGTH = dict(epoch=5, iter=7)

CASES: dict[str, dict[str, Any]] = {}
for _kind in ("epoch", "iter"):

    def _add(name: str, kind: str = _kind, **case: Any) -> None:
        CASES[f"{kind} {name}"] = dict(kind=kind, **case)

    _add("every", hook=dict(interval=1))
    _add("every 2", hook=dict(interval=2))
    _add("every 3", hook=dict(interval=3))
    _add("default interval", hook={})
    _add("nothing but the last", hook=dict(interval=-1))
    _add("nothing", hook=dict(interval=-1, save_last=False))
    _add("every 2, not the last", hook=dict(interval=2, save_last=False))
    _add("keep 1", hook=dict(interval=1, max_keep_ckpts=1))
    _add("keep 2", hook=dict(interval=1, max_keep_ckpts=2))
    _add("every 3, keep 1, length 10", hook=dict(interval=3, max_keep_ckpts=1), length=10)
    _add("every 2, keep 1", hook=dict(interval=2, max_keep_ckpts=1))
    _add("out_dir", hook=dict(interval=2, out_dir="<folder>/elsewhere"))
    _add("filename_tmpl", hook=dict(interval=2, filename_tmpl="model_{}.pt", max_keep_ckpts=1))
    _add("no optimizer", hook=dict(interval=2, save_optimizer=False))
    _add("no symlink", hook=dict(interval=2, create_symlink=False))
    _add("own meta", hook=dict(interval=2, meta=dict(note="mine")))
    _add("meta of the runner is None", hook=dict(interval=2), meta=None)
    _add("the other unit", hook=dict(interval=2, by_epoch=_kind == "iter"))
    _add("val workflow", hook=dict(interval=2), workflow="t2v1")
    _add("two optimizers", hook=dict(interval=2), optimizers=2)
    _add("resumed meta", hook=dict(interval=2), meta=dict(epoch=90, iter=91, hook_msgs=dict(last_ckpt="old")))


def listing(folder: str) -> list[str]:
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    return sorted(name for name in found if name.endswith((".pth", ".pt")))


def describe(path: str, folder: str, model: Toy) -> dict[str, Any]:
    """What matters of one checkpoint file, and whether it holds the weights that the model has now."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    meta = dict(content["meta"])
    facts: dict[str, Any] = dict(keys=sorted(content), meta_keys=sorted(meta), epoch=meta["epoch"], iter=meta["iter"])
    facts["hook_msgs"] = scrubbed(meta.get("hook_msgs"), folder)
    current = model.state_dict()
    facts["state_dict"] = {name: torch.equal(value, current[name]) for name, value in content["state_dict"].items()}
    if "optimizer" in content:
        facts["optimizer"] = sorted(content["optimizer"])
    return facts


def scrubbed(messages: dict[str, Any] | None, folder: str) -> dict[str, str] | None:
    return messages and {name: str(value).replace(folder, "<folder>") for name, value in messages.items()}


def make_probe(api: Any, folder: str, lines: list[str], rows: list[dict[str, Any]]) -> Any:
    """Looks at the disk at the end of every stage in which something was saved."""
    state: dict[str, Any] = dict(lines=0, before={})

    def look(stage: str, runner: Any) -> None:
        said = [line for line in lines[state["lines"] :] if line.startswith("Saving checkpoint")]
        state["lines"] = len(lines)
        now = {name: os.lstat(os.path.join(folder, name)).st_mtime_ns for name in listing(folder)}
        written = [name for name in now if now[name] != state["before"].get(name) and "latest" not in name]
        state["before"] = now
        if not said and not written:
            return
        latest = [name for name in now if os.path.basename(name) == "latest.pth"]
        rows.append(
            dict(
                stage=stage,
                epoch=runner.epoch,
                iter=runner.iter,
                said=said,
                files=sorted(now),
                written={name: describe(os.path.join(folder, name), folder, runner.model) for name in written},
                latest=[os.readlink(os.path.join(folder, name)) for name in latest],
                hook_msgs=scrubbed((runner.meta or {}).get("hook_msgs"), folder),
            )
        )

    stages = ("after_train_iter", "after_train_epoch", "after_run")
    methods = {stage: (lambda self, runner, stage=stage: look(stage, runner)) for stage in stages}
    return type("Probe", (api.Hook,), methods)()


def run(case: dict[str, Any], api: Any, folder: str) -> list[dict[str, Any]]:
    model = Toy()
    optimizer: Any = sgd(model)
    if "optimizers" in case:
        optimizer = dict(w=torch.optim.SGD([model.w], lr=0.1), b=torch.optim.SGD([model.b], lr=0.1))
    logger, lines = make_logger()
    length = case.get("length", LENGTH[case["kind"]])
    runner = make_runner(
        api, case["kind"], length, model=model, optimizer=optimizer, work_dir=os.path.join(folder, "work"),
        logger=logger, meta=copy.deepcopy(case.get("meta", dict(seed=1))),
    )  # fmt: skip
    hook = {key: value for key, value in case["hook"].items() if key != "out_dir"}
    if "out_dir" in case["hook"]:
        hook["out_dir"] = case["hook"]["out_dir"].replace("<folder>", folder)
    optimizer_config = None if "optimizers" in case else {}
    runner.register_training_hooks(dict(policy="fixed"), optimizer_config, copy.deepcopy(hook), None)
    rows: list[dict[str, Any]] = []
    runner.register_hook(make_probe(api, folder, lines, rows), "LOWEST")
    workflow = WORKFLOWS[case.get("workflow", "t1")]
    runner.run([Loader(BATCHES if mode == "train" else 1) for mode, _ in workflow], workflow)
    return rows
