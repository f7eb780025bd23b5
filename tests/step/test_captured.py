"""Terms of a captured iteration by themselves: loss scale, windows of several iterations, options on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from step.test_cudagraph import Net, adamw, sgd
from step.zoo import ZOO, vectors
from torch import nn

from fastrunner.step.binding import Binding
from fastrunner.step.captured import Captured, EagerBody, LossScale, Terms, Window
from fastrunner.step.device_update import Options, row_on_device
from fastrunner.step.graph_stand_in import StandIn
from fastrunner.step.torch_private import Unfit


def first_update(model, optimizer):
    """State is there after it."""
    model.train_step(vectors(0))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def pair(make=Net, optimizer=sgd):
    """A model with its optimizer, and a copy of both."""
    torch.manual_seed(0)
    model = make().eval()  # no dropout, no moving statistics: both sides compute the same from the same
    twin = copy.deepcopy(model)
    optimizers = optimizer(model.parameters()), optimizer(twin.parameters())
    for each, one in zip((model, twin), optimizers, strict=True):
        first_update(each, one)
    return model, optimizers[0], twin, optimizers[1]


def record(model, optimizer, terms, others=()):
    backend = StandIn()
    binding = Binding(model, optimizer)
    options = Options(binding, backend)
    options.fill(0.0)
    captured = Captured(backend, EagerBody(binding, options, model.train_step, terms), binding, options, vectors(0), others)  # fmt: skip # noqa: E501
    return captured, options


def run(captured, batch):
    """A warm-up first, then replays."""
    tensors = list(batch.values())
    if captured.recording is None and captured.num_warm_ups == 0:
        return captured.warm_up(tensors)[0]["loss"]
    if captured.recording is None:
        captured.record([])
    return captured.run(tensors)[0]


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("fixed", [None, 64.0])
def test_a_loss_scale_on_the_device_does_what_grad_scaler_does(optimizer, fixed):
    model, ours, twin, theirs = pair(optimizer=optimizer)
    scale, growth = torch.tensor(64.0), torch.zeros((), dtype=torch.int32)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    terms = Terms(scale=LossScale(scale, growth, interval=3, fixed=fixed))
    captured, _ = record(model, ours, terms, [scale, growth])
    for number in range(12):
        batch = vectors(number)
        if number in (2, 3, 9):
            batch["x"][0, 0] = float("inf")
        run(captured, batch)
        scaler.scale(twin.train_step(batch)["loss"]).backward()
        scaler.step(theirs)
        scaler.update(fixed)
        theirs.zero_grad()
        assert scale.item() == scaler.get_scale()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        # the update rounds otherwise than torch's, and twelve steps carry that on
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    steps = [int(slot["step"]) for slot in ours.state.values() if "step" in slot]
    assert steps == [int(slot["step"]) for slot in theirs.state.values() if "step" in slot]


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_two_graphs_make_an_update_of_several_iterations(optimizer):
    model, ours, twin, theirs = pair(optimizer=optimizer)
    sums = [torch.zeros_like(p, requires_grad=False) for p in model.parameters()]
    divisor = torch.tensor(3.0)
    graphs = [
        record(model, ours, Terms(0.5, window=Window(divisor, sums, ends)), [*sums, divisor])[0]
        for ends in (False, True)
    ]
    # 2 windows of 3 for the warm-ups and captures, then replays; the last window is of 2, with another divisor
    places = [(n % 3 == 2, 3.0) for n in range(12)] + [(False, 2.0), (True, 2.0)]
    for number, (ends, size) in enumerate(places):
        divisor.fill_(size)
        run(graphs[ends], vectors(number))
        (twin.train_step(vectors(number))["loss"] / size).backward()
        if ends:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            theirs.step()
            theirs.zero_grad()
            assert all(not total.any() for total in sums)
        else:
            assert any(total.any() for total in sums)
    assert all(graph.recording is not None for graph in graphs)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "depthwise", "lstm", "tied"])
def test_rows_worked_out_on_the_device_are_those_of_the_host(name):
    family = ZOO[name]
    model = family.model()
    optimizer = family.optimizer(model.parameters())
    model.train_step(family.batch(0))["loss"].backward()
    optimizer.step()
    binding = Binding(model, optimizer)
    options = Options(binding, StandIn())
    options.fill(0.25)
    binding.fill(0.25)
    # float64 powers of the host's and torch's libraries differ in the last bit
    torch.testing.assert_close(row_on_device(binding, options.tensor), binding.row, rtol=1e-14, atol=0)


def test_options_are_sent_only_when_they_change():
    model, optimizer, _, _ = pair()
    sent = []

    class Counts(StandIn):
        def send(self, target, values):
            sent.append(list(values))
            super().send(target, values)

    options = Options(Binding(model, optimizer), Counts())
    for lr in (0.1, 0.1, 0.2, 0.2, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        options.fill(0.0)
    assert [values[2] for values in sent] == [0.1, 0.2, 0.1]
    options.fill(0.5)
    assert sent[-1][0] == 0.5


def test_a_step_that_returns_other_things_from_time_to_time_is_no_graph():
    class Moody(Net):
        count = 0

        def train_step(self, batch, optimizer=None, **kwargs):
            self.count += 1
            outputs = super().train_step(batch)
            return {**outputs, "log_vars": {"loss": outputs["loss"].detach(), **({} if self.count < 4 else {"x": outputs["loss"]})}}  # fmt: skip # noqa: E501

    model, optimizer, _, _ = pair(Moody)
    captured, _ = record(model, optimizer, Terms())
    run(captured, vectors(0))
    model.count = 9
    with pytest.raises(Unfit, match="other things from iteration to iteration"):
        captured.record([])
