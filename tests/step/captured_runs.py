"""Runs with recipe ``cudagraph`` on the CPU stand-in."""

from __future__ import annotations

import pytest

from fastrunner.step import capture, captured
from fastrunner.step.cudagraph import CudaGraphStep
from fastrunner.step.graph_stand_in import StandIn


def on_stand_in(monkeypatch: pytest.MonkeyPatch, **options) -> StandIn:
    """Let the recipe capture on the CPU."""
    backend = StandIn(**options)
    monkeypatch.setattr(capture, "backend_for", lambda device: backend)
    monkeypatch.setattr(capture, "captures", lambda model: True)
    return backend


def interpret_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let traced iterations be run by torch, operation by operation: the stand-in does not see compiled ones."""

    def run(module, args):
        return (lambda inputs: module(*inputs)), True

    monkeypatch.setattr(captured, "compile_graph", run)


def captured_of(runner) -> CudaGraphStep:
    step = runner.current_plan().graph
    assert isinstance(step, CudaGraphStep)
    return step


class Clock:
    """Costs in turn, the last one for ever."""

    def __init__(self, costs):
        self.costs = list(costs)

    def __call__(self):
        return self.costs.pop(0) if len(self.costs) > 1 else self.costs[0]
