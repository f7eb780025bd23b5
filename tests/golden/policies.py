"""Every lr and momentum policy with every warm-up, in both units and both runners: ``policies.json``.

Each case gives lr and momentum of both param groups at every iteration, and the keys that the groups have gained; or
the type of the exception that the combination raises.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .parts import make_runner

BATCHES = 3
LENGTH = dict(epoch=4, iter=12)

LR: dict[str, dict[str, Any]] = {
    "fixed": dict(policy="fixed"),
    "step": dict(policy="step", step=[2, 3]),
    "exp": dict(policy="exp", gamma=0.7),
    "poly": dict(policy="poly", power=0.9, min_lr=1e-3),
    "inv": dict(policy="inv", gamma=0.3, power=0.75),
    "cosine": dict(policy="CosineAnnealing", min_lr_ratio=0.05),
    "flat cosine": dict(policy="FlatCosineAnnealing", start_percent=0.4, min_lr=1e-3),
    "cosine restart": dict(policy="CosineRestart", periods=[4, 20], restart_weights=[1, 0.5], min_lr_ratio=0.01),
    "cyclic": dict(policy="cyclic", target_ratio=(5, 1e-2)),
    "one cycle": dict(policy="OneCycle", max_lr=0.5, pct_start=0.4),
    "linear": dict(policy="LinearAnnealing", min_lr=1e-3),
}
MOMENTUM: dict[str, dict[str, Any]] = {
    "step": dict(policy="step", step=[2, 3]),
    "cosine": dict(policy="CosineAnnealing", min_momentum=0.5),
    "linear": dict(policy="LinearAnnealing", min_momentum_ratio=0.6),
    "cyclic": dict(policy="cyclic"),
    "one cycle": dict(policy="OneCycle", pct_start=0.4),
}
LR_VARIANTS: dict[str, dict[str, Any]] = {
    "step int": dict(policy="Step", step=2, gamma=0.5),
    "step min_lr": dict(policy="step", step=1, gamma=0.3, min_lr=0.01),
    "step not sorted": dict(policy="step", step=[3, 2]),
    "step tuple": dict(policy="step", step=(2, 3)),
    "step 0": dict(policy="step", step=0),
    "step negative": dict(policy="step", step=[2, -3]),
    "step float": dict(policy="step", step=2.0),
    "poly defaults": dict(policy="poly"),
    "inv defaults": dict(policy="inv", gamma=0.5),
    "cosine min_lr": dict(policy="CosineAnnealing", min_lr=0.01),
    "cosine min_lr 0": dict(policy="CosineAnnealing", min_lr=0),
    "cosine neither": dict(policy="CosineAnnealing"),
    "cosine both": dict(policy="CosineAnnealing", min_lr=0.01, min_lr_ratio=0.1),
    "cosine lower case": dict(policy="cosineannealing", min_lr=0.01),
    "flat cosine ratio": dict(policy="FlatCosineAnnealing", min_lr_ratio=0.1),
    "flat cosine from the start": dict(policy="FlatCosineAnnealing", start_percent=0.0, min_lr=0.01),
    "flat cosine int": dict(policy="FlatCosineAnnealing", start_percent=1, min_lr=0.01),
    "flat cosine outside": dict(policy="FlatCosineAnnealing", start_percent=1.5, min_lr=0.01),
    "cosine restart min_lr": dict(policy="CosineRestart", periods=[5, 7], restart_weights=[1, 1], min_lr=0.01),
    "cosine restart default weights": dict(policy="CosineRestart", periods=[12], min_lr=0.01),
    "cosine restart too short": dict(policy="CosineRestart", periods=[2], min_lr=0.01),
    "cosine restart lengths": dict(policy="CosineRestart", periods=[2, 10], restart_weights=[1], min_lr=0.01),
    "cyclic linear": dict(policy="cyclic", anneal_strategy="linear"),
    "cyclic twice, gamma": dict(policy="cyclic", cyclic_times=2, gamma=0.5, target_ratio=(10, 1e-2)),
    "cyclic target float": dict(policy="cyclic", target_ratio=4.0),
    "cyclic target tuple of one": dict(policy="cyclic", target_ratio=(4.0,)),
    "cyclic target tuple of three": dict(policy="cyclic", target_ratio=(4.0, 3.0, 2.0)),
    "cyclic target list": dict(policy="cyclic", target_ratio=[4.0, 1.0]),
    "cyclic no way up": dict(policy="cyclic", step_ratio_up=0.0),
    "cyclic up too long": dict(policy="cyclic", step_ratio_up=1.0),
    "cyclic gamma 0": dict(policy="cyclic", gamma=0),
    "cyclic strategy": dict(policy="cyclic", anneal_strategy="sin"),
    "one cycle linear": dict(policy="OneCycle", max_lr=0.5, anneal_strategy="linear", div_factor=10),
    "one cycle three phases": dict(policy="OneCycle", max_lr=0.5, three_phase=True, final_div_factor=100.0),
    "one cycle max_lr list": dict(policy="OneCycle", max_lr=[0.5, 0.25]),
    "one cycle max_lr dict": dict(policy="OneCycle", max_lr=dict(SGD=0.5)),
    "one cycle max_lr short": dict(policy="OneCycle", max_lr=[0.5]),
    "one cycle max_lr name": dict(policy="OneCycle", max_lr=dict(Adam=0.5)),
    "one cycle max_lr str": dict(policy="OneCycle", max_lr="0.5"),
    "one cycle total_steps": dict(policy="OneCycle", max_lr=0.5, total_steps=20),
    "one cycle total_steps small": dict(policy="OneCycle", max_lr=0.5, total_steps=5),
    "one cycle total_steps float": dict(policy="OneCycle", max_lr=0.5, total_steps=20.0),
    "one cycle pct_start": dict(policy="OneCycle", max_lr=0.5, pct_start=-0.1),
    "one cycle strategy": dict(policy="OneCycle", max_lr=0.5, anneal_strategy="sin"),
    "linear ratio": dict(policy="LinearAnnealing", min_lr_ratio=0.1),
    "unknown policy": dict(policy="nothing"),
    "no policy": dict(step=[1]),
    "warmup unknown": dict(policy="fixed", warmup="quadratic", warmup_iters=2),
    "warmup_iters 0": dict(policy="fixed", warmup="linear", warmup_iters=0),
    "warmup_ratio 0": dict(policy="fixed", warmup="linear", warmup_iters=2, warmup_ratio=0),
    "warmup_ratio over 1": dict(policy="fixed", warmup="linear", warmup_iters=2, warmup_ratio=1.5),
    "warmup_ratio 1": dict(policy="fixed", warmup="linear", warmup_iters=2, warmup_ratio=1),
    "warmup args without warmup": dict(policy="fixed", warmup_iters=5, warmup_ratio=0.5),
    "warmup longer than the run": dict(policy="fixed", warmup="exp", warmup_iters=30),
}
MOMENTUM_VARIANTS: dict[str, dict[str, Any]] = {
    "step int": dict(policy="Step", step=2, gamma=0.9),
    "step min_momentum": dict(policy="step", step=1, min_momentum=0.2),
    "step tuple": dict(policy="step", step=(2, 3)),
    "step negative": dict(policy="step", step=-1),
    "cosine ratio": dict(policy="CosineAnnealing", min_momentum_ratio=0.5),
    "cosine both": dict(policy="CosineAnnealing", min_momentum_ratio=0.5, min_momentum=0.5),
    "linear neither": dict(policy="LinearAnnealing"),
    "linear min_momentum": dict(policy="LinearAnnealing", min_momentum=0.5),
    "cyclic linear": dict(policy="cyclic", anneal_strategy="linear", target_ratio=(0.8, 1.0)),
    "cyclic twice, gamma": dict(policy="cyclic", cyclic_times=2, gamma=0.5),
    "cyclic strategy": dict(policy="cyclic", anneal_strategy="sin"),
    "cyclic up too long": dict(policy="cyclic", step_ratio_up=1.5),
    "one cycle linear": dict(policy="OneCycle", anneal_strategy="linear"),
    "one cycle three phases": dict(policy="OneCycle", three_phase=True),
    "one cycle lists": dict(policy="OneCycle", base_momentum=[0.7, 0.6], max_momentum=[0.9, 0.8]),
    "one cycle dicts": dict(policy="OneCycle", base_momentum=dict(SGD=0.7), max_momentum=dict(SGD=0.9)),
    "one cycle int": dict(policy="OneCycle", base_momentum=1),
    "one cycle pct_start": dict(policy="OneCycle", pct_start=1.1),
    "one cycle strategy": dict(policy="OneCycle", anneal_strategy="sin"),
    "warmup unknown": dict(policy="step", step=2, warmup="quadratic", warmup_iters=2),
    "warmup_iters 0": dict(policy="step", step=2, warmup="linear", warmup_iters=0),
    "unknown policy": dict(policy="nothing"),
}

CASES: dict[str, dict[str, Any]] = {}
for _kind, _warmup, _by_epoch in itertools.product(
    ("epoch", "iter"), (None, "constant", "linear", "exp"), (True, False)
):
    _unit = "by epoch" if _by_epoch else "by iteration"
    for _what, _policies in (("lr", LR), ("momentum", MOMENTUM)):
        for _name, _policy in _policies.items():
            _cfg = dict(_policy, by_epoch=_by_epoch)
            if _warmup:
                _cfg.update(warmup=_warmup, warmup_iters=4, warmup_ratio=0.2 if _what == "lr" else 0.8)
            CASES[f"{_kind} {_what} {_name}, {_unit}, warmup {_warmup}"] = {"kind": _kind, _what: _cfg}
for _kind in ("epoch", "iter"):
    for _what, _policies in (("lr", LR_VARIANTS), ("momentum", MOMENTUM_VARIANTS)):
        for _name, _policy in _policies.items():
            _unit_of = {} if _policy.get("policy") in ("cyclic", "OneCycle") else dict(by_epoch=_kind == "epoch")
            CASES[f"{_kind} {_what} {_name}"] = {"kind": _kind, _what: dict(_policy, **_unit_of)}
    for _what, _policies in (("lr", LR), ("momentum", MOMENTUM)):
        for _name, _policy in _policies.items():
            CASES[f"{_kind} {_what} {_name}, dict of optimizers"] = {
                "kind": _kind, _what: dict(_policy, by_epoch=False), "optimizer": "dict",
            }  # fmt: skip
    for _name in MOMENTUM:
        CASES[f"{_kind} momentum {_name}, Adam"] = {
            "kind": _kind, "momentum": dict(MOMENTUM[_name], by_epoch=False), "optimizer": "Adam",
        }  # fmt: skip
    for _name in ("cyclic", "one cycle"):
        CASES[f"{_kind} lr and momentum {_name}"] = dict(kind=_kind, lr=LR[_name], momentum=MOMENTUM[_name])
    CASES[f"{_kind} momentum of an optimizer without"] = {
        "kind": _kind, "momentum": MOMENTUM["one cycle"], "optimizer": "Adagrad",
    }  # fmt: skip
    for _warmup in ("constant", "linear", "exp"):
        CASES[f"{_kind} lr step, warmup {_warmup} by epoch"] = dict(
            kind=_kind,
            lr=dict(policy="step", step=[3], warmup=_warmup, warmup_iters=2, warmup_ratio=0.2, warmup_by_epoch=True),
        )


class Line(nn.Module):
    """Two parameters that nobody updates."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def train_step(self, data_batch: Tensor, optimizer: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(loss=data_batch * self.w)


