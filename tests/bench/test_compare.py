"""``compare`` of records made up here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastrunner.bench.__main__ import main

MACHINE = {"cpu": "a processor", "cores": 2, "torch": "2.13.0", "noisy": False}


def record(name: str, factor: float = 1.0, noise: float = 0.01, seed: int = 0, **machine) -> str:
    rng = np.random.default_rng(seed)
    cases = {
        case: {"samples_ns": (1e6 * scale * np.exp(rng.normal(0, noise, (6, 6)))).tolist(), "failed": None}
        for case, scale in (("fastrunner", factor), ("raw", 1.0))
    }
    cases["gone"] = {"samples_ns": [], "failed": "it crashed"}
    result = {"kind": "contest", "options": {"workload": "toy"}, "machine": {**MACHINE, **machine}, "cases": cases}
    Path(name).write_text(json.dumps(result))
    return name


def test_a_regression_is_exit_code_1(capsys):
    before, after = record("a.json"), record("b.json", 1.1, seed=1)
    assert main(["compare", before, after]) == 1
    text = capsys.readouterr().out
    assert "slower beyond the noise: fastrunner\n" in text
    assert "no difference" in text  # raw
    assert "gone" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert main(["compare", after, before]) == 0
    assert "slower beyond" not in capsys.readouterr().out


def test_noise_is_no_regression(capsys):
    assert main(["compare", record("a.json", noise=0.3), record("b.json", 1.05, noise=0.3, seed=1)]) == 0
    assert main(["compare", record("a.json"), record("b.json", seed=1)]) == 0
    assert "warning" not in capsys.readouterr().out


def test_what_else_is_different(capsys):
    main(["compare", record("a.json"), record("b.json", seed=1, cpu="another", noisy=True)])
    text = capsys.readouterr().out
    assert "warning: cpu: a processor before, another after" in text
    assert "warning: the machine was not quiet after" in text


def test_two_runs_of_the_bench(capsys):
    def run(name: str, factor: float) -> str:
        rng = np.random.default_rng(2)
        samples = (1e6 * factor * np.exp(rng.normal(0, 0.02, 300))).tolist()
        training = {key: {"samples_ns": samples} for key in ("iter", "data_wait")}
        Path(name).write_text(json.dumps({"options": {"seed": 0}, "machine": MACHINE, "training": training}))
        return name

    assert main(["compare", run("a.json", 1.0), run("b.json", 1.08)]) == 1
    assert "slower beyond the noise: iteration, data wait" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "b.json is no JSON"), ("[1]", "b.json holds no samples of the bench"), ('{"machine": {}}', "no samples")],
)
def test_bad_files(text, message, capsys):
    record("a.json")
    Path("b.json").write_text(text)
    assert main(["compare", "a.json", "b.json"]) == 2
    assert message in capsys.readouterr().err
    assert main(["compare", "a.json", "none.json"]) == 2
    assert "none.json" in capsys.readouterr().err


def test_nothing_in_common(capsys):
    record("a.json")
    training = {key: {"samples_ns": [1.0, 2.0]} for key in ("iter", "data_wait")}
    Path("b.json").write_text(json.dumps({"machine": MACHINE, "training": training}))
    assert main(["compare", "a.json", "b.json"]) == 2
    assert "nothing in common" in capsys.readouterr().err
