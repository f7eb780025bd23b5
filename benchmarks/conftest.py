"""``make perf``: every ``bench_*.py`` is collected. Those with tests are pytest-benchmark's; those with a ``main``
run as the scripts that they are, each in a process of its own, and pass if their bars are met."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TIMEOUT_S = 1800


class BarMissed(Exception):
    """A script has ended with an exit code that is not 0."""


class Script(pytest.Item):
    """One run of a script. Its output is what it has to say, so it is not captured (``-s``)."""

    def runtest(self) -> None:
        code = subprocess.run([sys.executable, str(self.path)], timeout=TIMEOUT_S).returncode
        if code:
            raise BarMissed(f"{self.path.name} ended with exit code {code}: a bar is missed, or it could not measure")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.path.name


class ScriptFile(pytest.File):
    def collect(self) -> Iterator[Script]:
        item = Script.from_parent(self, name="bars")
        item.add_marker(pytest.mark.timeout(TIMEOUT_S))
        yield item


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix != ".py" or not file_path.name.startswith("bench_"):
        return None
    if "\ndef main(" in file_path.read_text():
        return ScriptFile.from_parent(parent, path=file_path)
    if parent.session.isinitpath(file_path):  # pytest collects by itself what the command line names
        return None
    return pytest.Module.from_parent(parent, path=file_path)
