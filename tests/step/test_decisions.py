"""What auto keeps on disk: found again for the same run, not for another; files that are no use are one warning."""

from __future__ import annotations

import json

import pytest
import torch
from step.zoo import ZOO, vectors

from fastrunner.step import decisions
from fastrunner.step.decisions import Decision, key_of, load, save
from fastrunner.step.guards import batch_key

MADE = Decision("graph", "bf16", True, ("0.1 ms against 0.3",))


def key(family="mlp", size=8, choices=None, lr=1.0):
    torch.manual_seed(0)
    made = ZOO[family]
    model = made.model()
    optimizer = made.optimizer(model.parameters())
    optimizer.param_groups[0]["lr"] *= lr
    return key_of(model, optimizer, batch_key(vectors(0, size=size)), choices)


@pytest.fixture
def told():
    return []


def test_a_decision_is_found_again(told):
    save("k" * 32, MADE, told.append)
    assert load("k" * 32, told.append) == MADE
    assert load("l" * 32, told.append) is None
    assert told == []
    assert [path.name for path in decisions.folder().iterdir()] == ["k" * 32 + ".json"]  # no temporary file stays


def test_the_name_follows_from_what_a_decision_depends_on(monkeypatch):
    first = key()
    assert first is not None
    assert key() == first
    assert key(lr=0.5) == first  # the size of a number changes no speed
    others = {first, key("autoencoder"), key(size=9), key(choices="amp")}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.add(key())
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "9.9")
    others.add(key())
    assert len(others) == 6


def test_source_that_cannot_be_read_gives_no_name():
    made = {}
    exec("import torch\nclass Typed(torch.nn.Linear):\n    pass", dict(__name__="nowhere"), made)
    model = made["Typed"](2, 2)
    assert key_of(model, torch.optim.SGD(model.parameters()), (), None) is None


def entry(**change):
    decision = dict(recipe="graph", amp=None, channels_last=False, measured=[])
    return json.dumps(dict(format=1, key="k" * 32, decision={**decision, **change.pop("decision", {})}) | change)


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "{",
        "[]",
        "\x00\x01",
        entry(format=2),
        entry(key="other"),
        entry(decision=dict(recipe="fastest")),
        entry(decision=dict(amp="int8")),
        entry(decision=dict(channels_last="yes")),
        entry(decision=dict(unknown=1)),
        entry(decision=dict(measured=3)),
    ],
)
def test_a_file_that_is_no_decision_is_one_warning(contents, told):
    decisions.folder().mkdir(parents=True)
    (decisions.folder() / f"{'k' * 32}.json").write_text(contents)
    assert load("k" * 32, told.append) is None
    assert len(told) == 1
    assert "auto measures again" in told[0]
    save("k" * 32, MADE, told.append)  # and the next run finds a good one
    assert load("k" * 32, told.append) == MADE


def test_a_full_disk_is_one_warning_and_leaves_nothing(told, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    save("k" * 32, MADE, told.append)
    assert len(told) == 1
    assert "No space left" in told[0]
    assert list(decisions.folder().iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_warning(told, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "file"))
    save("k" * 32, MADE, told.append)
    assert len(told) == 1
    assert load("k" * 32, told.append) is None
    assert len(told) == 2
