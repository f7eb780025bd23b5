"""The parts around a runner: param groups, initial values, casts, collated batches, reports of loading:
``library.json``. Each case calls a few functions and says what came back.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from .parts import make_logger

CASES: dict[str, dict[str, Any]] = {}


def find(api: Any, name: str) -> Any:
    """mmcv spreads over several modules what fastrunner has in one or in the modules named here."""
    ours = ("model.initializers", "model.precision", "data.container", "utils", "checkpoint.sources")
    theirs = ("mmcv.parallel", "mmcv.cnn", "mmcv.utils", "mmcv.runner.fp16_utils", "mmcv.runner.checkpoint")
    modules = [f"fastrunner.{name}" for name in ours] if api.__name__ == "fastrunner" else theirs
    for module in (api, *map(importlib.import_module, modules)):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(name)


def facts(value: Any) -> Any:
    """Any result in JSON's types: tensors as dtype and values, DataContainers as what they hold."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(facts, value)]
    if type(value).__name__ == "DataContainer":
        return dict(data=facts(value.data), stack=value.stack, cpu_only=value.cpu_only)
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


# ---------------------------------------------------------------- param groups


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw = nn.Conv2d(3, 3, 3, groups=3)
        self.gn = nn.GroupNorm(3, 3)
        self.param1 = nn.Parameter(torch.ones(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.param1 = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.conv2 = nn.Conv2d(4, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.ln = nn.LayerNorm(2)
        self.sub = Sub()
        self.same = nn.ModuleList([nn.Linear(2, 2), nn.InstanceNorm2d(2, affine=True)])
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


PARAMWISE: dict[str, Any] = {
    "none": None,
    "empty": {},
    "all": dict(bias_lr_mult=2, bias_decay_mult=0.5, norm_decay_mult=0, dwconv_decay_mult=0.1, dcn_offset_lr_mult=0.3),
    "bias lr": dict(bias_lr_mult=2.0),
    "norm": dict(norm_decay_mult=0.0),
    "custom": dict(custom_keys={"sub": dict(lr_mult=0.1, decay_mult=0), "param1": dict(lr_mult=10)}, bias_lr_mult=2),
    "longest": dict(custom_keys={"conv": dict(lr_mult=2), "conv2": dict(decay_mult=3), "s": dict(lr_mult=7)}),
    "dot": dict(custom_keys={".param1": dict(lr_mult=2), "same.0.bias": dict(decay_mult=0.0)}, norm_decay_mult=0),
    "alphabetical": dict(custom_keys={"sub.g": dict(lr_mult=2), "sub.d": dict(lr_mult=3), "b.gn.": dict(lr_mult=5)}),
}
for _name, _paramwise in PARAMWISE.items():
    CASES[f"param groups, {_name}"] = dict(what="groups", paramwise=_paramwise)


def groups(case: dict[str, Any], api: Any, folder: str) -> Any:
    model = Net()
    names = {id(param): name for name, param in model.named_parameters()}
    cfg = dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.1, paramwise_cfg=case["paramwise"])
    optimizer = api.build_optimizer(model, cfg)
    return [
        ([names[id(param)] for param in group["params"]], group["lr"], group["weight_decay"], group["momentum"])
        for group in optimizer.param_groups
    ]


# ---------------------------------------------------------------- initial values

INITS: dict[str, Any] = {
    "constant": dict(type="Constant", val=2, bias=3, layer="Linear"),
    "constant, bias_prob": dict(type="Constant", val=2, bias_prob=0.01, layer=["Linear", "Conv2d"]),
    "no layer": dict(type="Constant", val=2),
    "base class": dict(type="Constant", val=2, layer="_BatchNorm"),
    "xavier": dict(type="Xavier", layer="Linear", gain=2, bias=0.5),
    "xavier uniform": dict(type="Xavier", layer="Conv2d", distribution="uniform"),
    "normal": dict(type="Normal", layer="Linear", mean=1, std=0.1),
    "trunc normal": dict(type="TruncNormal", layer="Linear", mean=0.5, std=1, a=-1, b=1),
    "uniform": dict(type="Uniform", layer="Linear", a=-1, b=2, bias=1),
    "kaiming": dict(type="Kaiming", layer="Conv2d"),
    "kaiming fan_in uniform": dict(type="Kaiming", layer="Conv2d", a=1, mode="fan_in", distribution="uniform"),
    "caffe2": dict(type="Caffe2Xavier", layer=["Linear", "Conv2d"]),
    "list": [dict(type="Constant", val=1, layer="Linear"), dict(type="Constant", val=2, layer="Conv2d", bias=1)],
    "override by name": dict(type="Constant", val=1, bias=2, layer="Linear", override=dict(name="conv")),
    "override": dict(type="Constant", val=1, layer="Linear", override=dict(type="Normal", name="conv", std=0.5)),
    "override only": dict(
        type="Constant", val=1, override=[dict(name="conv"), dict(type="Constant", val=5, name="bn", bias=6)]
    ),
}
for _name, _cfg in INITS.items():
    CASES[f"init, {_name}"] = dict(what="init", cfg=_cfg)


def init(case: dict[str, Any], api: Any, folder: str) -> Any:
    model = nn.ModuleDict(dict(conv=nn.Conv2d(2, 2, 1), linear=nn.Linear(3, 2), bn=nn.BatchNorm2d(2)))
    for param in model.parameters():
        nn.init.constant_(param, -7.0)
    torch.manual_seed(1)
    find(api, "initialize")(model, case["cfg"])
    # Six digits: the last one or two bits of a float32 may differ between CPUs (log, cos and erfinv are vectorised).
    return {name: [round(x, 5) for x in param.flatten().tolist()] for name, param in model.named_parameters()}


CASES["init_weights of nested modules"] = dict(what="init_weights")


def init_weights(case: dict[str, Any], api: Any, folder: str) -> Any:
    """Values and the record in the log file, of a module with a child that does more by itself."""

    class Head(api.BaseModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(dict(type="Constant", layer="Linear", val=3))
            self.fc = nn.Linear(2, 1)
            self.scale = nn.Parameter(torch.zeros(2))

        def init_weights(self) -> None:
            super().init_weights()
            with torch.no_grad():
                self.scale.fill_(5.0)

    class Model(api.BaseModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            override = dict(type="Constant", name="last", val=8.0)
            super().__init__(dict(type="Constant", layer=["Conv2d", "Linear"], val=1, bias=2, override=override))
            self.conv = nn.Conv2d(1, 1, 1)
            self.head = Head()
            self.bn = nn.BatchNorm2d(1)
            self.blocks = api.Sequential(nn.Linear(1, 1), init_cfg=dict(type="Constant", layer="Linear", val=4.0))
            self.list = api.ModuleList([nn.Conv1d(1, 1, 1)], init_cfg=dict(type="Constant", layer="Conv1d", val=6.0))
            self.dict = api.ModuleDict(dict(a=nn.Linear(1, 1)), init_cfg=dict(type="Constant", layer="Linear", val=9.0))
            self.last = nn.Linear(1, 1)

    model = Model()
    logger = find(api, "get_logger")("golden", os.path.join(folder, "init.log"))
    names = importlib.import_module("mmcv.utils.logging" if api.__name__ != "fastrunner" else "fastrunner.log.setup")
    before = dict(names.logger_initialized)
    names.logger_initialized.clear()
    names.logger_initialized["golden"] = True
    logger.setLevel(logging.CRITICAL)
    try:
        model.init_weights()
    finally:
        for handler in logger.handlers[:]:
            handler.close()
            logger.removeHandler(handler)
        names.logger_initialized.clear()
        names.logger_initialized.update(before)
        names.logger_initialized.pop("golden", None)
    with open(os.path.join(folder, "init.log"), encoding="utf-8") as file:
        text = file.read()
    values = {name: param.flatten().tolist() for name, param in model.named_parameters()}
    left = [hasattr(module, "_params_init_info") for module in model.modules()]
    return dict(values=values, log=text, left=any(left), is_init=model.is_init, repr=repr(model))


# ---------------------------------------------------------------- precision

CASES["cast_tensor_type"] = dict(what="cast")
CASES["decorators"] = dict(what="decorators")
CASES["LossScaler"] = dict(what="loss_scaler")


def cast(case: dict[str, Any], api: Any, folder: str) -> Any:
    inputs = [torch.ones(1), torch.ones(1, dtype=torch.float64), dict(a=torch.ones(1), b=[torch.ones(1), 3]), "s", 2.5]
    inputs += [(torch.ones(1, dtype=torch.int32), torch.zeros(1)), {1, 2}, None]
    turn = find(api, "cast_tensor_type")
    return [facts(turn(each, torch.float32, dtype)) for each in inputs for dtype in (torch.float16, torch.int32)]


def decorators(case: dict[str, Any], api: Any, folder: str) -> Any:
    def make(decorator: Any) -> Any:
        class Module(nn.Module):
            @decorator
            def forward(self, x: Any, y: Any = None, *, z: Any = None) -> Any:
                return [x, y, z]

        return Module()

    results = {}
    half, single = torch.ones(1, dtype=torch.float16), torch.ones(1)
    for name, options in (
        ("auto_fp16", {}),
        ("auto_fp16", dict(apply_to=("x",))),
        ("auto_fp16", dict(apply_to=("x", "y"), out_fp32=True)),
        ("auto_fp16", dict(apply_to=("z",))),
        ("force_fp32", {}),
        ("force_fp32", dict(apply_to=("y",))),
        ("force_fp32", dict(apply_to=("x", "z"), out_fp16=True)),
    ):
        for enabled in (None, False, True):
            module = make(find(api, name)(**options))
            if enabled is not None:
                module.fp16_enabled = enabled
            calls = [module(single, half), module(half, y=single, z=half), module(x=[single, half], z=single)]
            results[f"{name} {options} {enabled}"] = facts(calls)
    wrapped = nn.Sequential(make(find(api, "auto_fp16")()), nn.Linear(1, 1))
    wrapped[0].fp16_enabled = False
    api.wrap_fp16_model(wrapped)
    results["wrap_fp16_model"] = [getattr(module, "fp16_enabled", None) for module in wrapped.modules()]
    return results


def loss_scaler(case: dict[str, Any], api: Any, folder: str) -> Any:
    seen = []
    for options in (dict(init_scale=8.0, scale_window=3), dict(init_scale=4.0, mode="static")):
        scaler = api.LossScaler(**options)
        for overflow in (False, False, False, True, True, True, True, False, False, False, False):
            scaler.update_scale(overflow)
            seen.append(scaler.loss_scale)
        seen.append(scaler.state_dict())
    return seen


# ---------------------------------------------------------------- batches

CASES["collate"] = dict(what="collate")
CASES["scatter to the CPU"] = dict(what="scatter")


def samples(api: Any) -> list[Any]:
    container = find(api, "DataContainer")
    return [
        dict(
            img=container(torch.full((1, 2 + i, 2), 1.0 + i), stack=True, padding_value=-1),
            volume=container(torch.full((1, 1 + i, 1, 2 - i), 2.0), stack=True, pad_dims=3),
            line=container(torch.full((1, 1 + i), 3.0), stack=True, pad_dims=1),
            same=container(torch.tensor(float(i)), stack=True, pad_dims=None),
            metas=container(dict(name=f"{i}"), cpu_only=True),
            boxes=container(torch.full((i, 4), 1.0)),
            index=i,
            pair=(torch.tensor([float(i)]), i),
            nested=dict(deep=[container([i], cpu_only=True)]),
        )
        for i in (0, 1)
    ]


def collate(case: dict[str, Any], api: Any, folder: str) -> Any:
    batch = samples(api)
    return [facts(find(api, "collate")(batch, samples_per_gpu=count)) for count in (1, 2, 3)]


def scatter(case: dict[str, Any], api: Any, folder: str) -> Any:
    batch = find(api, "collate")(samples(api), samples_per_gpu=2)
    give = find(api, "scatter_kwargs")
    calls: list[Any] = [
        ((batch, None, 3), dict(optimizer="o")),
        ((), {}),
        (([], {}), dict(a=())),
        ((batch["pair"],), {}),
    ]
    return [facts(give(args, kwargs, [-1])) for args, kwargs in calls]


# ---------------------------------------------------------------- loading

CASES["reports of load_state_dict"] = dict(what="reports")
CASES["load_checkpoint"] = dict(what="load")
CASES["digit_version"] = dict(what="versions")


def reports(case: dict[str, Any], api: Any, folder: str) -> Any:
    found: list[Any] = []
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    good = model.state_dict()
    states = [
        good,
        {**good, "extra": torch.ones(1), "more.extra": torch.ones(1)},
        {key: value for key, value in good.items() if key != "0.bias"},
        {key: value for key, value in good.items() if "num_batches_tracked" not in key},
        {**good, "0.weight": torch.ones(3, 3)},
        {"0.weight": torch.ones(3, 3), "x": torch.ones(1)},
        {},
    ]
    for state in states:
        for strict in (False, True):
            logger, lines = make_logger()
            try:
                api.load_state_dict(model, state, strict=strict, logger=logger)
            except RuntimeError as error:
                lines.append(f"RuntimeError {error}")
            found.append(lines)
    return found


def load(case: dict[str, Any], api: Any, folder: str) -> Any:
    path = os.path.join(folder, "a.pth")
    wrapped = {f"module.{key}": value for key, value in nn.Linear(2, 1).state_dict().items()}
    torch.save(dict(state_dict=wrapped, meta=dict(epoch=1)), path)
    found: list[Any] = []
    for pairs in ([(r"^module\.", "")], [(r"^module\.", "head."), (r"weight", "w")]):
        logger, lines = make_logger()
        content = api.load_checkpoint(nn.Linear(2, 1), path, logger=logger, revise_keys=pairs)
        found.append([lines, sorted(content["state_dict"])])
    found.append(sorted(find(api, "_load_checkpoint_with_prefix")("module", path)))
    api.save_checkpoint(nn.DataParallel(nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))), path, meta=dict(iter=3))
    content = torch.load(path, weights_only=False)
    found.append([sorted(content), sorted(content["state_dict"]), sorted(content["meta"])])
    return [str(each).replace(folder, "<folder>") for each in found]


def versions(case: dict[str, Any], api: Any, folder: str) -> Any:
    texts = (
        "1.13.1",
        "1.13.0+cu117",
        "2.0.0rc1",
        "2.0.0b1",
        "1.10.0.dev0",
        "1.2",
        "1.13.0.post2",
        "1.0a2",
        "1.2.3.4.5",
    )
    return [find(api, "digit_version")(text) for text in texts]


def run(case: dict[str, Any], api: Any, folder: str) -> Any:
    return globals()[case["what"]](case, api, folder)
