"""Comparisons with processes that behave, and with some that do not. No times are asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastrunner.bench import contest as module
from fastrunner.bench.__main__ import main
from fastrunner.bench.contest import ContestOptions, Failed, Process, contest, distance, expand
from fastrunner.bench.contest_report import render
from fastrunner.bench.runners import NAMES, load, split_name
from fastrunner.bench.worker import Passes, Sleeps

BRIEF = {"sessions": 1, "rounds": 2, "budget_s": 1.0, "threads": 1, "peers_python": "nowhere"}


def text_of(result: dict) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        render(result, console)
    return capture.get()


@pytest.fixture(scope="module")
def result() -> dict:
    options = ContestOptions(("raw", "fastrunner", "lightning"), workload="toy", runner="epoch", **BRIEF)
    found = contest(options, lambda doing: None)
    return json.loads(json.dumps(found))  # it is plain types


def test_a_comparison(result):
    cases = result["cases"]
    assert list(cases) == ["raw", "fastrunner", "lightning"]
    for name in ("raw", "fastrunner"):
        assert cases[name]["failed"] is None
        assert len(cases[name]["samples_ns"]) == 1
        assert len(cases[name]["samples_ns"][0]) == result["plan"]["rounds"] >= 2
        assert cases[name]["weights_off"] < 1e-5  # float32, another order of operations
        assert cases[name]["sleep_per_epoch_s"] == 0
        assert cases[name]["optimizer"] == "SGD fused"
    assert cases["raw"]["change"]["verdict"] in ("faster", "slower", "no difference", "too noisy")
    assert result["base"] == "fastrunner"
    assert result["machine"]["during"]["spin_p90_over_min"] >= 1


def test_a_missing_peer_is_a_row_that_says_how_to_get_it(result):
    if result["cases"]["lightning"]["failed"] is None:
        pytest.skip("lightning is installed here")
    assert "make peers" in result["cases"]["lightning"]["failed"]
    text = text_of(result)
    assert "lightning: not installed; get it with: make peers" in text
    assert "fastrunner" in text


def test_the_account(result):
    account = result["account"]
    wholes = len(account["begins"])
    assert all(len(samples) == wholes for samples in account["parts"].values())
    assert account["begins"] == sorted(account["begins"])
    assert {"OptimizerHook", "TextLoggerHook"} <= set(account["hooks"])
    assert account["losses"]


def test_the_table_fits_80_columns(result):
    assert max(map(len, text_of(result).splitlines())) <= 80


def test_exit_code_is_not_0_where_a_row_is_missing(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastrunner.bench.contest_main.contest", lambda options, say: result)
    file = tmp_path / "out.json"
    code = main(["--against", "raw,lightning", "--workload", "toy", "--results-file", str(file)])
    failed = any(case["failed"] for case in result["cases"].values())
    noisy = result["cases"]["raw"]["change"]["verdict"] == "too noisy"
    assert code == int(failed or noisy)
    assert json.loads(file.read_text()) == result
    whole = {**result, "cases": {"fastrunner": result["cases"]["fastrunner"]}}
    monkeypatch.setattr("fastrunner.bench.contest_main.contest", lambda options, say: whole)
    assert main(["--against", "raw"]) == 0
    assert main(["--against", "raw", "--results-file", "/dev/full"]) == 1
    assert "cannot write /dev/full: " in capsys.readouterr().err


def test_step_is_fastrunners_variant(result, monkeypatch, capsys):
    seen = []

    def fake(options: ContestOptions, say: object) -> dict:
        seen.append(options.against)
        return result

    monkeypatch.setattr("fastrunner.bench.contest_main.contest", fake)
    main(["--against", "raw", "--step", "eager"])
    main(["--against", "fastrunner:graph,raw", "--step", "eager"])
    assert seen == [("fastrunner:eager", "raw"), ("fastrunner:graph", "raw")]


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "raw", "--workload", "imagenet"], "unknown workload 'imagenet'; choose from toy, mlp"),
        (["--against", "raw", "--workload", "no.such:thing"], "workload no.such:thing does not load: ModuleNotFound"),
        (["--against", "raw", "--workload", "math:pi"], "workload math:pi does not load: TypeError"),
        (["--against", "raw", "--workload", "builtins:dict"], "must return a Workload or a dict of its fields"),
        (["--against", "raw", "--config", "none.py"], "the config none.py does not load: FileNotFoundError"),
        (["--against", "raw,keras"], "unknown runner 'keras'; choose from raw, fastrunner, mmcv"),
        (["--against", "mmcv:quick"], "mmcv has no variant 'quick'; choose from shipped, nosleep"),
        (["--against", "raw", "--amp-dtype", "bfloat16"], "compares at equal precision"),
        (["--against", "raw", "--rounds", "1"], "--rounds must be >= 2, got 1"),
        (["--against", "raw", "--workload", "toy", "--mode", "system"], "toy has no data set"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def script(folder: Path, body: str) -> str:
    """A Python that runs ``body`` whatever it is asked to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_process_that_crashes(tmp_path):
    process = Process(script(tmp_path, "raise SystemExit('out of luck')"), {}, tmp_path)
    with pytest.raises(Failed, match=r"it crashed \(exit code 1\): out of luck"):
        process.ask("hello")
    process.close()


def test_a_process_that_hangs(tmp_path):
    process = Process(script(tmp_path, "import sys\nsys.stdin.read()"), {}, tmp_path)
    with pytest.raises(Failed, match="it hung: no answer in 0 s"):
        process.ask("hello", timeout_s=0.2)
    assert process._process.poll() is not None


def test_weights_of_a_runner_that_does_less():
    """The bare loop, but one weight update in twelve is left out."""
    start = {"w": torch.zeros(4)}
    right, less = {"w": torch.full((4,), 12.0)}, {"w": torch.full((4,), 11.0)}
    assert distance(right, right, start) == 0
    assert distance(less, right, start) == pytest.approx(1 / 12)
    assert distance(less, right, start) > module.SAME
    assert distance(right, start, start) == float("inf")
    assert distance(start, start, start) == 0


# The parts.


def test_names():
    assert expand(["raw", "mmcv"]) == ["fastrunner", "raw", "mmcv", "mmcv:nosleep"]
    assert expand(["fastrunner:eager", "raw", "raw"]) == ["fastrunner:eager", "raw"]
    assert split_name("mmcv") == ("mmcv", "shipped")
    for name in NAMES:
        assert load(name).VARIANTS


def test_sleeps(monkeypatch):
    import time

    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for skip in (False, True):
        sleeps = Sleeps(skip)
        time.sleep(2)
        time.sleep = sleeps._sleep
        assert sleeps.between(0, 2**63) == 2
        assert sleeps.between(0, 1) == 0
    assert slept == [2]


def test_passes():
    passes = Passes([1, 2, 3], 2, lead=1, num_iters=2)
    assert len(passes) == 2
    assert [*passes, *passes] == [1, 2, 1, 2]
    assert 0 < passes.begin < passes.end
