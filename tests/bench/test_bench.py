"""``python -m fastrunner.bench``: it learns, says all that was asked for, fits 80 columns, and refuses nonsense."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from fastrunner.bench import machine, run
from fastrunner.bench.__main__ import main, make_options, make_parser
from fastrunner.bench.report import duration, render
from fastrunner.bench.run import Options
from fastrunner.bench.training import PARTS, RUNNERS
from fastrunner.bench.workloads import DATA, LOADERS, MODELS

SHORT = ["--data", "digits", "--num-warm-iter", "3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """One short run of each runner on digits, with everything; the tax is measured a little less well than else."""
    torch.set_num_threads(1)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("step_tax", "noop_tax"):
            patch.setattr(run, name, briefly(getattr(run, name)))
        for runner in RUNNERS:
            file = tmp_path_factory.mktemp("bench") / "out.json"
            options = [*SHORT, "--runner", runner, "--num-bench-iter", "120", "--results-file", str(file)]
            assert main(options) == 0
            found[runner] = json.loads(file.read_text())
    return found


def briefly(tax: Callable[..., dict]) -> Callable[..., dict]:
    """The same with few rounds of few iterations."""

    def less(*args: object, rounds: int, num_iters: int, **options: object) -> dict:
        return tax(*args, rounds=min(rounds, 6), num_iters=min(num_iters, 60), **options)

    return less


def text_of(result: dict, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        render(result, console)
    return capture.get()


@pytest.mark.parametrize("runner", RUNNERS)
def test_it_learns(results, runner):
    """Digits: chance is 10 %; the measured accuracy of this short run is 97 to 98 %."""
    result = results[runner]
    assert result["val"]["num_samples"] == 355
    assert result["val"]["accuracy"] > 0.85
    assert result["training"]["last_loss"] < 0.5 * result["training"]["first_loss"]
    assert 1.0 < result["training"]["first_loss"] < 3.0  # ln 10 = 2.3 before anything is learned


@pytest.mark.parametrize("runner", RUNNERS)
def test_results_hold_everything_with_every_sample(results, runner):
    result = results[runner]
    assert result["options"]["runner"] == runner
    training = result["training"]
    epoch = 1442 // 32
    assert training["num_iters"] == (124 if runner == "iter" else 3 * epoch)
    assert training["timed_iters"] == training["num_iters"] - 4 == len(training["iter"]["samples_ns"])
    assert len(training["data_wait"]["samples_ns"]) == training["timed_iters"]
    assert set(result["split"]["mean_ns"]) == set(PARTS)
    assert all(len(result["split"]["samples_ns"][part]) == result["split"]["timed_iters"] > 25 for part in PARTS)
    for case in ("step", "noop", "noop_logging"):
        rounds = result["tax"][case]["rounds"]
        assert (
            len(result["tax"][case]["bare"]["samples_ns"]) == len(result["tax"][case]["runner"]["samples_ns"]) == rounds
        )
    for key in ("cpu", "cores", "threads", "torch", "isa", "load"):
        assert result["machine"][key], key
    assert result["machine"]["torch"] == torch.__version__
    assert sum(value for phase, value in result["seconds"].items() if phase != "all") <= result["seconds"]["all"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_report_fits_80_columns_and_says_it_all(results, runner):
    text = text_of(results[runner])
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in (
        RUNNERS[runner], "iterations/s", "samples/s", "data wait", "step", "hooks", "logging", "rest", "Runner tax",
        "this step", "no-op step", "95 % interval", "first loss", "last loss", "val accuracy", "chance is 10%",
        "processor", "cores", "threads", torch.__version__, "load before",
    ):  # fmt: skip
        assert word in text, word
    rate = results[runner]["training"]["iters_per_s"]
    assert f"{rate:,.4g}" in text


def test_report_says_nothing_about_gpus_where_there_is_none(results):
    text = text_of(results["iter"])
    assert not re.search(r"gpu|cuda", text, re.IGNORECASE)


def test_report_keeps_notes_on_their_line(results):
    """No row is wrapped at 80 columns: every line of a table starts with its label."""
    text = text_of(results["iter"]).split("Throughput")[1].split("Machine")[0]
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    assert all(line[2:5].strip() for line in rows), rows


def test_report_of_a_tax_that_cannot_be_seen(results):
    result = json.loads(json.dumps(results["iter"]))
    tax = result["tax"]["step"]["tax_us"]
    tax.update(median=5.0, low=-20.0, high=31.0, contains_zero=True)
    assert "The first interval contains 0: no tax can be seen behind a step of" in text_of(result)
    assert "[-20.0 us, +31.0 us]" in text_of(result)
    tax.update(low=2.0, contains_zero=False)
    assert "The first interval" not in text_of(result)
    tax.update(median=-9.0, high=-2.0)
    assert "The first interval is below 0, which no tax can be" in text_of(result)
    del result["tax"]
    assert "Runner tax" not in text_of(result)


def test_report_warns_of_a_busy_machine(results):
    result = json.loads(json.dumps(results["iter"]))
    result["machine"].update(noisy=True, load=[3.5, 1.0, 1.0])
    assert "warning: the load was 3.5 before the start" in text_of(result)
    result["machine"].update(noisy=False)
    assert "warning" not in text_of(result)


@pytest.mark.parametrize(
    ("ns", "sign", "text"),
    [
        (0.0, "", "0.00 us"), (123.4, "", "0.12 us"), (4_567, "+", "+4.57 us"), (98_760, "", "98.8 us"),
        (999_400, "", "999 us"), (999_900, "", "1.00 ms"), (-25_000_000, "+", "-25.0 ms"), (2.5e9, "", "2.50 s "),
    ],
)  # fmt: skip
def test_duration(ns, sign, text):
    assert duration(ns, sign) == text


# The command line.


def test_every_combination_that_is_offered_runs(tmp_path, capsys):
    """Every loader of the small data set, the other model, and the switches; briefly."""
    for extra in (
        ["--loader", "dataloader", "-j", "1", "--model", "mlp"],
        ["--amp-dtype", "bfloat16", "--channels-last", "-b", "16", "--seed", "3", "--runner", "epoch"],
    ):
        short = [*SHORT, "--num-bench-iter", "8", "--no-tax", "--work-dir", str(tmp_path / extra[1])]
        assert main([*short, *extra]) == 0
    text = capsys.readouterr().out
    assert "mlp" in text
    assert "loader dataloader" in text
    assert "bfloat16, channels last" in text
    assert "Runner tax" not in text
    kept = {path.name for path in (tmp_path / "bfloat16" / "train").iterdir()}
    assert "latest.pth" in kept
    assert any(name.endswith(".log.json") for name in kept)
    assert "Epoch [1]" in (tmp_path / "bfloat16" / "bench.log").read_text()


def test_same_seed_same_losses_in_the_same_work_dir(tmp_path, capsys):
    """Runs again where it has run; and writes a report and a trace."""
    losses, files = [], [str(tmp_path / name) for name in ("out.json", "out.html", "trace.json")]
    for seed in (1, 1, 2):
        options = [*SHORT, "--num-bench-iter", "12", "--no-tax", "--seed", str(seed), "--work-dir", str(tmp_path)]
        assert main([*options, "--results-file", files[0], "--report", files[1], "--trace", files[2]]) == 0
        losses.append(json.loads(Path(files[0]).read_text())["training"]["losses"])
    assert losses[0] == losses[1] != losses[2]
    page = Path(files[1]).read_text()
    assert "Where an iteration goes" in page
    assert "cnn on digits" in page
    assert any(event["name"] == "step" for event in json.loads(Path(files[2]).read_text())["traceEvents"])


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["--model", "resnet9000"], MODELS),
        (["--data", "imagenet"], DATA),
        (["--loader", "ffcv"], LOADERS),
        (["--runner", "epochs"], RUNNERS),
        (["--data", "digits", "--loader", "dali"], DATA["digits"].loaders),
        (["--amp-dtype", "float8"], ("float32", "bfloat16")),
    ],
)
def test_unknown_names_are_refused_with_the_choices(arguments, choices, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert arguments[-1] in message
    assert all(choice in message for choice in choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:63"], "--device cuda:63: torch .* sees no such GPU here; use --device cpu"),
        (["--device", "tpu"], "--device tpu is no device that torch knows; choose cpu or cuda"),
        (["--device", "meta"], "--device meta is not supported; choose cpu or cuda"),
        (["-b", "0"], "-b/--batch-size: must be >= 1, got 0"),
        (["--seed", "-1"], "--seed: must be >= 0, got -1"),
        (["--num-bench-iter", "many"], "--num-bench-iter: invalid positive value: 'many'"),
        (["--results-file", "nowhere/out.json"], "--results-file nowhere/out.json: its folder does not exist"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--device", "cuda"])
    assert exit.value.code == 2
    assert "sees no such GPU here; use --device cpu" in capsys.readouterr().err


def test_batch_larger_than_the_data_set(capsys):
    with pytest.raises(SystemExit) as exit:
        main([*SHORT, "-b", "2000"])
    assert exit.value.code == 2
    assert "--batch-size 2000 is more than the 1442 samples to train on" in capsys.readouterr().err


def test_what_the_machine_refuses_is_a_sentence(monkeypatch, capsys):
    Path("file").write_text("not a folder")
    assert main([*SHORT, "--work-dir", "file/below"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(r"python -m fastrunner\.bench: .*file", captured.err)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(SHORT) == 1
    assert re.search(r"pip install fastrunner\[bench\]", capsys.readouterr().err)


@pytest.mark.cuda
@pytest.mark.parametrize("runner", RUNNERS)
def test_on_a_gpu(runner, tmp_path, capsys):
    file = tmp_path / "out.json"
    options = [*SHORT, "--device", "cuda", "--runner", runner, "--num-bench-iter", "120", "--results-file", str(file)]
    assert main(options) == 0
    result = json.loads(file.read_text())
    assert result["val"]["accuracy"] > 0.85
    assert result["machine"]["gpu"] == torch.cuda.get_device_name()
    assert "GPU" in capsys.readouterr().out


def test_defaults():
    options, results = make_options(make_parser(), [])
    assert options == Options()
    assert (options.runner, options.data, options.loader, results) == ("iter", "photos", "dali", None)
    assert make_options(make_parser(), ["--data", "digits"])[0].loader == "memory"


def test_help_from_a_shell():
    """As a person types it."""
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-m", "fastrunner.bench", "--help"], cwd=root, capture_output=True, text=True, check=True
    )
    assert "--num-bench-iter" in shown.stdout
    assert "--results-file" in shown.stdout


# The machine.


def test_facts(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.2, 0.3))
    found = machine.facts(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert 1 <= found["cores"] <= (machine.os.cpu_count() or 1)
    assert found["cpu"]
    assert not found["noisy"]
    assert "gpu" not in found
    monkeypatch.setattr("os.getloadavg", lambda: (0.6 * found["cores"], 0.2, 0.3))
    assert machine.facts(torch.device("cpu"))["noisy"]


# Photographs: the default run.


@pytest.mark.slow
@pytest.mark.timeout(600)  # half a minute where nothing else runs
@pytest.mark.parametrize("runner", RUNNERS)
def test_default_run_learns_photographs(runner, tmp_path, capsys):
    """The default, as it is: JPEG files through DALI. Chance is 10 %; four seeds gave 84 to 89 %."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    torch.set_num_threads(2)
    file = tmp_path / "out.json"
    assert main(["--runner", runner, "--results-file", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["options"]["loader"] == "dali"
    assert result["val"]["num_samples"] == 500
    assert result["val"]["accuracy"] > 0.6
    assert result["training"]["last_loss"] < 0.5 * result["training"]["first_loss"]
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_photos_through_dali_briefly(tmp_path, monkeypatch, capsys):
    """The default's parts in seconds: few photographs' crops, few iterations."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    from fastrunner.data import builtin

    monkeypatch.setattr(builtin, "_CROPS", {"train": 16, "val": 4})
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "out.json"
    assert main(["--num-bench-iter", "20", "--num-warm-iter", "2", "--no-tax", "--results-file", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["val"]["num_samples"] == 40
    assert result["training"]["num_iters"] == 23
    assert min(result["training"]["data_wait"]["samples_ns"]) > 0
    assert "photos, loader dali" in capsys.readouterr().out
