"""Bursts in Python: what a recipe's ``many`` promises, by calling the graph of recipe ``graph`` once for each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrunner.plan import burst
from fastrunner.step.graph import GraphStep
from fastrunner.step.guards import quick_key
from fastrunner.step.many import Many


class Several:
    """Stands in for a recipe's burst.

    Args:
        end: (iteration of the run) -> why a burst ends before it: "" goes on, "time" returns what is done,
            anything else is an error of that iteration.
        during: called with the iteration after each; another thread, say.
    """

    def __init__(self, end: Callable[[int], str] = lambda at: "", during: Callable[[int], None] = lambda at: None):
        self.end, self.during = end, during
        self.lengths: list[int] = []  # of the bursts

    def install(self, monkeypatch: Any) -> Several:
        monkeypatch.setattr(burst, "FEWEST", 2)
        monkeypatch.setattr(GraphStep, "why_single", None)
        monkeypatch.setattr(GraphStep, "many", lambda step, iteration: self.many(step, iteration))
        return self

    def many(self, step: GraphStep, iteration: int) -> Many | None:
        averages = step._ema is not None and iteration % step._ema.interval == 0
        found = [graph for (_, averaging, _), graph in step._ready.items() if averaging == averages]
        binding = step._binding
        if step._doubtful or binding is None or not found or not found[-1].logs_columns:
            return None
        graph = found[-1]

        def run(batches: list[Any], rows: torch.Tensor, scalars: torch.Tensor) -> tuple[int, Any, str]:
            assert rows.ndim == 2, "the core takes k rows, also where k is 0"
            values: Any = []
            for number, batch in enumerate(batches):
                why = self.end(iteration + number) if number else ""
                if why or step._ready.get((quick_key(batch), averages, True)) is not graph:
                    self.lengths.append(number)
                    return number, values, "" if why == "time" else why
                binding.row.copy_(rows[number])
                values = graph.run([*binding.static, *batch.values()])
                scalars[number] = torch.tensor([float(value) for value in values], dtype=torch.float64)
                self.during(iteration + number)
            self.lengths.append(len(batches))
            return len(batches), values, ""

        def ran(completed: int) -> None:
            binding.steps += completed
            step.num_calls += completed

        return Many(binding, run, graph.build, num_outputs(graph, step, binding), graph.clips, ran)


def num_outputs(graph: Any, step: GraphStep, binding: Any) -> int:
    """By running it on copies, once for each graph."""
    known = step.__dict__.setdefault("_several_outputs", {})
    if id(graph) not in known:
        key = next(kind for kind, other in step._ready.items() if other is graph)
        batch = step._batches.sample(key[0])
        known[id(graph)] = len(graph.run([*(t.clone() for t in binding.static), *batch.values()]))
    return known[id(graph)]
