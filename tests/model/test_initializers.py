"""What the goldens do not say of init_cfg: bad input, modules without weights, layers of half precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastrunner import initialize, save_checkpoint
from fastrunner.model import initializers as init


def test_bias_prob_is_what_a_sigmoid_gives():
    assert torch.sigmoid(torch.tensor(init.bias_init_with_prob(0.01))).item() == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("name", ["constant_init", "xavier_init", "normal_init", "trunc_normal_init", "uniform_init"])
def test_modules_without_weight_or_bias_are_left_alone(name):
    arguments = dict(val=1.0) if name == "constant_init" else {}
    getattr(init, name)(nn.ReLU(), **arguments)
    linear = nn.Linear(3, 2, bias=False)
    getattr(init, name)(linear, **arguments)
    assert linear.bias is None


def test_trunc_normal_is_a_cut_normal_distribution():
    torch.manual_seed(3)
    values = init.trunc_normal_(torch.empty(200_000), mean=1.0, std=2.0, a=-1.0, b=2.0)
    assert values.min() >= -1.0
    assert values.max() <= 2.0
    # mean of a cut normal: mu + sigma * (phi(alpha) - phi(beta)) / (Phi(beta) - Phi(alpha))
    alpha, beta = -1.0, 0.5
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (alpha, beta)]
    cumulative = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in (alpha, beta)]
    expected = 1.0 + 2.0 * (density[0] - density[1]) / (cumulative[1] - cumulative[0])
    assert values.mean().item() == pytest.approx(expected, abs=0.01)  # 5 standard errors of 200,000 draws


def test_pretrained_and_its_prefix():
    source = nn.ModuleDict(dict(backbone=nn.Linear(2, 1)))
    save_checkpoint(source, "a.pth")
    whole = nn.ModuleDict(dict(backbone=nn.Linear(2, 1)))
    initialize(whole, dict(type="Pretrained", checkpoint="a.pth"))
    part = nn.Linear(2, 1)
    initialize(part, dict(type="Pretrained", checkpoint="a.pth", prefix="backbone"))
    for loaded in (whole["backbone"], part):
        assert torch.equal(loaded.weight, source["backbone"].weight)
    with pytest.raises(KeyError, match=r"neck is not in a\.pth: its keys begin with \['backbone'\]"):
        initialize(part, dict(type="Pretrained", checkpoint="a.pth", prefix="neck"))


@pytest.mark.parametrize(
    ("cfg", "error", "says"),
    [
        (3, TypeError, "init_cfg must be a dict or a list of dict"),
        (dict(type="Constant"), TypeError, "ConstantInit: .*missing 1 required positional argument: 'val'"),
        (dict(type="Konstant", val=1), KeyError, "did you mean Constant"),
        (dict(type="Constant", val=1, layers="Linear"), TypeError, "did you mean layer instead of layers"),
        (dict(type="Constant", val=1, bias="x"), TypeError, "bias must be a number"),
        (dict(type="Constant", val=1, bias_prob=1), TypeError, "bias_prob type must be float"),
        (dict(type="Constant", val=1, layer=3), TypeError, "layer must be a str or a list of str"),
        (dict(type="Constant", val=1, override=3), TypeError, "override must be a dict or a list of dict"),
        (dict(type="Constant", val=1, override=dict(val=2)), ValueError, 'must contain the key "name"'),
        (dict(type="Constant", val=1, override=dict(name="fc", val=2)), ValueError, 'need "type" key'),
        (dict(type="Constant", val=1, override=dict(name="no")), RuntimeError, r"attribute no.*it has \['fc'\]"),
        (dict(type="Xavier", layer="Linear", distribution="x"), ValueError, r"one of \['normal', 'uniform'\], got 'x'"),
    ],
)
def test_bad_input(cfg, error, says):
    with pytest.raises(error, match=says):
        initialize(nn.ModuleDict(dict(fc=nn.Linear(1, 1))), cfg)


def test_an_initializer_that_does_not_say_how():
    with pytest.raises(TypeError, match="override init"):
        init.BaseInit(layer="Linear")(nn.Linear(1, 1))
