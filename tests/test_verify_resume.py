"""python -m fastrunner.verify_resume: silent where a resume is exact, and what it says where it is not."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from fastrunner import DATASETS, HOOKS, MODELS, Hook
from fastrunner.verify_resume import digest, main

counter = itertools.count()


@DATASETS.register_module(force=True)
class VerifyNoise(Dataset):
    """Noise around the index. ``inexact``: every sample that is ever made gets another number."""

    def __init__(self, inexact=False):
        self.inexact = inexact

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(3) + i + np.random.rand() + (next(counter) if self.inexact else 0)


@MODELS.register_module(force=True)
class VerifyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)

    def train_step(self, data_batch, optimizer=None, **kwargs):
        x = nn.functional.dropout(self.norm(data_batch.float()), 0.3)
        loss = self.layer(x).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(x))


@HOOKS.register_module(force=True)
class VerifyForgets(Hook):
    """Changes the loss by what it has counted, and does not save it."""

    count = 0

    def after_train_iter(self, runner):
        self.count += 1
        runner.outputs["loss"] = runner.outputs["loss"] * self.count


@HOOKS.register_module(force=True)
class VerifyDraws(Hook):
    """Draws random numbers when a run starts."""

    def after_train_iter(self, runner):
        if runner.iter % 100 == 99:
            torch.rand(1)

    def before_run(self, runner):
        if runner.iter > 0:
            torch.rand(1)


def write(**changes):
    config = dict(
        model=dict(type="VerifyModel"),
        data=dict(samples_per_gpu=2, workers_per_gpu=0, train=dict(type="VerifyNoise")),
        optimizer=dict(type="FusedSGD", lr=0.01, momentum=0.9),
        optimizer_config=dict(grad_clip=dict(max_norm=1.0)),
        lr_config=dict(policy="step", step=[2]),
        custom_hooks=[dict(type="EMAHook")],
        runner=dict(type="EpochBasedRunner", max_epochs=4),
        seed=3,
    )
    Path("config.json").write_text(json.dumps({**config, **changes}))
    return "config.json"


RUNNERS = [dict(type="EpochBasedRunner", max_epochs=4), dict(type="IterBasedRunner", max_iters=24)]


@pytest.mark.parametrize("runner", RUNNERS, ids=["epoch", "iter"])
@pytest.mark.parametrize("at", [4, 6])  # in the middle of an epoch, at its end
def test_an_exact_resume(runner, at, capsys):
    assert main([write(runner=runner), "--at", str(at), "--more", "9"]) == 0
    assert "equal, bit for bit: sample ids, batch, RNG, loss, weights, optimizer of all 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            dict(data=dict(samples_per_gpu=2, train=dict(type="VerifyNoise", inexact=True))),
            "iteration 5: batch, loss, weights, optimizer differ",
        ),
        (
            dict(custom_hooks=[dict(type="VerifyForgets", priority="HIGH")]),
            "iteration 5: loss, weights, optimizer differ",
        ),
        (dict(custom_hooks=[dict(type="VerifyDraws")]), "iteration 5: RNG, loss, weights, optimizer differ"),
    ],
)
def test_what_differs_first_is_named(changes, says, capsys):
    assert main([write(**changes), "--at", "5", "--more", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(says)
    assert any(line.startswith("at the end ") and "differs, by up to" in line for line in lines)


def test_what_cannot_be_tried(capsys):
    assert main([write(), "--at", "20", "--more", "5"]) == 2
    assert "the config's run ends after 24 iterations" in capsys.readouterr().err
    assert main(["nowhere.py"]) == 2
    assert "nowhere.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([write(), "--at", "0"])
    assert "must be >= 1" in capsys.readouterr().err
    assert main(["config.yaml", "--cfg-options", "runner=dict(type='EpochBasedRunner',max_epochs=3)"]) == 2
    assert "is no number, text, list or tuple" in capsys.readouterr().err


def test_digests_see_every_bit():
    values = [
        0,
        0.0,
        -0.0,
        1,
        "1",
        b"1",
        None,
        [],
        (),
        [1],
        [[1]],
        {1: 2},
        {2: 1},
        np.zeros(2),
        np.zeros(2, np.float32),
    ]
    values += [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), torch.tensor([0.0, 0.0, 1e-45])]
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digest({"a": [torch.ones(2)]}) == digest({"a": [torch.ones(2)]})


@pytest.mark.slow
def test_the_command_on_the_example():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    command = [sys.executable, "-m", "fastrunner.verify_resume", "examples/digits_epoch.py", "--at", "30"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "equal, bit for bit" in done.stdout
