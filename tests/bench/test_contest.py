"""Comparisons with processes that behave, and with some that do not. No times are asserted."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastrunner.bench import contest as module
from fastrunner.bench.__main__ import main
from fastrunner.bench.cases import Case, base_of, expand, parse
from fastrunner.bench.contest import ContestOptions, contest, distance
from fastrunner.bench.contest_main import missing
from fastrunner.bench.contest_report import render
from fastrunner.bench.process import Failed, Process
from fastrunner.bench.runners import NAMES, load, split_name
from fastrunner.bench.worker import Passes, Sleeps, Worker
from fastrunner.bench.workloads.named import find


def text_of(result: dict) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        render(result, console)
    return capture.get()


def script(folder: Path, body: str) -> str:
    """A Python that runs ``body`` whatever it is asked to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return str(path)


# What stands for the peers' Python: Lightning is missing, one peer does not start, one hangs, one crashes later.
PEERS = f"""
import json, os, sys
name = json.loads(sys.argv[3])["name"]
if name == "lightning":
    without = "import sys; sys.modules['lightning'] = None;" + sys.argv[2]
    os.execv({sys.executable!r}, [{sys.executable!r}, "-c", without, sys.argv[3]])
if name == "accelerate":
    raise SystemExit("a library is missing")
for line in sys.stdin:
    if name == "ignite":
        sys.stdin.read()
    if json.loads(line)["do"] == "check":
        raise SystemExit("out of memory")
    print(json.dumps({{}}), flush=True)
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    names = ("raw", "fastrunner", "lightning", "mmengine", "ignite", "accelerate")
    options = ContestOptions(
        names, workload="toy", runner="epoch", sessions=1, rounds=2, budget_s=15.0, threads=1,
        peers_python=script(tmp_path_factory.mktemp("peers"), PEERS),
    )  # fmt: skip
    answer = Process.answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Process, "answer", lambda self, most: answer(self, 0.5 if "ignite" in str(self.folder) else most))
        found = contest(options, lambda doing: None)
    return json.loads(json.dumps(found))  # it is plain types


def test_a_comparison(result):
    cases = result["cases"]
    assert list(cases) == ["raw", "fastrunner", "lightning", "mmengine", "ignite", "accelerate"]
    for name in ("raw", "fastrunner"):
        assert cases[name]["failed"] is None
        assert len(cases[name]["samples_ns"]) == 1
        assert len(cases[name]["samples_ns"][0]) == result["plan"]["rounds"] >= 2
        assert cases[name]["weights_off"] < 1e-5  # float32, another order of operations
        assert cases[name]["sleep_per_epoch_s"] == 0
        assert cases[name]["optimizer"] == "SGD fused"
    assert cases["raw"]["change"]["verdict"] in ("faster", "slower", "no difference", "too noisy")
    assert cases["fastrunner"]["over_raw"]["median"] == pytest.approx(1 / (1 + cases["raw"]["change"]["median"]) - 1)
    assert result["base"] == "fastrunner"
    assert result["machine"]["during"]["spin_p90_over_min"] >= 1


def test_peers_that_are_missing_crash_or_hang_are_rows(result):
    """They say so below the table; the others have their results, and the exit code is 1."""
    text = text_of(result)
    for words in (
        "lightning: not installed; get it with: make peers",
        "mmengine: it crashed (exit code 1): out of memory",
        "ignite: it hung: no answer in 0 s",
        "accelerate: it crashed (exit code 1): a library is missing",
    ):
        assert words in text
    alone = [line.split() for line in text.splitlines()]
    timed = [line[0] for line in alone if len(line) > 2 and line[2] in ("us", "ms", "s")]
    assert {"raw", "fastrunner"} <= set(timed)
    assert all([name, "-"] in alone for name in ("lightning", "mmengine", "ignite", "accelerate"))
    assert missing(result) == 1


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
    assert code == missing(result)
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
        (["--against", "raw+fp8"], "raw has no option 'fp8'; choose from bf16, channels_last"),
        (["--against", "raw", "--rounds", "1"], "--rounds must be >= 2, got 1"),
        (["--against", "raw", "--workload", "toy", "--mode", "system"], "toy has no data set"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_process_that_crashes(tmp_path):
    process = Process(script(tmp_path, "raise SystemExit('out of luck')"), {}, tmp_path)
    with pytest.raises(Failed, match=r"it crashed \(exit code 1\): out of luck"):
        process.ask("hello", 60)
    process.close()


def test_a_process_whose_children_outlive_it(tmp_path):
    """Its pipe stays open, and that it is gone is noticed all the same."""
    body = "import os, time\nif os.fork():\n    os._exit(3)\ntime.sleep(60)"
    process = Process(script(tmp_path, body), {}, tmp_path)
    with pytest.raises(Failed, match=r"it crashed \(exit code 3\)"):
        process.answer(30)
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
    assert distance(less, right, start) > module.SAME["float32"]
    assert distance(right, start, start) == float("inf")
    assert distance(start, start, start) == 0


def test_a_full_disk(monkeypatch, capsys):
    """No file may be larger than 1 kB here: the batches do not fit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert main(["--against", "raw", "--workload", "toy"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(r"python -m fastrunner.bench: cannot write .*given.pt: ", capsys.readouterr().err)


def test_too_noisy_to_compare(result, capsys):
    """A sentence, and exit code 1; the rows are there."""
    loud = json.loads(json.dumps(result))
    loud["cases"] = {name: loud["cases"][name] for name in ("fastrunner", "raw")}
    loud["cases"]["raw"]["change"] = {"median": 0.1, "low": -0.6, "high": 2.0, "verdict": "too noisy"}
    assert missing(loud) == 1
    text = text_of(loud)
    assert "too noisy to compare: raw; on a quiet machine" in text
    assert max(map(len, text.splitlines())) <= 80


# The parts.


def test_precisions_are_not_compared():
    """bfloat16 is held against bfloat16, and has a first of its own; fastrunner's other recipes compete with nobody."""
    times = {"raw": 10.0, "fastrunner:auto": 8.0, "fastrunner:graph": 5.0, "mmcv": 20.0, "raw+bf16": 4.0,
             "fastrunner+bf16": 3.0, "raw+channels_last": 9.0}  # fmt: skip
    found = module.judge({name: [[t, t, t]] * 5 for name, t in times.items()})
    changes = {name: row["change"]["median"] for name, row in found["rows"].items() if "change" in row}
    assert changes == pytest.approx(
        {"raw": 0.25, "fastrunner:graph": -0.375, "mmcv": 1.5, "raw+bf16": 1 / 3, "raw+channels_last": 0.125}
    )
    over = {name: row["over_raw"]["median"] for name, row in found["rows"].items() if "over_raw" in row}
    assert over == pytest.approx({"fastrunner:auto": -0.2, "fastrunner:graph": -0.5, "mmcv": 1.0,
                                  "fastrunner+bf16": -0.25, "raw+channels_last": -0.1})  # fmt: skip
    assert found["winners"] == ["fastrunner:auto", "fastrunner+bf16"]
    assert found["sentence"] == (
        "float32: fastrunner:auto is first: the next, raw+channels_last, takes +12.5% to +12.5%; "
        "bf16: fastrunner+bf16 is first: the next, raw+bf16, takes +33.3% to +33.3%"
    )
    assert module.judge({}) == {"rows": {}, "winners": [], "sentence": "nothing could be measured"}


@pytest.fixture
def spec(tmp_path):
    """What the process of a bare loop on one digit a batch is told."""
    workload = find("digits-cnn")
    torch.manual_seed(0)
    given = {"batches": workload.make_batches(2, 0), "state": workload.make_model().state_dict()}
    torch.save(given, tmp_path / "given.pt")
    return {"name": "raw", "variant": "", "runner": "iter", "workload": "digits-cnn", "device": "cpu", "mode": "loop",
            "file": str(tmp_path / "given.pt"), "folder": str(tmp_path), "max_norm": workload.max_norm, "seed": 0,
            "optimizer": dict(workload.optimizer), "threads": 1, "batch_size": 64, "workers": 0, "amp": None,
            "channels_last": False}  # fmt: skip


def test_precision_and_layout_change_how_not_what(spec, monkeypatch):
    """Weights after a few iterations: the same to rounding, 2**-9 an operation with bfloat16; and again after a
    round, since each check starts from the first weights without momentum."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.setattr("time.sleep", time.sleep)  # the workers below replace it
    start, weights = torch.load(spec["file"])["state"], {}
    for name, options in {
        "plain": {},
        "last": {"channels_last": True},
        "half": {"amp": "bf16"},
        "ours": {"name": "fastrunner", "variant": "fused", "amp": "bf16", "channels_last": True},
    }.items():
        worker = Worker({**spec, **options})
        first = torch.load(worker.check(3)["weights"])
        worker.round(3, 1, 3)
        weights[name] = torch.load(worker.check(3)["weights"])
        assert distance(weights[name], first, start) == 0
        laid = worker.model.model.body[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert laid or name in ("plain", "half")
    assert distance(weights["last"], weights["plain"], start) < 1e-3  # another order of summation
    assert 1e-4 < distance(weights["half"], weights["plain"], start) < 0.1
    assert distance(weights["ours"], weights["half"], start) < 0.05


def test_names():
    assert expand(["raw", "mmcv"]) == ["fastrunner", "raw", "mmcv", "mmcv:nosleep"]
    assert expand(["fastrunner:eager", "raw", "raw"]) == ["fastrunner:eager", "raw"]
    assert expand(["raw", "mmcv"], "+bf16") == ["fastrunner+bf16", "raw+bf16", "mmcv+bf16", "mmcv:nosleep+bf16"]
    assert parse("mmcv:nosleep+bf16+channels_last") == Case("mmcv", "nosleep", "bf16", True)
    assert parse("raw+channels_last").full == "raw+channels_last"
    names = ["raw", "fastrunner:auto", "fastrunner:eager", "fastrunner+bf16", "raw+bf16", "raw+channels_last"]
    assert [base_of(name, names) for name in names] == [
        *["fastrunner:auto"] * 3, "fastrunner+bf16", "fastrunner+bf16", "fastrunner:auto",
    ]  # fmt: skip
    assert base_of("raw", ["raw"]) is None
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
