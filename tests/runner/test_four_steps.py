"""The acceptance test of the product: examples/four_steps.py, with every combination that its docstring promises."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from fastrunner import HOOKS, Digits, Hook

ROOT = Path(__file__).parents[2]


def load_example():
    spec = importlib.util.spec_from_file_location("four_steps", ROOT / "examples" / "four_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


four_steps = load_example()


@pytest.fixture(scope="module")
def dataset():
    return [Digits(split="train"), Digits(split="val")]


@pytest.fixture
def interrupting():
    """A registered hook that presses Ctrl-C after so many iterations."""

    @HOOKS.register_module(name="PressCtrlC", force=True)
    class PressCtrlC(Hook):
        def __init__(self, after: int) -> None:
            self.after = after

        def after_train_iter(self, runner) -> None:
            if runner.iter + 1 == self.after:
                raise KeyboardInterrupt

    yield "PressCtrlC"
    HOOKS.module_dict.pop("PressCtrlC", None)


@pytest.fixture(scope="module")
def small(dataset):
    """Five batches of training data and one of validation: enough to interrupt and resume."""
    return [Subset(dataset[0], range(300)), Subset(dataset[1], range(64))]


def train(dataset, kind="epoch", logger=None, **changes):
    torch.manual_seed(0)
    model = four_steps.make_model()
    return four_steps.train(model, dataset, four_steps.make_config(kind, **changes), logger)


@pytest.mark.parametrize("logger", [None, logging.getLogger("users_own")], ids=["no_logger", "logger"])
@pytest.mark.parametrize("work_dir", [None, "out"])
@pytest.mark.parametrize("kind", ["epoch", "iter"])
def test_runs_and_learns(kind, work_dir, logger, dataset, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        runner = train(dataset, kind, logger, work_dir=work_dir)
    folder = tmp_path / work_dir if work_dir else Path(runner.work_dir)
    if not work_dir:
        assert re.fullmatch(r"\d{8}_\d{6}", folder.name)
        assert folder.parent == tmp_path / "work_dirs"
    last = "epoch_6.pth" if kind == "epoch" else "iter_120.pth"
    assert (folder / "latest.pth").readlink() == Path(last)
    assert len(list(folder.glob("*.log.json"))) == 1
    assert runner.logger.name == ("users_own" if logger else "fastrunner")
    model = runner.model.eval()
    with torch.no_grad():
        accuracy = (model(dataset[1].images).argmax(1) == dataset[1].labels).float().mean()
    assert accuracy > 0.8  # chance is 0.1; several seeds gave above 0.9
    said = [record.getMessage() for record in caplog.records]
    assert sum(str(folder) in line for line in said if "work_dir" in line) == 1


def test_nothing_is_created_before_the_first_file(dataset, tmp_path):
    from fastrunner import build_runner

    runner = build_runner(dict(type="IterBasedRunner", max_iters=1), dict(model=four_steps.make_model()))
    assert not (tmp_path / "work_dirs").exists()
    runner.save_checkpoint(runner.work_dir)
    assert (Path(runner.work_dir) / "iter_1.pth").is_file()


# Where the run is interrupted, and which checkpoint is the last then. 5 batches an epoch, 25 iterations.
INTERRUPTIONS = [
    ("epoch", dict(interval=1), 13, "epoch_2.pth"),
    ("epoch", dict(interval=1), 16, "epoch_3.pth"),  # in the middle of a ("train", 2) entry
    ("epoch", dict(interval=4, by_epoch=False), 14, "iter_12.pth"),  # in the middle of an epoch
    ("epoch", dict(interval=5, by_epoch=False), 12, "iter_10.pth"),  # after an epoch's last batch, before its end
    ("iter", dict(interval=4), 15, "iter_12.pth"),
    ("iter", dict(interval=7), 9, "iter_7.pth"),  # after the first of two train iterations of an entry
]


@pytest.mark.parametrize(("kind", "checkpoint_config", "at", "last"), INTERRUPTIONS)
@pytest.mark.parametrize("optimizer", ["SGD", "FusedSGD"])
def test_interrupted_and_resumed_equals_uninterrupted(
    kind, checkpoint_config, at, last, optimizer, small, interrupting
):
    length = (
        dict(type="EpochBasedRunner", max_epochs=5) if kind == "epoch" else dict(type="IterBasedRunner", max_iters=25)
    )
    changes = dict(
        runner=length,
        checkpoint_config=checkpoint_config,
        optimizer=dict(type=optimizer, lr=0.1, momentum=0.9, weight_decay=1e-4),
    )
    whole = train(small, kind, work_dir="whole", **changes)
    ema = dict(type="EMAHook", momentum=0.01)
    with pytest.raises(KeyboardInterrupt):
        train(small, kind, work_dir="part", **changes, custom_hooks=[ema, dict(type=interrupting, after=at)])
    assert Path("part/latest.pth").readlink() == Path(last)

    torch.manual_seed(123)  # another process would not have the same state either
    resumed = four_steps.train(
        four_steps.make_model(),
        small,
        four_steps.make_config(kind, work_dir="part", resume_from="part/latest.pth", **changes),
        None,
    )

    assert (resumed.epoch, resumed.iter) == (whole.epoch, whole.iter)
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    assert any(key.startswith("ema_") for key in got)
    for key in expected:
        assert torch.equal(expected[key], got[key]), key
    for mine, theirs in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        assert mine["lr"] == theirs["lr"]
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            assert torch.equal(
                whole.optimizer.state[p]["momentum_buffer"], resumed.optimizer.state[q]["momentum_buffer"]
            )


def test_load_from_loads_weights_only(small):
    def length(max_iters):
        return dict(type="IterBasedRunner", max_iters=max_iters)

    train(small, "iter", work_dir="first", runner=length(5), optimizer=dict(type="SGD", lr=0.1))
    frozen = dict(type="SGD", lr=0.0)
    second = train(small, "iter", work_dir="second", load_from="first/latest.pth", runner=length(1), optimizer=frozen)
    assert second.iter == 1  # counters start over
    saved = torch.load("first/latest.pth")["state_dict"]
    for name, param in second.model.named_parameters():
        # the model holds EMAHook's averages of one iteration without an update: one rounding
        torch.testing.assert_close(param.detach(), saved[name], rtol=1e-6, atol=1e-7, msg=name)


def test_the_script_is_the_design():
    """Every statement of the design's script is in the example, in its order."""
    source = (ROOT / "examples" / "four_steps.py").read_text()
    for statement in (
        "optimizer = build_optimizer(model, cfg.optimizer)",
        "build_dataloader(ds, cfg.data.samples_per_gpu, cfg.data.workers_per_gpu) for ds in dataset",
        "model=model, batch_processor=None, optimizer=optimizer, logger=logger",
        "register_training_hooks(cfg.lr_config, cfg.optimizer_config, cfg.checkpoint_config, cfg.log_config)",
        'priority = hook_cfg.pop("priority", "NORMAL")',
        "runner.register_hook(build_from_cfg(hook_cfg, HOOKS), priority=priority)",
        "runner.resume(cfg.resume_from)",
        "runner.run(data_loaders, cfg.workflow)",
    ):
        assert statement in source
        source = source[source.index(statement) :]
