"""The README tells the truth: its script runs and prints its log lines, its tree is the tree."""

from __future__ import annotations

import logging
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.compile(r"\.(py|h|cpp)$")


def test_the_script_runs_and_prints_the_lines(caplog):
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    with caplog.at_level(logging.INFO):
        exec(compile(script, "README.md", "exec"), {})
    printed = [shape(record.getMessage()) for record in caplog.records]
    shown = re.findall(r"^fastrunner - INFO - (.*)$", README, re.MULTILINE)
    assert len(shown) == 5
    first = printed.index(shape(shown[0]))
    assert printed[first : first + 5] == [shape(line) for line in shown]
    accuracy = float(re.search(r"acc: (\S+)", caplog.records[-1].getMessage())[1])
    assert accuracy > 0.9  # chance is 0.1


def shape(line: str) -> str:
    """A log line without its measured numbers: those with a fraction, and times."""
    return re.sub(r"\d+:\d\d:\d\d|\d+\.\d+(e[+-]\d\d)?", "N", line)


def test_the_tree_is_the_tree():
    tree = re.search(r"```\n(fastrunner/\n.*?)```", README, re.DOTALL)[1]
    listed: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if line.split()[0].endswith("/"):
            folders.append(line.split()[0].rstrip("/"))
        elif folders and folders[0] in ("fastrunner", "csrc"):
            listed |= {"/".join([*folders, word]) for word in line.split() if CODE.search(word)}
    there = {
        str(path.relative_to(ROOT))
        for folder in ("fastrunner", "csrc")
        for path in (ROOT / folder).rglob("*")
        if CODE.search(path.name)
    }
    # packages' __init__.py say what their folder is; a .h beside its .cpp is part of it
    expected = {
        path
        for path in there
        if (not path.endswith("/__init__.py") or path == "fastrunner/__init__.py")
        and not (path.endswith(".h") and path[:-1] + "cpp" in there)
    }
    assert listed == expected
