"""The two passes of the bench: what they count, and that the parts of an iteration are told apart."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

from fastrunner import supervised
from fastrunner.bench.training import PARTS, Plan, evaluate, logged_losses, make_runner, split, train
from fastrunner.optim import build_optimizer

LOGGER = logging.Logger("quiet", logging.CRITICAL)
EPOCH = 6


class Batches(list):
    batch_size = 4


def batches(count: int = EPOCH, hold_up: float = 0.0) -> Batches:
    torch.manual_seed(0)
    return Batches({"img": torch.randn(4, 6), "gt_label": torch.tensor([0, 1, 2, 0])} for _ in range(count))


def model() -> nn.Module:
    torch.manual_seed(0)
    return supervised(nn.Linear(6, 3), nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("runner", "asked", "length", "interval"),
    [("iter", 321, 321, 20), ("epoch", 321, 400, 25), ("iter", 5, 5, 1), ("iter", 10_000, 10_000, 50)],
)
def test_plan(runner, asked, length, interval):
    plan = Plan.make(runner, asked, 100)
    assert (plan.num_iters, plan.log_interval) == (length, interval)


def test_a_log_falls_into_every_short_epoch():
    assert Plan.make("epoch", 100, 3).log_interval == 3  # by epoch, a longer interval would never be due


@pytest.mark.parametrize(("runner", "length"), [("iter", 20), ("epoch", 24)])
def test_train_counts_and_times(runner, length, tmp_path):
    plan = Plan.make(runner, 20, EPOCH)
    begin = time.perf_counter()
    found = train(plan, model(), batches(), tmp_path, LOGGER, 5, None)
    seconds = time.perf_counter() - begin
    assert found["num_iters"] == length
    assert (
        found["timed_iters"] == len(found["iter"]["samples_ns"]) == len(found["data_wait"]["samples_ns"]) == length - 6
    )
    total = sum(found["iter"]["samples_ns"]) / 1e9
    assert 0 < total < seconds
    assert found["iters_per_s"] == pytest.approx(found["timed_iters"] / total)
    assert found["samples_per_s"] == pytest.approx(4 * found["iters_per_s"])
    assert found["first_loss"] == found["losses"][0]
    assert found["last_loss"] == found["losses"][-1] < found["first_loss"]
    assert len(found["losses"]) >= 16
    assert list(tmp_path.glob("*.pth"))  # the default hooks were there: a checkpoint


def test_logged_losses_are_the_losses(tmp_path):
    """With one iteration a log, the first one is the loss of the initial weights on the first batch."""
    plan = Plan("iter", num_iters=3, epoch_length=EPOCH, log_interval=1)
    data = batches()
    train(plan, model(), data, tmp_path, LOGGER, 1, None)
    wanted = model().train_step(data[0])["loss"].item()
    (file,) = tmp_path.glob("*.log.json")
    losses = logged_losses(file)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(wanted, abs=1e-5)  # five digits in the file


def test_two_runs_of_one_second_keep_their_losses_apart(tmp_path, monkeypatch):
    """They share a log file."""
    monkeypatch.setattr("fastrunner.runner.base.get_time_str", lambda: "20260101_000000")
    plan = Plan("iter", num_iters=3, epoch_length=EPOCH, log_interval=1)
    first, second = (train(plan, model(), batches(), tmp_path, LOGGER, 1, None)["losses"] for _ in range(2))
    assert len(list(tmp_path.glob("*.log.json"))) == 1
    assert len(first) == 3
    assert first == second


def test_evaluate_is_the_share_of_right_answers():
    data = batches(5)
    data[-1] = {key: value[:2] for key, value in data[-1].items()}  # an incomplete last batch counts less
    net = model()
    right = sum(int((net(b["img"]).argmax(1) == b["gt_label"]).sum()) for b in data)
    found = evaluate(net, data)
    assert found["num_samples"] == 18
    assert found["accuracy"] == pytest.approx(right / 18, abs=1e-6)  # a mean of float32 means
    assert not net.training


class Clock:
    """Time that passes only where something here takes some."""

    now_ns = 0

    def __call__(self) -> int:
        return Clock.now_ns


def busy(milliseconds: int) -> None:
    Clock.now_ns += milliseconds * 1_000_000


class SlowBatches(Batches):
    def __iter__(self):
        for batch in super().__iter__():
            busy(4)
            yield batch
        busy(5)


class SlowModel(nn.Module):
    """The model of ``model()`` whose step takes 8 ms more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def train_step(self, data_batch, optimizer=None, **kwargs):
        busy(8)
        return self.inner.train_step(data_batch, optimizer)


class SlowHandler(logging.Handler):
    def emit(self, record):
        busy(6)


@pytest.mark.parametrize("runner", ["iter", "epoch"])
def test_split_tells_the_parts_apart(runner, tmp_path, monkeypatch):
    """Time planted in the loader, in the step, in the logger and at an epoch's end is found there."""
    for module in ("measure", "training"):
        monkeypatch.setattr(f"fastrunner.bench.{module}.perf_counter_ns", Clock())
    logger = logging.Logger("slow", logging.INFO)
    logger.addHandler(SlowHandler())
    # a checkpoint is logged too, as "hooks": only at the end of an epoch, of which the timed iterations here hold two
    plan = Plan(runner, num_iters=12, epoch_length=6, log_interval=1)
    found = split(plan, SlowModel(), SlowBatches(batches()), tmp_path, logger, 2, None)
    assert set(found["mean_ns"]) == set(found["samples_ns"]) == set(PARTS)
    assert found["timed_iters"] == 9
    milliseconds = {part: [ns / 1e6 for ns in samples] for part, samples in found["samples_ns"].items()}
    assert milliseconds["data"] == [4] * 9
    assert milliseconds["step"] == [8] * 9
    assert min(milliseconds["logging"]) == 6
    # one end of an epoch, where the epoch runner logs a checkpoint
    assert milliseconds["rest"] == [0] * 3 + [5 if runner == "iter" else 5 + 6] + [0] * 5


def test_split_parts_add_up_to_the_iteration(tmp_path):
    plan = Plan("iter", num_iters=20, epoch_length=6, log_interval=5)
    begin = time.perf_counter_ns()
    found = split(plan, model(), batches(), tmp_path, LOGGER, 2, None)
    elapsed = time.perf_counter_ns() - begin
    assert found["timed_iters"] == 17
    total = sum(sum(samples) for samples in found["samples_ns"].values())
    assert 0 < total < elapsed
    for part in PARTS:
        assert min(found["samples_ns"][part]) > 0, part
        assert found["mean_ns"][part] == pytest.approx(sum(found["samples_ns"][part]) / 17)


@pytest.mark.parametrize("runner", ["iter", "epoch"])
def test_make_runner_registers_the_default_hooks(runner, tmp_path):
    net = model()
    optimizer = build_optimizer(net, {"type": "FusedSGD", "lr": 0.1})
    made = make_runner(Plan.make(runner, 12, EPOCH), net, optimizer, tmp_path, LOGGER)
    assert [(type(hook).__name__, hook.priority) for hook in made.hooks] == [
        ("StepLrUpdaterHook", 10), ("OptimizerHook", 40), ("CheckpointHook", 50), ("IterTimerHook", 70),
        ("TextLoggerHook", 90),
    ]  # fmt: skip
