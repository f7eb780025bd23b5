"""Steps that training does not see: run on its own model and optimizer, and undone to the bit.

    with Snapshot(model, optimizers) as before:
        ...                      # forward, backward, update, as often as wanted
        before.restore()         # and at the end by itself

What is undone: values (and places in memory) of parameters, buffers and optimizer state, ``.grad``, the random states
of torch, python and numpy. What is not: other Python state of the model. ``guards.SilentState`` says whether it moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data import rng
from .torch_private import Unfit
from .verify import Result

Call = Callable[..., Any]  # train_step(batch, optimizer)
Side = TypeVar("Side", bound=Hashable)


class Snapshot:
    """What steps of a model change, as it is now.

    Args:
        model: whose parameters and buffers.
        optimizer: torch's; or several, by name, as MMCV allows.

    Cost: the memory of parameters, buffers and optimizer state once more; a copy to make it, one for each ``restore``.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        optimizers = optimizer.values() if isinstance(optimizer, Mapping) else (optimizer,)
        self._states = [each.state for each in optimizers if hasattr(each, "state")]
        self._slots = [(state, dict(state), [(slot, dict(slot)) for slot in state.values()]) for state in self._states]
        self.params = list(model.parameters())
        held = [t for _, _, slots in self._slots for _, slot in slots for t in slot.values() if isinstance(t, Tensor)]
        tensors = {id(t): t for t in (*self.params, *model.buffers(), *held)}
        self._kept = [(t, t.data, t.detach().clone()) for t in tensors.values()]
        self._grads = [p.grad for p in self.params]
        self._random = rng.capture()
        self._device_random = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def __enter__(self) -> Snapshot:
        self._drop_grads()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restore()
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad

    def restore(self) -> None:
        """As it was, but for ``.grad``, which is None until the end."""
        for state, slots, contents in self._slots:
            state.clear()
            state.update(slots)
            for slot, values in contents:
                slot.clear()
                slot.update(values)
        with torch.no_grad():
            for tensor, place, value in self._kept:
                if tensor.data_ptr() != place.data_ptr() or tensor.stride() != place.stride():
                    tensor.data = place
                tensor.copy_(value)
        self.restore_random()
        self._drop_grads()

    def restore_random(self) -> None:
        """Only the random states."""
        rng.put_back(self._random)
        torch.cuda.set_rng_state_all(self._device_random)

    def _drop_grads(self) -> None:
        for param in self.params:
            param.grad = None


def result_of(
    call: Call,
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    before: Snapshot,
    arrange: Callable[[], None] | None = None,
) -> Result:
    """Loss, gradients and changes of buffers of one step on the model itself; all is restored.

    Args:
        arrange: called first, on the restored model.
    Raises:
        Unfit: the step gives no loss to go back from.
    """
    before.restore()
    if arrange is not None:
        arrange()
    buffers, generator = {n: buffer.detach().clone() for n, buffer in model.named_buffers()}, torch.get_rng_state()
    outputs = call(batch, optimizer)
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise Unfit("train_step returned no loss to go back from")
    loss.backward()  # type: ignore[no-untyped-call]
    result = Result(
        loss.detach().clone(),
        {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()},
        {name: buffer.detach() - buffers[name] for name, buffer in model.named_buffers() if buffer.dtype != torch.bool},
        torch.get_rng_state(),
        not torch.equal(torch.get_rng_state(), generator),
    )
    before.restore()
    return result


def timed(sides: Mapping[Side, Callable[[], float]], rounds: int) -> dict[Side, float]:
    """The least of what each side gave in ``rounds`` turns: what the machine's other work disturbed least."""
    samples: dict[Side, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            samples[side].append(run())
    return {side: min(each) for side, each in samples.items()}


def sample(run: Callable[[], None], before: Snapshot, arrange: Callable[[], None] | None = None) -> float:
    """Seconds of ``run`` from the state before, arranged anew outside of the clock."""
    before.restore()
    if arrange is not None:
        arrange()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def iteration(call: Call, optimizer: Any, updater: Any, batch: Any) -> None:
    """Forward, backward, update: what a whole iteration computes, without clip and hooks."""
    outputs = call(batch, optimizer)
    updater.zero_grad()
    outputs["loss"].backward()
    updater.step()
