"""The decorators beside MMCV's goldens: extra arguments, other types, autocast, bfloat16."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from fastrunner import LossScaler, auto_fp16, force_fp32, wrap_fp16_model
from fastrunner.model.precision import cast_tensor_type, patch_norm_fp32

Pair = namedtuple("Pair", "image label")
HALF, SINGLE = torch.float16, torch.float32


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fp16_enabled = False
        self.linear = nn.Linear(4, 4)
        self.seen = []

    @auto_fp16(apply_to=("x",))
    def forward(self, x, *others, scale=1.0, **more):
        self.seen += [x.dtype, [other.dtype for other in others], sorted(more)]
        return self.loss(self.linear(x) * scale)

    @force_fp32()
    def loss(self, x):
        self.seen += [x.dtype, torch.is_autocast_enabled("cpu")]
        return x.sum()


def test_a_real_layer_runs_in_half_and_its_loss_in_float32():
    net, x = Net(), torch.ones(2, 4)
    expected = net(x)
    assert net.seen == [SINGLE, [], [], SINGLE, False]
    wrap_fp16_model(net)
    net.seen.clear()
    loss = net(x, torch.ones(1), scale=1.0, name=3)
    # what the signature does not name (MMCV drops it) arrives as it is
    assert net.seen == [HALF, [SINGLE], ["name"], SINGLE, False]
    assert loss.dtype is SINGLE
    assert loss.item() == pytest.approx(expected.item(), abs=8 * 2**-10)  # 8 values, float16 has 11 bits


def test_bfloat16():
    net = Net()
    wrap_fp16_model(net, torch.bfloat16)
    net(torch.ones(2, 4))
    assert net.seen[0] is torch.bfloat16
    with pytest.raises(ValueError, match=r"float16 or torch\.bfloat16, got torch\.float64"):
        wrap_fp16_model(net, torch.float64)


def test_only_modules_that_ask_for_it_are_switched():
    plain = nn.Linear(1, 1)
    wrap_fp16_model(nn.Sequential(plain, Net()))
    assert not hasattr(plain, "fp16_enabled")


def test_named_tuples_and_iterators():
    cast = cast_tensor_type(Pair(torch.ones(1), [torch.ones(1)]), SINGLE, HALF)
    assert type(cast) is Pair
    assert (cast.image.dtype, cast.label[0].dtype) == (HALF, HALF)
    iterator = iter([torch.ones(1)])
    assert cast_tensor_type(iterator, SINGLE, HALF) is iterator
    assert cast_tensor_type(range(3), SINGLE, HALF) == range(3)


@pytest.mark.parametrize("decorator", [auto_fp16, force_fp32])
def test_only_methods_of_modules(decorator):
    class Plain:
        @decorator()
        def method(self):
            pass

    with pytest.raises(TypeError, match=f"@{decorator.__name__} can only be used.* of Module, not of Plain"):
        Plain().method()


def test_other_types_can_be_allowed():
    class Plain:
        fp16_enabled = True

        @auto_fp16(supported_types=(object,))
        def method(self, x):
            return x.dtype

    assert Plain().method(torch.ones(1)) is HALF


def test_the_name_and_signature_stay():
    assert Net.loss.__name__ == "loss"
    assert Net.loss.__wrapped__ is not None


def test_loss_scaler_reads_overflow_and_resumes():
    param = nn.Parameter(torch.zeros(2))
    scaler = LossScaler()
    assert not scaler.has_overflow([param])
    param.grad = torch.tensor([0.0, float("inf")])
    assert scaler.has_overflow([param])
    assert not LossScaler(mode="static").has_overflow([param])
    scaler.update_scale(True)
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    with pytest.raises(ValueError, match="'sometimes'"):
        LossScaler(mode="sometimes")


def test_norms_of_a_model_made_half_stay_float32():
    model = patch_norm_fp32(nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)).half())
    assert [param.dtype for param in model.parameters()] == [HALF, HALF, SINGLE, SINGLE, SINGLE, SINGLE]
    x = torch.rand(2, 4, 3, 3, dtype=HALF)
    assert model[1](x).dtype is HALF
    expected = nn.functional.group_norm(x.float(), 2)
    torch.testing.assert_close(model[1](x), expected.half())  # rounded once, at the end
