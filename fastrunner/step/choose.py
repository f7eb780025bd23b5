"""The recipe of a run: what stands for the model and the optimizer in an iteration, and what may replace all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..dist import get_dist_info
from ..model.parallel import unwrap
from .config import StepConfig
from .eager import move_channels_last, stepping
from .fused import refuse, updater
from .torch_private import Unfit

if TYPE_CHECKING:
    from .auto import Auto
    from .compiled import CompiledModules
    from .cudagraph import CudaGraphStep
    from .graph import GraphStep


class Step:
    """How the iterations of one model and optimizer are computed.

    Args:
        model, optimizer: the runner's, as they are now.
        config: what the user said.
        warn: told, once each, what did not come as asked for.

    Attributes:
        model: has the ``train_step`` that iterations call.
        updater: has the ``zero_grad`` and ``step`` that iterations call; where it is a fused one, clip and average go
            into it.
        reasons: recipe -> why it is not used, or not any more.
    """

    def __init__(self, model: Any, optimizer: Any, config: StepConfig, warn: Callable[[str], None]) -> None:
        self._made_for = (model, optimizer)
        self.config, self.reasons = config, dict[str, str]()
        self._warn = warn
        self._graphs: dict[tuple[Any, ...], GraphStep | CudaGraphStep] = {}
        self._resumed: dict[str, Any] = {}
        if config.channels_last is True:
            move_channels_last(unwrap(model))
        self._compiled: CompiledModules | None = None
        self._auto: Auto | None = None
        self.updater = optimizer
        if config.recipe != "eager" and hasattr(optimizer, "param_groups"):
            self.updater = updater(optimizer)
            if self.updater is optimizer and not hasattr(optimizer, "clipped_step"):
                self.reasons["fused"] = refuse(optimizer) or ""
        if config.recipe == "auto":
            self.model = self._automatic()
        else:
            compiled = self._compile(model) if config.recipe == "compile" else None
            self.model = stepping(model, config.amp, config.channels_last is True, compiled)

    def _automatic(self) -> Any:
        """What has the ``train_step`` of recipe auto."""
        model, optimizer = self._made_for
        if self._is_captured():
            return stepping(model, self.config.amp, self.config.channels_last is True)
        if not hasattr(optimizer, "param_groups"):
            self.reasons["auto"] = f"it drives one optimizer, the runner has {type(optimizer).__name__}"
        elif get_dist_info()[1] > 1:
            self.reasons["auto"] = "each process would decide by itself, and the ranks would wait for each other"
        else:
            from .auto import Auto

            self._auto = Auto(model, unwrap(model), optimizer, self.updater, self.config, self._warn)
            return self._auto
        amp = None if self.config.amp == "auto" else self.config.amp
        return stepping(model, amp, self.config.channels_last is True)

    def _compile(self, model: Any) -> Callable[..., Any] | None:
        from .compiled import CompiledModules  # not before somebody asks for a compiler

        try:
            self._compiled = CompiledModules(unwrap(model), model.train_step, self.config.modules, self._warn)
        except Unfit as error:
            self.reasons["compile"] = str(error)
            self._warn(f"nothing is compiled: {error}. The step runs as it is.")
            return None
        return self._compiled.train_step

    def fits(self, model: Any, optimizer: Any) -> bool:
        """Whether this was made for exactly these."""
        return self._made_for[0] is model and self._made_for[1] is optimizer

    def note_hooks(self, why: str | None) -> None:
        """Why hooks, or who owns the optimizers, leave no iteration to graphs; None: they do leave some."""
        self.reasons.pop("a graph", None)
        if why is not None and self.config.recipe not in ("eager", "fused", "compile"):
            self.reasons["a graph"] = why

    @property
    def takes_windows(self) -> bool:
        """Whether the recipe has graphs that accumulation and a loss scale can be part of."""
        recipes = ("graph", "aot", "auto", "cudagraph")
        return self.config.recipe in recipes and "auto" not in self.reasons

    def graph(
        self, max_norm: float | None, ema: Any, adds_up: Any = None, scaler: Any = None
    ) -> GraphStep | CudaGraphStep | None:
        """Whole iterations with these terms, as ``GraphStep`` names them; None where the recipe has none."""
        if self.config.recipe == "cudagraph" or (self.config.recipe == "auto" and self._is_captured()):
            return self._cudagraph(max_norm, ema, adds_up, scaler)
        if not self.takes_windows:
            return None
        from .auto import Beside  # not before somebody asks for a compiler
        from .graph import GraphStep

        model, optimizer = self._made_for
        key = (max_norm, id(ema), id(adds_up), id(scaler))
        if key not in self._graphs:
            beside = None if self._auto is None else Beside(self._auto)
            step = self.model if self._auto is None else self._auto.stepping
            kind: type[GraphStep] = GraphStep
            if self.config.recipe in ("aot", "auto"):
                from .aot import AotGraphStep as kind
            graph = self._graphs[key] = kind(
                model, step.train_step, optimizer, self._warn, max_norm, ema, beside, adds_up, scaler
            )
            graph.load_state_dict(self._resumed)
        return self._graphs[key]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what makes the iterations after a resume the same as without. Empty for most recipes."""
        states = [graph.state_dict() for graph in self._graphs.values()]
        return max(states, key=lambda state: sum(state.get("seen", {}).values()), default={})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state
        for graph in self._graphs.values():
            graph.load_state_dict(state)

    def _is_captured(self) -> bool:
        """Whether ``auto`` is about CUDA graphs: where the model is on a GPU, and precision and layout are said."""
        from .capture import captures

        return captures(self._made_for[0]) and "auto" not in (self.config.amp, self.config.channels_last)

    def _cudagraph(self, max_norm: float | None, ema: Any, adds_up: Any, scaler: Any) -> CudaGraphStep | None:
        """Whole iterations as CUDA graphs; None, and a reason, where there can be none."""
        from . import capture, cudagraph

        model, optimizer = self._made_for
        key = (max_norm, id(ema), id(adds_up), id(scaler))
        if key not in self._graphs and "cudagraph" not in self.reasons:
            try:
                backend = capture.backend_for(capture.device_of(model))
                module, place, exchange = capture.inside(model, backend.collectives)
                call = self._compile(module) if self.config.captures == "compile" else None
                step = stepping(module, self.config.amp, self.config.channels_last is True, call).train_step
                traced = self.config.captures == "graph"
                graph = cudagraph.CudaGraphStep(
                    module,
                    step,
                    optimizer,
                    self._warn,
                    backend,
                    max_norm,
                    ema,
                    place,
                    exchange,
                    traced,
                    adds_up,
                    scaler,
                )
                graph.load_state_dict(self._resumed)
                self._graphs[key] = graph
            except Unfit as error:
                self.reasons["cudagraph"] = str(error)
                self._warn(f"no CUDA graphs: {error}. The step runs on the recipe below.")
        return self._graphs.get(key)  # type: ignore[return-value]

    @property
    def num_whole(self) -> int:
        """Iterations that were one compiled call so far."""
        return sum(getattr(graph, "num_calls", 0) for graph in self._graphs.values())

    @property
    def compiling(self) -> bool:
        """Whether anything is being compiled beside the training, which may make iterations faster."""
        if self._auto is not None and not self._auto.settled:
            return True
        return any(getattr(graph, "compiling", False) for graph in self._graphs.values())  # CUDA graphs: at once

    def close(self) -> None:
        """End what is being compiled elsewhere; what is ready stays."""
        for each in (*self._graphs.values(), self._auto):
            if each is not None:
                each.close()

    def explain(self) -> list[str]:
        """The recipe, and why others are not in use, one line each."""
        lines = [f"recipe {self.config.recipe}", *(f"not {recipe}: {why}" for recipe, why in self.reasons.items())]
        if self._compiled is not None:
            lines += self._compiled.explain()
        if self._auto is not None:
            lines += self._auto.explain()
        return [*lines, *(line for graph in self._graphs.values() for line in graph.explain())]
