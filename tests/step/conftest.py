"""A folder for compiled code, shared by the tests of a session."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def compiled_code(tmp_path_factory):
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture
def inductor_cache(compiled_code, monkeypatch):
    """Inductor writes there, and compiles in this process: no pool of workers is left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled_code))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return compiled_code


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What recipes keep on disk is of one test."""
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_libraries_under_auto(monkeypatch):
    """Tests of ``auto`` that are about something else start no process that compiles for a minute."""
    monkeypatch.setattr("fastrunner.step.aot.SHORT_S", 0.0)