class Batches(list[Tensor]):
    sampler = None  # mmcv's IterLoader asks for the attribute


def make_optimizer(kind: str, model: Line) -> Any:
    groups = [dict(params=[model.w]), dict(params=[model.b], lr=0.02)]
    if kind == "dict":
        return dict(
            first=torch.optim.SGD([model.w], lr=0.1, momentum=0.9),
            second=torch.optim.Adam([model.b], lr=0.02, betas=(0.8, 0.99)),
        )
    if kind == "Adam":
        return torch.optim.Adam(groups, lr=0.1, betas=(0.9, 0.99))
    if kind == "Adagrad":
        return torch.optim.Adagrad(groups, lr=0.1)
    groups[1]["momentum"] = 0.7
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def make_probe(api: Any, rows: list[Any], what: list[str]) -> Any:
    def after_train_iter(self: Any, runner: Any) -> None:
        readers = dict(lr=runner.current_lr, momentum=runner.current_momentum)
        rows.append([readers[name]() for name in what])

    return type("Probe", (api.Hook,), dict(after_train_iter=after_train_iter))()


def run(case: dict[str, Any], api: Any, folder: str) -> dict[str, Any]:
    model = Line()
    optimizer = make_optimizer(case.get("optimizer", "SGD"), model)
    runner = make_runner(api, case["kind"], LENGTH[case["kind"]], model=model, optimizer=optimizer, work_dir=folder)
    each = list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]
    before = {key for one in each for key in one.param_groups[0]}
    rows: list[Any] = []
    what = [name for name in ("lr", "momentum") if name in case]
    try:
        if "lr" in case:
            runner.register_lr_hook(copy.deepcopy(case["lr"]))
        if "momentum" in case:
            runner.register_momentum_hook(copy.deepcopy(case["momentum"]))
        runner.register_hook(make_probe(api, rows, what), "LOWEST")
        runner.run([Batches([torch.ones(1)] * BATCHES)], [("train", 1)])
    except Exception as error:
        return dict(error=type(error).__name__)
    gained = [sorted(set(group) - before) for one in each for group in one.param_groups]
    return dict(rows=rows, gained=gained)
