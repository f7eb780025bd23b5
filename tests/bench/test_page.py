"""The report as one file: complete, well formed, without anything from elsewhere; and as a browser sees it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastrunner.bench import charts
from fastrunner.bench.account import GcPauses, stalls, trace
from fastrunner.bench.page import account_of, page
from fastrunner.bench.training import PARTS


def change(median: float, verdict: str) -> dict:
    return {"median": median, "low": median - 0.02, "high": median + 0.02, "verdict": verdict}


def parts_of() -> dict[str, list[float]]:
    parts = {part: [10_000.0 * (k + 1)] * 60 for k, part in enumerate(PARTS)}
    parts["logging"][30] = 900_000.0
    parts["data"][40] = 2_000_000.0
    return parts


def result() -> dict:
    parts = parts_of()
    begins = [150_000 * i for i in range(60)]
    return {
        "options": {"workload": "toy", "runner": "iter", "device": "cpu"},
        "machine": {"cpu": "a <fast> processor", "cores": 2, "load": [0.1, 0.2, 0.3], "noisy": False,
                    "time": "2026-01-01T00:00:00Z", "during": {"noisy": True, "others_cores": 1.5}},
        "num_parameters": 72,
        "sentence": "no winner: fastrunner and raw cannot be told apart here",
        "base": "fastrunner",
        "cases": {
            "fastrunner": {"median_ns": 1e5, "failed": None},
            "raw": {"median_ns": 1.01e5, "failed": None, "change": change(0.01, "no difference")},
            "mmcv": {"median_ns": 2e5, "failed": None, "change": change(1.0, "slower"), "sleep_per_epoch_s": 2.0},
            "lightning": {"failed": "not installed; get it with: make peers"},
        },
        "limits": {"sentences": ["limit: 12 us an iteration", "bottleneck: overhead (88%)"]},
        "account": {"parts": parts, "begins": begins, "stalls": stalls(parts, begins, ()), "losses": [2.0, 1.0, 0.5],
                    "log_interval": 20, "hooks": {"OptimizerHook": 7e4, "TextLoggerHook": 2e3}, "plan": "The plan <b>"},
    }  # fmt: skip


class Checker(HTMLParser):
    """Every tag is closed in order, and nothing is loaded."""

    OPEN_ENDED = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.OPEN_ENDED:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_well_formed_and_whole():
    text = page(result())
    checker = Checker()
    checker.feed(text)
    assert checker.stack == []
    assert checker.addresses == ["data:,"]
    assert "http" not in text
    for words in (
        "no winner: fastrunner and raw", "make peers", "mmcv sleeps 2 s an epoch", "bottleneck: overhead",
        "a &lt;fast&gt;", "The plan &lt;b&gt;", "not quiet", "OptimizerHook", "iteration 30: 1.01 ms, log",
        "iteration 40:",
    ):  # fmt: skip
        assert words in text, words


def test_sections_without_data_are_left_out():
    bare = {**result(), "account": None, "limits": None, "cases": {}, "base": None}
    text = page(bare)
    assert "Loss" not in text
    assert "Limits" not in text
    assert "Machine" in text


def test_a_single_run_has_an_account():
    parts = {part: values[:4] for part, values in parts_of().items()}
    training = {"losses": [1.0], "log_interval": 2, "iters_per_s": 10.0, "samples_per_s": 320.0}
    run = {"split": {"samples_ns": parts}, "training": training}
    found = account_of(run)
    whole = sum(parts[part][0] for part in PARTS)
    assert found["begins"] == [0, whole, 2 * whole, 3 * whole]
    both = {
        **result(),
        **run,
        "options": {"model": "cnn", "data": "digits", "runner": "iter", "device": "cpu"},
        "cases": {},
    }
    assert "320 samples/s" in page(both)


def test_stalls_have_causes():
    parts, begins = parts_of(), [150_000 * i for i in range(60)]
    found = stalls(parts, begins, ())
    assert [(stall["index"], stall["cause"]) for stall in found] == [(30, "log"), (40, "data")]
    swept = stalls(parts, begins, [(begins[40] + 1000, begins[40] + 1_900_000)])
    assert swept[1]["cause"] == "GC"
    assert stalls({part: [] for part in PARTS}, [], ()) == []


def test_collections_are_noticed():
    import gc

    pauses = GcPauses()
    with pauses:
        gc.collect()
    gc.collect()
    assert len(pauses.seen) == 1
    assert pauses.seen[0][0] <= pauses.seen[0][1]


def test_trace_has_every_part_of_every_iteration():
    found = result()["account"]
    events = json.loads(json.dumps(trace(found)))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 60 * (1 + len(PARTS))
    first = [event for event in slices if event["tid"] == 2][: len(PARTS)]
    assert [event["name"] for event in first] == list(PARTS)
    assert sum(event["dur"] for event in first) == pytest.approx(150.0)
    assert sum("stall" in event["name"] for event in slices) == 2


def test_charts_of_nothing():
    assert charts.bars([]) == charts.timeline([], []) == charts.curve([], 1) == ""
    assert "<svg" in charts.curve([1.0], 1)
    assert "<svg" in charts.stacked({"data": 0.0})
    assert "<svg" in charts.timeline([5.0, 5.0], [])


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """Chromium draws it without an error of a script, a missing file, or text beyond the page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    file = tmp_path / "report.html"
    file.write_text(page(result()))
    shot = tmp_path / "report.png"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1900",
         f"--screenshot={shot}", file.as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if re.search(r"CONSOLE|Uncaught|ERR_FILE", line)]
    assert console == []
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert Path(shot).stat().st_size > 20_000  # an empty page of this size has 5 kB
