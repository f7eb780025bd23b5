"""BaseModule: who wins, what is done once, and what the log says. The goldens hold MMCV's own values and log."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fastrunner import BaseModule, ModuleDict, ModuleList, Sequential, save_checkpoint


class Head(BaseModule):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.fc = nn.Linear(2, 1)


class Model(BaseModule):
    def __init__(self, head, init_cfg=None):
        super().__init__(init_cfg)
        self.head = head


def constant(val):
    return dict(type="Constant", layer="Linear", val=val)


def test_the_inner_cfg_wins_and_the_cfg_is_a_copy():
    cfg = constant(3.0)
    model = Model(Head(cfg), constant(1.0))
    cfg["val"] = 9.0
    model.init_weights()
    assert model.head.fc.weight.eq(3.0).all()
    assert model.is_init
    assert model.head.is_init


def test_the_second_call_changes_nothing_and_warns():
    model = Model(Head(constant(3.0)))
    model.init_weights()
    nn.init.zeros_(model.head.fc.weight)
    with pytest.warns(UserWarning, match="init_weights of Model has been called more than once"):
        model.init_weights()
    assert model.head.fc.weight.eq(0.0).all()


def test_children_of_a_pretrained_module_keep_what_was_loaded(tmp_path):
    trained = Model(Head())
    save_checkpoint(trained, str(tmp_path / "a.pth"))
    model = Model(Head(constant(3.0)), dict(type="Pretrained", checkpoint=str(tmp_path / "a.pth")))
    model.init_weights()
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    assert not any(hasattr(module, "_params_init_info") for module in model.modules())
    assert model.is_init


def test_the_record_goes_when_initialisation_fails():
    class Replaces(Head):
        def init_weights(self):
            self.fc = nn.Linear(2, 1)

    model = Model(Replaces())
    with pytest.raises(ValueError, match=r"fc\.weight of Replaces appeared during init_weights"):
        model.init_weights()
    assert not hasattr(model, "_params_init_info")


def test_without_a_log_file_the_record_goes_to_the_logger(caplog):
    with caplog.at_level(logging.INFO):
        Head(constant(3.0)).init_weights()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "initialize Head with init_cfg" in text
    assert "fc.weight - torch.Size([1, 2]): \nConstantInit: val=3.0, bias=0" in text


def test_integer_and_empty_parameters_do_not_disturb():
    model = Head(constant(1.0))
    model.register_parameter("table", nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False))
    model.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    model.init_weights()
    assert model.fc.weight.eq(1.0).all()


def test_containers_are_containers():
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    assert Sequential(first, second)(torch.ones(1, 2)).shape == (1, 1)
    assert list(ModuleList([first, second])) == [first, second]
    assert ModuleDict(dict(a=first))["a"] is first
    assert repr(ModuleList([first], constant(1))).endswith(f"init_cfg={constant(1)}")
