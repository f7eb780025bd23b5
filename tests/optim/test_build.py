"""build_optimizer and paramwise_cfg, against MMCV's rules written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastrunner import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor, FusedSGD, build_optimizer

BASE = dict(type="SGD", lr=0.01, weight_decay=0.1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.param1 = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.conv2 = nn.Conv2d(4, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.sub = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.GroupNorm(3, 3))
        self.sub.register_parameter("param1", nn.Parameter(torch.ones(1)))
        self.frozen = nn.Linear(1, 1, bias=False).requires_grad_(False)


def groups_of(cfg, model=None):
    model = model or Model()
    optimizer = build_optimizer(model, cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}, optimizer


def test_without_paramwise_there_is_one_group():
    _, optimizer = groups_of(BASE)
    assert type(optimizer) is torch.optim.SGD
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(Model().parameters()))


def test_every_rule():
    mults = dict(bias_lr_mult=2, bias_decay_mult=0.5, norm_decay_mult=0, dwconv_decay_mult=0.1)
    got, optimizer = groups_of({**BASE, "paramwise_cfg": mults})
    assert got == {
        "param1": (0.01, 0.1),
        "conv1.weight": (0.01, 0.1),
        "conv2.weight": (0.01, 0.1),
        "conv2.bias": (0.02, 0.05),
        "bn.weight": (0.01, 0.0),
        "bn.bias": (0.01, 0.0),
        "sub.param1": (0.01, 0.1),
        "sub.0.weight": (0.01, 0.1 * 0.1),  # depthwise: weight and bias
        "sub.0.bias": (0.02, 0.1 * 0.1),
        "sub.1.weight": (0.01, 0.0),
        "sub.1.bias": (0.01, 0.0),
        "frozen.weight": (0.01, 0.1),
    }
    assert len(optimizer.param_groups) == len(got)  # a group a parameter


def test_the_longest_custom_key_wins_and_turns_other_rules_off():
    custom = {"param1": dict(lr_mult=10), "sub": dict(lr_mult=0.1, decay_mult=0), "sub.0": dict(lr_mult=0.9)}
    got, _ = groups_of({**BASE, "paramwise_cfg": dict(custom_keys=custom, norm_decay_mult=0, bias_lr_mult=2)})
    assert got["param1"] == (0.1, 0.1)
    assert got["sub.param1"] == (0.1, 0.1)  # "param1" is longer than "sub"
    assert got["sub.0.bias"] == (0.01 * 0.9, 0.1)
    assert got["sub.1.weight"] == (0.001, 0.0)
    assert got["conv2.bias"] == (0.02, 0.1)


def test_shared_parameters():
    model = nn.ModuleDict(dict(a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 1, bias=False)))
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        groups_of({**BASE, "paramwise_cfg": dict(bias_lr_mult=2)}, model)
    with pytest.warns(UserWarning, match="^b is duplicate.*bypass_duplicate=True"):
        got, _ = groups_of({**BASE, "paramwise_cfg": dict(bypass_duplicate=True)}, model)
    assert list(got) == ["a.weight"]


def test_wrappers_and_other_optimizers_and_constructors():
    model = nn.DataParallel(Model())
    assert isinstance(build_optimizer(model, dict(type="FusedSGD", lr=0.1)), FusedSGD)
    assert isinstance(build_optimizer(model, dict(type="AdamW")), torch.optim.AdamW)

    @OPTIMIZER_BUILDERS.register_module(force=True)
    class Half(DefaultOptimizerConstructor):
        def __call__(self, model):
            optimizer = super().__call__(model)
            optimizer.param_groups[0]["lr"] = self.base_lr / 2
            return optimizer

    assert build_optimizer(Model(), {**BASE, "constructor": "Half"}).param_groups[0]["lr"] == 0.005


def test_the_config_is_not_changed():
    cfg = {**BASE, "paramwise_cfg": dict(bias_lr_mult=2)}
    before = repr(cfg)
    build_optimizer(Model(), cfg)
    assert repr(cfg) == before


@pytest.mark.parametrize(
    ("cfg", "error", "says"),
    [
        ("SGD", TypeError, "optimizer's config must be a dict"),
        (dict(lr=0.1), KeyError, "type"),
        (dict(type="SDG", lr=0.1), KeyError, "SGD"),
        (dict(type="SGD", lr=0.1, paramwise_cfg=[1]), TypeError, "paramwise_cfg should be a dict"),
        (
            dict(type="SGD", lr=0.1, paramwise_cfg=dict(norm_decay_mult=0)),
            ValueError,
            "norm_decay_mult multiply weight",
        ),
        (dict(type="SGD", paramwise_cfg=dict(bias_lr_mult=2)), ValueError, "bias_lr_mult multiply lr"),
        (
            dict(type="SGD", lr=0.1, paramwise_cfg=dict(bias_lr=2)),
            KeyError,
            "did you mean bias_lr_mult instead",
        ),
        (
            dict(type="SGD", lr=0.1, paramwise_cfg=dict(custom_keys=dict(a=dict(lr_mul=2)))),
            KeyError,
            r"custom_keys.*a.* has no lr_mul; did you mean lr_mult",
        ),
        (dict(type="SGD", lr=0.1, paramwise_cfg=dict(custom_keys=3)), TypeError, "custom_keys should be a dict"),
    ],
)
def test_bad_input(cfg, error, says):
    with pytest.raises(error, match=says):
        build_optimizer(Model(), cfg)


def test_a_subclass_may_have_keys_of_its_own():
    @OPTIMIZER_BUILDERS.register_module(force=True)
    class LayerDecay(DefaultOptimizerConstructor):
        def add_params(self, params, module, prefix="", is_dcn_module=None):
            for name, param in module.named_parameters():
                lr = self.base_lr * self.paramwise_cfg["decay_rate"] ** name.count(".")
                params.append(dict(params=[param], lr=lr))

    got, _ = groups_of({**BASE, "constructor": "LayerDecay", "paramwise_cfg": dict(decay_rate=0.5)})
    assert got["param1"] == (0.01, 0.1)
    assert got["sub.0.bias"] == (0.01 * 0.25, 0.1)


class ModulatedDeformConv2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.ones(1))


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):  # mmcv.ops' own subclass has the offsets
    def __init__(self):
        super().__init__()
        self.conv_offset = nn.Conv2d(1, 1, 1)


def test_offset_convolutions_of_deformable_ones():
    model = nn.ModuleDict(dict(dcn=ModulatedDeformConv2dPack(), conv_offset=nn.Conv2d(2, 2, 1)))
    mults = dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2, bias_decay_mult=0)
    got, _ = groups_of({**BASE, "paramwise_cfg": mults}, model)
    assert got == {
        "dcn.weight": (0.01, 0.1),
        "dcn.bias": (0.02, 0.0),  # its parent is no deformable convolution
        "dcn.conv_offset.weight": (0.01 * 0.1, 0.1),
        "dcn.conv_offset.bias": (0.01 * 0.1, 0.1),
        "conv_offset.weight": (0.01, 0.1),
        "conv_offset.bias": (0.02, 0.0),
    }


def test_a_wrapper_that_nobody_registered():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    optimizer = build_optimizer(
        Wrapper(Wrapper(Model())), {**BASE, "paramwise_cfg": dict(custom_keys={".param1": dict(lr_mult=2)})}
    )
    assert optimizer.param_groups[0]["lr"] == 0.02  # ".param1" at the top level of the model inside

    model = Wrapper(nn.Linear(1, 1))
    model.head = nn.Linear(1, 1)  # a model with a part called module: all of it counts
    assert len(build_optimizer(model, {**BASE, "paramwise_cfg": dict(bias_lr_mult=2)}).param_groups) == 4
