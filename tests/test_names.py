"""Test files have names of their own: pytest imports them by these, whatever folder they are in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_no_two_test_files_share_a_name():
    files = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in files.items() if count > 1] == []
