"""One captured iteration: what is recorded, where its inputs lie, and where its results go.

    batch --copy--> static inputs | recorded: forward, backward, exchange, clip, update, average, scalars to the ring |

The forward runs on parameters that are new to autograd and lie where the model's lie. So gradients never reach the
model's ``.grad``, and no node of autograd remembers a stream that is not captured (DDP keeps such nodes). Everything
that a recording writes besides its pool is the model's, the optimizer's, or the ring's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .binding import Binding
from .device_update import DeviceUpdate, Options, row_on_device
from .graph_backend import GraphBackend, Recording
from .outputs import Outputs
from .scalar_ring import ScalarRing
from .torch_private import Unfit, compile_graph, swapped
from .trace import found_loss, trace_step


class Exchange(Protocol):
    """What the ranks of a run share in an iteration, in operations that can be captured."""

    def before(self, buffers: Sequence[Tensor]) -> None:
        """Make the buffers those of rank 0."""

    def mean(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients' means over the ranks."""


class LossScale(NamedTuple):
    """A loss scale that lives on the device, as ``torch.amp.GradScaler`` keeps it.

    Attributes:
        scale: float32, 0-D.
        growth: int32, 0-D: updates since a gradient was not finite.
        fixed: the scale after each update, where it stays; else factors and interval are GradScaler's.
    """

    scale: Tensor
    growth: Tensor
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    interval: int = 2000
    fixed: float | None = None

    def unscale(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Divide in place; 1 where a gradient is inf or NaN, else 0: float32, shape (1,)."""
        found = torch.zeros_like(self.scale).reshape(1)
        inverse = self.scale.double().reciprocal().float()
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            if grad is not None:
                by_dtype.setdefault(grad.dtype, []).append(grad)
        for each in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(each, found, inverse)
        return found

    def update(self, found_inf: Tensor) -> None:
        """The scale of the next iteration."""
        if self.fixed is not None:
            self.scale.fill_(self.fixed)
            return
        factors = self.growth_factor, self.backoff_factor, self.interval
        torch._amp_update_scale_(self.scale, self.growth, found_inf.reshape(()), *factors)


class Window(NamedTuple):
    """An iteration's place among those whose gradients add up to one update.

    Attributes:
        divisor: of the loss: 0-D, on the device.
        sums: the gradients so far, one for each trained parameter; zeros at a window's start.
        ends: the update follows.
    """

    divisor: Tensor
    sums: Sequence[Tensor]
    ends: bool


class Terms(NamedTuple):
    """What an iteration contains besides the model's step. None: it does not."""

    max_norm: float | None = None
    averages: bool = False
    scale: LossScale | None = None
    window: Window | None = None
    exchange: Exchange | None = None


class EagerBody:
    """The operations of an iteration of ``fused`` or ``compile``, one by one.

    Args:
        binding: parameters, buffers, state.
        options: on the device.
        step: ``train_step(batch, optimizer)``.
    """

    def __init__(self, binding: Binding, options: Options, step: Callable[..., Any], terms: Terms) -> None:
        self._binding, self._step, self._terms = binding, step, terms
        self._update = DeviceUpdate(binding, options.tensor, terms.max_norm, terms.averages)
        self.has_grads: frozenset[str] = frozenset()  # names, as the last call found them

    def __call__(self, batch: Any) -> tuple[Outputs, Tensor | None]:
        """The outputs, and the norm before clipping."""
        binding, terms = self._binding, self._terms
        with torch.no_grad():
            if terms.exchange is not None:
                terms.exchange.before(list(binding.buffers.values()))
        outputs, grads = self._forward_backward(batch)
        self.has_grads = frozenset(e.name for e, g in zip(binding.trained, grads, strict=True) if g is not None)
        with torch.no_grad():
            if terms.window is not None:
                grads = _added(terms.window, grads)
                if not terms.window.ends:
                    self._update.average()
                    return outputs, None
            if terms.exchange is not None:
                grads = terms.exchange.mean(grads)
            found_inf = None if terms.scale is None else terms.scale.unscale(grads)
            norm = self._update(grads, found_inf)
            if terms.scale is not None and found_inf is not None:
                terms.scale.update(found_inf)
            if terms.window is not None:
                torch._foreach_zero_(list(terms.window.sums))
        return outputs, norm

    def _forward_backward(self, batch: Any) -> tuple[Outputs, Sequence[Tensor | None]]:
        binding, terms = self._binding, self._terms
        with torch.enable_grad():
            own = {n: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for n, p in binding.params.items()}
            with swapped(binding.model, dict(own)):
                outputs = Outputs(self._step(batch, binding.optimizer))
                _check_buffers(binding)
            loss = found_loss(outputs)
            if terms.window is not None:
                loss = loss / terms.window.divisor.to(loss.dtype)
            if terms.scale is not None:
                loss = loss * terms.scale.scale
            grads = torch.autograd.grad(loss, [own[each.name] for each in binding.trained], allow_unused=True)
        return outputs, grads


def _added(window: Window, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    found = [(total, grad) for total, grad in zip(window.sums, grads, strict=True) if grad is not None]
    torch._foreach_add_([total for total, _ in found], [grad for _, grad in found])
    return [None if grad is None else total for total, grad in zip(window.sums, grads, strict=True)]


def _check_buffers(binding: Binding) -> None:
    """Raise Unfit where the step put another tensor in a buffer's place: a replay would write to the old one."""
    now = dict(binding.model.named_buffers())
    for name, buffer in binding.buffers.items():
        if now.get(name) is not buffer:
            raise Unfit(f"the step puts another tensor into {name}; write into it: {name}.copy_(...)")


class Body(Protocol):
    """The operations of an iteration.

    Attributes:
        has_grads: names of the parameters that get a gradient, once it has run.
    """

    has_grads: frozenset[str]

    def __call__(self, batch: Any) -> tuple[Outputs, Tensor | None]:
        """The outputs, and the norm before clipping."""


class TracedBody:
    """The whole iteration as one compiled graph, as recipe ``graph`` runs it.

    Args: as of ``EagerBody``; ``batch`` is an example.
    Raises:
        Unfit: it cannot be traced, or terms ask for more than the graph has.
    """

    def __init__(self, binding: Binding, options: Options, step: Callable[..., Any], terms: Terms, batch: Any) -> None:
        if terms.scale is not None or terms.window is not None or terms.exchange is not None:
            raise Unfit("a traced iteration has no loss scale, no accumulation, and no exchange between ranks")
        self._binding, self._options = binding, options
        binding.static[-1] = binding.row.to(options.tensor.device)
        traced = trace_step(binding, batch, terms.max_norm, step, averages=terms.averages)
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._outputs, self._clips, self.has_grads = traced.outputs, traced.clips, traced.has_grads
        self._run, _ = compile_graph(traced.graph, [*binding.static, *leaves])

    def __call__(self, batch: Any) -> tuple[Outputs, Tensor | None]:
        with torch.no_grad():
            leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
            row = row_on_device(self._binding, self._options.tensor)
            values = list(self._run([*self._binding.static[:-1], row, *leaves]))
        outputs = copy.copy(self._outputs)
        outputs.flat = values[: len(values) - self._clips]
        return outputs, values[-1] if self._clips else None


class Captured:
    """An iteration for batches of one structure and shape.

    Args:
        backend: captures it.
        body: its operations.
        binding: what they read and write.
        options: of the optimizer.
        batch: an example.
        others: tensors on the device that the body may use besides the binding's.
    """

    def __init__(
        self,
        backend: GraphBackend,
        body: Body,
        binding: Binding,
        options: Options,
        batch: Any,
        others: Iterable[Tensor] = (),
    ) -> None:
        self._backend, self._body, self._binding, self._options = backend, body, binding, options
        leaves, spec = pytree.tree_flatten(batch)
        self.inputs = [backend.static(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = iter(self.inputs)
        self._batch = pytree.tree_unflatten([next(inputs) if isinstance(x, Tensor) else x for x in leaves], spec)
        self._others = list(others)
        self._layout: list[tuple[Any, ...]] = []
        self.num_warm_ups = 0
        self.num_bytes = 0
        self.clips = False
        self.recording: Recording | None = None

    def warm_up(self, tensors: Sequence[Tensor]) -> tuple[dict[str, Any], Any]:
        """An iteration that trains, on the side stream, operation by operation.

        Raises:
            Unfit: the step cannot be captured; nothing was updated.
        """
        self._backend.copy_in(self.inputs, tensors)
        outputs, norm = self._backend.warm_up(lambda: self._body(self._batch))
        values = [*outputs.flat, *(() if norm is None else (norm,))]
        self._layout, self.clips = [_look(value) for value in values], norm is not None
        if any(kind != self._backend.device.type for kind, _, _ in self._layout):
            raise Unfit("train_step returns a tensor of the host, which a replay does not compute")
        self.num_warm_ups += 1
        values = [value.clone() if any(value is each for each in self.inputs) else value for value in values]
        return outputs.builder()(values), norm

    def record(self, generators: Iterable[torch.Generator]) -> None:
        """Capture it. Nothing of it runs.

        Raises:
            Unfit, torch.OutOfMemoryError: as the backend.
        """
        scalars = [kind for _, kind, shape in self._layout if shape == ()]
        self._ring = ScalarRing(self._backend, scalars)
        known = [*self._binding.static, *self.inputs, self._options.tensor, *self._ring.tensors, *self._others]
        self.recording, (outputs, extras) = self._backend.record(self._recorded, known, generators)
        self.num_bytes = self.recording.num_bytes
        self._extras: list[Tensor] = extras
        self._places = [at for at, (_, _, shape) in enumerate(self._layout) if shape != ()]
        self.build = outputs.builder()
        self.replay = self.recording.replay

    def _recorded(self) -> tuple[Outputs, list[Tensor]]:
        outputs, norm = self._body(self._batch)
        values = [*outputs.flat, *(() if norm is None else (norm,))]
        if [_look(value) for value in values] != self._layout:
            raise Unfit("train_step returns other things from iteration to iteration")
        with torch.no_grad():
            self._ring.write([value.detach() for value in values if value.shape == ()])
        return outputs, [value.detach() for value in values if value.shape != ()]

    def run(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Replay it on a batch's tensors.

        Returns:
            The loss, all tensors that train_step returned, and the norm where it clips: memory that stays.
        """
        self._backend.copy_in(self.inputs, tensors)
        row = self._ring.take()
        self.replay()
        return row if not self._extras else self._with_extras(row)

    def _with_extras(self, row: Sequence[Tensor]) -> list[Tensor]:
        values = list(row)
        for at, extra in zip(self._places, self._extras, strict=True):
            values.insert(at, extra.clone())  # the next replay writes there again
        return values

    def free(self) -> None:
        """Give its memory back to the pool."""
        if self.recording is not None:
            self.recording.free()


def _look(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Tensor):
        raise Unfit(f"train_step returned a {type(value).__name__}, which a replay cannot make anew")
    return (value.device.type, value.dtype, tuple(value.shape))
