"""README's table of runners comes from records."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)


def record(workload: str, noisy: bool = False) -> dict:
    machine = {"cpu": "CPU", "cores": 2, "torch": "2.13.0", "time": "2026-01-02T03:04:05Z", "noisy": noisy}
    return {
        "options": {"workload": workload},
        "machine": {**machine, "during": {"noisy": False}},
        "cases": {
            "fastrunner": {"median_ns": 98_765.0},
            "raw": {"median_ns": 123_456.0, "change": {"low": 0.2, "high": 0.3}},
            "mmcv": {"failed": "it crashed"},
        },
    }


def test_cells():
    lines = table.table([record("toy"), record("mlp")]).splitlines()
    assert lines[0] == "| an iteration, us | toy | mlp |"
    assert lines[2] == "| fastrunner | **98.77** | **98.77** |"
    assert lines[3] == "| raw | 123.5 (+20% to +30%) | 123.5 (+20% to +30%) |"
    assert lines[4] == "| mmcv | - | - |"
    assert "2026-01-02; medians" in lines[6]
    assert "not quiet" not in lines[-1]
    assert table.table([record("toy", noisy=True)]).endswith("The machine was not quiet.\n")


def test_readme_has_what_its_records_say(tmp_path, monkeypatch):
    """What stands between the marks is what the newest records of all workloads give; and it can be written again."""
    readme = (ROOT / "README.md").read_text()
    inside = readme.split(table.BEGIN)[1].split(table.END)[0]
    records = {}
    for path in sorted((ROOT / "benchmarks" / "records").glob("*_runners_*.json")):
        found = json.loads(path.read_text())
        records[found["options"]["workload"]] = found  # by date: the newest is last
    if records:
        assert sorted(inside.splitlines()[0].split("|")[2:-1]) == sorted(f" {name} " for name in records)
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "a.json").write_text(json.dumps(record("toy")))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    assert table.main([str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "README.md").read_text() == readme.replace(inside, table.table([record("toy")]))


def test_no_records(capsys):
    assert table.main([]) == 2
    assert "benchmarks/records" in capsys.readouterr().out


def test_a_record_that_is_none(tmp_path):
    with pytest.raises(OSError, match=r"none\.json"):
        table.main([str(tmp_path / "none.json")])
