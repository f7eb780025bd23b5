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
        "options": {"workload": workload, "mode": "loop"},
        "base": "fastrunner",
        "machine": {**machine, "during": {"noisy": False}},
        "cases": {
            "fastrunner": {"median_ns": 98_765.0},
            "raw": {"median_ns": 123_456.0, "change": {"low": 0.2, "high": 0.3, "verdict": "slower"}},
            "mmcv": {"failed": "it crashed"},
            "mmengine": {
                "median_ns": 45_678_912.0,
                "change": {"low": 8.2, "high": 9.1, "verdict": "slower"},
                "sleep_per_epoch_s": 2.0,
            },
            "ignite": {"median_ns": 1000.0, "change": {"low": -8.2, "high": 9.1, "verdict": "too noisy"}},
        },
    }


def test_cells():
    lines = table.table([record("toy"), record("mlp")]).splitlines()
    assert lines[0] == "| an iteration, us | toy | mlp |"
    assert lines[2] == "| fastrunner | **98.77** | **98.77** |"
    assert lines[3] == "| raw | 123.5 (+20% to +30%) | 123.5 (+20% to +30%) |"
    assert lines[4] == "| mmcv | - | - |"
    assert lines[5] == "| mmengine | 45,679 (9.2 x to 10.1 x) | 45,679 (9.2 x to 10.1 x) |"
    assert lines[6] == "| ignite | 1 (too noisy) | 1 (too noisy) |"
    assert "2026-01-02. Medians" in lines[8]
    assert lines[9] == "Beside that mmengine sleeps 2 s an epoch, which is in no number above."
    assert len(lines) == 10
    assert table.table([record("toy", noisy=True)]).endswith("The machine was not quiet (toy).\n")


def test_the_newest_of_each_workload(tmp_path):
    for name, text in (("2026-01-02_runners_toy", "toy"), ("2026-01-01_runners_toy", "toy"),
                       ("2026-01-01_runners_mlp", "mlp"), ("2026-01-01_runners_a_file.py", "a_file.py"),
                       ("2026-01-01_runners_gpt-nano", "gpt-nano")):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(record(text)))
    system = record("toy")
    system["options"]["mode"] = "system"
    (tmp_path / "2026-01-03_runners_toy_system.json").write_text(json.dumps(system))
    assert [path.stem for path in table.newest(tmp_path)] == [
        "2026-01-02_runners_toy",
        "2026-01-01_runners_mlp",
        "2026-01-01_runners_gpt-nano",
        "2026-01-01_runners_a_file.py",
    ]


def test_readme_has_what_its_records_say(tmp_path, monkeypatch):
    """What stands between the marks is what the newest records of all workloads give; and it can be written again."""
    readme = (ROOT / "README.md").read_text()
    inside = readme.split(table.BEGIN)[1].split(table.END)[0]
    records = [json.loads(path.read_text()) for path in table.newest(table.RECORDS)]
    if records:
        assert inside == table.table(records)
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "2026-01-02_runners_toy.json").write_text(json.dumps(record("toy")))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RECORDS", tmp_path)
    assert table.main([]) == 0
    assert (tmp_path / "README.md").read_text() == readme.replace(inside, table.table([record("toy")]))


def test_no_records(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "RECORDS", tmp_path)
    assert table.main([]) == 2
    assert f"there are no records in {tmp_path}" in capsys.readouterr().err


def test_a_record_that_is_none(tmp_path):
    with pytest.raises(OSError, match=r"none\.json"):
        table.main([str(tmp_path / "none.json")])
