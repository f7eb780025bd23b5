"""Host reads that only reach the log are taken out of the graph; any other is refused with the user's line."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from step.runs import graph_of, interpret, make, train
from step.zoo import ZOO
from torch import nn
from torch.nn import functional as F

MLP = replace(ZOO["mlp"], clip=None)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch)


class Detector(nn.Module):
    """What OpenMMLab's models do with their losses: sum them, then read each on the host for the log.

    Args:
        read: how a loss becomes a number.
        besides: (model, scores, batch, loss, log_vars) -> the loss, after all were read.
    """

    def __init__(self, read=torch.Tensor.item, besides=None):
        super().__init__()
        self.layer, self.read, self.besides = nn.Linear(16, 10), read, besides

    def parse_losses(self, losses):
        log_vars = OrderedDict()
        for name, value in losses.items():
            log_vars[name] = value.mean() if isinstance(value, torch.Tensor) else sum(each.mean() for each in value)
        loss = sum(value for name, value in log_vars.items() if "loss" in name)
        log_vars["loss"] = loss
        for name, value in log_vars.items():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                value = value.data.clone()
                torch.distributed.all_reduce(value.div_(torch.distributed.get_world_size()))  # LINE reduce
            log_vars[name] = self.read(value)  # LINE read
        return loss, log_vars

    def train_step(self, batch, optimizer=None, **kwargs):
        scores = self.layer(batch["x"])
        losses = dict(
            loss_class=F.cross_entropy(scores, batch["y"], reduction="none"),
            loss_parts=[scores.square(), scores.abs()],
            accuracy=(scores.argmax(-1) == batch["y"]).float().mean(),
        )
        loss, log_vars = self.parse_losses(losses)
        if self.besides is not None:
            loss = self.besides(scores, batch, loss, log_vars)
        return dict(loss=loss, log_vars=log_vars, num_samples=len(batch["y"]))


def line_of(name):
    lines = Path(__file__).read_text().splitlines()
    return next(f"test_lift.py:{i}" for i, line in enumerate(lines, 1) if line.endswith(f"# LINE {name}"))


def history(runner):
    return {name: values for name, values in runner.log_buffer.val_history.items() if "time" not in name}


def adds_up(scores, batch, loss, log_vars):
    log_vars["total"] = sum(log_vars.values())
    log_vars["percent"] = 100 * log_vars["accuracy"]
    log_vars["gap"] = abs(log_vars["loss_class"] - log_vars["loss"]) / 2
    log_vars["num_zeros"] = (batch["y"] == 0).sum().item() + 1
    log_vars["mean_label"] = int(batch["y"].sum()) / len(batch["y"])
    log_vars["root"] = float(loss) ** 0.5
    return loss


@pytest.mark.parametrize("read", [torch.Tensor.item, lambda value: float(value)])
@pytest.mark.parametrize("besides", [None, adds_up])
def test_numbers_for_the_log_are_no_reason_to_stay_below(read, besides):
    family = replace(MLP, model=lambda: Detector(read, besides))
    runner, _ = make(family, "graph", 8)
    eager, _ = make(family, "eager", 8)
    for each in (runner, eager):
        each.run([[family.batch(i) for i in range(4)]], [("train", 1)])
    assert graph_of(runner).num_calls == 6, graph_of(runner).explain()
    ours, theirs = history(runner), history(eager)
    assert list(ours) == list(theirs)
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-5), name


def computes(scores, batch, loss, log_vars):
    return loss * log_vars["accuracy"]


def rounds(scores, batch, loss, log_vars):
    log_vars["rounded"] = round(log_vars["loss"], 2)
    return loss


def decides(scores, batch, loss, log_vars):
    return loss * 2 if log_vars["loss"] > 2 else loss  # LINE decides


def asks(scores, batch, loss, log_vars):
    return loss * 2 if (batch["y"] == 0).any() else loss  # LINE asks


def prints(scores, batch, loss, log_vars):
    print(loss)  # LINE prints
    return loss


def formats(scores, batch, loss, log_vars):
    log_vars["text"] = f"{loss:.3f}"  # LINE formats
    return loss


def to_numpy(scores, batch, loss, log_vars):
    log_vars["sum"] = scores.detach().numpy().sum()  # LINE to_numpy
    return loss


def selects(scores, batch, loss, log_vars):
    return loss + scores[batch["y"] == 0].sum()  # LINE selects


def cuts(scores, batch, loss, log_vars):
    return loss + scores[: int(batch["y"].max())].sum()  # LINE cuts


def finds(scores, batch, loss, log_vars):
    return loss + scores[(batch["y"] == 0).nonzero()[:, 0]].sum()  # LINE finds


@pytest.mark.parametrize(
    ("besides", "line", "says"),
    [
        (computes, "read", "reads a value on the host and computes with it"),
        (rounds, "read", "reads a value on the host and computes with it"),
        (decides, "decides", "decides by the value of a tensor"),
        (asks, "asks", "decides by the value of a tensor"),
        (prints, "prints", "makes a text of a tensor"),
        (formats, "formats", "unsupported format string"),
        (to_numpy, "to_numpy", "numpy"),
        (selects, "selects", "whose size depends on values"),
        (cuts, "cuts", "whose size depends on values"),
        (finds, "finds", "whose size depends on values"),
    ],
)
def test_any_other_read_is_refused_with_its_line(besides, line, says):
    family = replace(MLP, model=lambda: Detector(besides=besides))
    runner, losses = train(family, "graph", 6)
    assert graph_of(runner).num_calls == 0
    (why,) = [text for text in graph_of(runner).explain() if text.startswith("no graph")]
    assert says in why
    assert line_of(line) in why
    assert losses == train(family, "fused", 6)[1]


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_only_process_exchanges_nothing(one_process):
    family = replace(MLP, model=Detector)
    runner, losses = train(family, "graph", 6)
    assert graph_of(runner).num_calls == 4, graph_of(runner).explain()
    assert losses == pytest.approx(train(family, "eager", 6)[1], rel=1e-5)


def gathers(scores, batch, loss, log_vars):
    torch.distributed.broadcast(scores.detach().clone(), 0)  # LINE gathers
    return loss


def test_a_step_that_exchanges_tensors_with_other_processes_stays_below(one_process):
    family = replace(MLP, model=lambda: Detector(besides=gathers))
    runner, losses = train(family, "graph", 6)
    assert graph_of(runner).num_calls == 0
    assert any(line_of("gathers") in text for text in graph_of(runner).explain()), graph_of(runner).explain()
    assert losses == train(family, "fused", 6)[1]
