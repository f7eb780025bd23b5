"""Models to and from checkpoints: reports, wrappers, key revision, metadata."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fastrunner import get_state_dict, load_checkpoint, load_state_dict, save_checkpoint, weights_to_cpu
from fastrunner.checkpoint.sources import _load_checkpoint_with_prefix
from fastrunner.registry import MODULE_WRAPPERS


class Versioned(nn.Module):
    """Wants to know the version of the state it loads."""

    _version = 3

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.loaded_version = None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.loaded_version = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Versioned())


def test_round_trip_with_metadata(tmp_path):
    torch.manual_seed(1)
    first, second = net(), net()
    save_checkpoint(first, str(tmp_path / "a.pth"), meta=dict(epoch=1))
    content = load_checkpoint(second, str(tmp_path / "a.pth"), strict=True)
    assert content["meta"]["epoch"] == 1
    assert set(content["meta"]) == {"epoch", "fastrunner_version", "time"}
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert second[2].loaded_version == 3


def test_wrappers_at_any_depth_leave_no_trace():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    MODULE_WRAPPERS.register_module(name="TestWrapper", module=Wrapper, force=True)
    plain = net()
    wrapped = Wrapper(nn.Sequential(plain[0], Wrapper(plain[1]), Wrapper(Wrapper(plain[2]))))
    assert list(get_state_dict(wrapped)) == list(plain.state_dict())
    other = net()
    other[0].weight.data.fill_(7.0)
    load_state_dict(wrapped, other.state_dict(), strict=True)
    assert plain[0].weight.data.eq(7.0).all()
    MODULE_WRAPPERS.module_dict.pop("TestWrapper", None)


def test_other_shapes_and_keys_are_reported_not_raised(caplog):
    model = nn.Linear(2, 1)
    state = {"weight": torch.ones(3, 3), "extra": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        load_state_dict(model, state, logger=logging.getLogger("x"))
    (record,) = caplog.records
    report = record.getMessage()
    assert report.startswith("The model and loaded state dict do not match exactly\n")
    assert "size mismatch for weight" in report
    assert "unexpected key in source state_dict: extra\n" in report
    assert "missing keys in source state_dict: bias\n" in report
    with pytest.raises(RuntimeError, match="unexpected key in source state_dict: extra"):
        load_state_dict(model, state, strict=True)


def test_files_older_than_num_batches_tracked_load_strictly():
    model = nn.BatchNorm2d(2)
    state = model.state_dict()
    del state["num_batches_tracked"]
    load_state_dict(model, state, strict=True)


def test_revise_keys_and_bare_state_dicts(tmp_path):
    torch.save({"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)}, tmp_path / "bare.pth")
    model = nn.Linear(2, 1)
    load_checkpoint(model, str(tmp_path / "bare.pth"), strict=True)
    assert model.weight.data.eq(1).all()
    inner = nn.ModuleDict(dict(head=nn.Linear(2, 1)))
    load_checkpoint(inner, str(tmp_path / "bare.pth"), strict=True, revise_keys=[(r"^module\.", "head.")])
    assert inner["head"].weight.data.eq(1).all()


def test_classes_are_kept_and_optimizers_of_a_dict_too(tmp_path):
    model = nn.Linear(1, 1)
    model.CLASSES = ("cat", "dog")
    optimizers = dict(a=torch.optim.SGD(model.parameters(), lr=0.1), b=torch.optim.Adam(model.parameters()))
    save_checkpoint(model, str(tmp_path / "c.pth"), optimizers)
    content = load_checkpoint(model, str(tmp_path / "c.pth"))
    assert content["meta"]["CLASSES"] == ("cat", "dog")
    assert content["optimizer"]["a"]["param_groups"][0]["lr"] == 0.1


def test_weights_to_cpu_keeps_metadata():
    assert weights_to_cpu(net().state_dict())._metadata["2"] == {"version": 3}


def test_a_file_that_is_not_a_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(RuntimeError, match=r"No state_dict found in checkpoint file .*list\.pth"):
        load_checkpoint(nn.Linear(1, 1), str(tmp_path / "list.pth"))


def test_a_prefix_ends_at_a_dot(tmp_path):
    model = nn.ModuleDict(dict(conv2d=nn.Conv2d(1, 1, 1), conv2d_2=nn.Conv2d(1, 1, 2)))
    save_checkpoint(model, str(tmp_path / "p.pth"))
    part = _load_checkpoint_with_prefix("conv2d", str(tmp_path / "p.pth"))
    assert {key: tuple(value.shape) for key, value in part.items()} == dict(weight=(1, 1, 1, 1), bias=(1,))
    with pytest.raises(KeyError, match=r"conv is not in .*its keys begin with \['conv2d', 'conv2d_2'\]"):
        _load_checkpoint_with_prefix("conv", str(tmp_path / "p.pth"))


def test_the_state_of_a_part_into_a_dict():
    into = {"other": torch.ones(1)}
    state = get_state_dict(nn.Linear(1, 1), into, prefix="head.", keep_vars=True)
    assert state is into
    assert sorted(state) == ["head.bias", "head.weight", "other"]
    assert isinstance(state["head.weight"], nn.Parameter)


def test_only_local_files_are_written(tmp_path):
    save_checkpoint(nn.Linear(1, 1), str(tmp_path / "a.pth"), file_client_args=dict(backend="disk"))
    with pytest.raises(ValueError, match="petrel"):
        save_checkpoint(nn.Linear(1, 1), "s3://a.pth", file_client_args=dict(backend="petrel"))


@pytest.mark.parametrize("revise", [[(r"^backbone\.", "neck.")], [(r"^backbone\.", "x."), (r"^x\.", "neck.")]])
def test_versions_follow_revised_keys(tmp_path, revise):
    save_checkpoint(nn.ModuleDict(dict(backbone=Versioned())), str(tmp_path / "v.pth"))
    model = nn.ModuleDict(dict(neck=Versioned()))
    load_checkpoint(model, str(tmp_path / "v.pth"), strict=True, revise_keys=revise)
    assert model["neck"].loaded_version == 3


def test_a_wrapper_that_is_no_module_and_a_home_folder(tmp_path, monkeypatch):
    class Bare:
        def __init__(self, module):
            self.module = module

    MODULE_WRAPPERS.register_module(name="BareWrapper", module=Bare, force=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = net()
    assert list(get_state_dict(Bare(plain))) == list(plain.state_dict())
    save_checkpoint(Bare(plain), str(tmp_path / "w.pth"))
    load_checkpoint(Bare(net()), "~/w.pth", strict=True)
    MODULE_WRAPPERS.module_dict.pop("BareWrapper", None)
