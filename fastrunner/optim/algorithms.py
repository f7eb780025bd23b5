"""What the fused optimizers compute, as far as a table of parameters has to know it.

The formulas stand in ``csrc/loops``. Here: which state a parameter needs, under torch's names, and torch's own
functional optimizer for what the core does not take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adam import _single_tensor_adam
from torch.optim.sgd import sgd

Slot = dict[str, Any]  # optimizer.state[parameter]

SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM_OPTIONS = ("lr", "weight_decay", "eps", "maximize", "amsgrad", "decoupled_weight_decay")


class Algorithm(Protocol):
    """SGD or Adam."""

    @property
    def name(self) -> str:
        """As the core calls it."""

    @property
    def torch_name(self) -> str:
        """As torch does, for messages."""

    def keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors of a parameter's shape that this group's options ask for."""

    def new_state(self, key: str, param: Tensor, slot: Slot) -> Tensor:
        """A state tensor that ``slot`` lacks: float32, in the parameter's layout; stored there if it starts with zeros.

        The core stores the others itself, with the first step that fills them.
        """

    def step_count(self, slot: Slot) -> Tensor | None:
        """The counter in ``slot`` as a float32 tensor of no dimensions, made so if it is not; None: there is none."""

    def update(self, groups: Sequence[dict[str, Any]], params: Sequence[Live], slots: Sequence[Slot]) -> None:
        """torch's update of these parameters, one after the other, state included."""


class Live:
    """A parameter that torch updates, with the gradient to use."""

    __slots__ = ("grad", "name", "param")

    def __init__(self, name: str, param: Tensor, grad: Tensor) -> None:
        self.name, self.param, self.grad = name, param, grad


class Sgd:
    """State: ``momentum_buffer``, None or absent before the first step that uses it."""

    name, torch_name = "sgd", "torch.optim.SGD"

    def keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def new_state(self, key: str, param: Tensor, slot: Slot) -> Tensor:
        return torch.empty_like(param, dtype=torch.float32, requires_grad=False)

    def step_count(self, slot: Slot) -> Tensor | None:
        return None

    def update(self, groups: Sequence[dict[str, Any]], params: Sequence[Live], slots: Sequence[Slot]) -> None:
        # All are looked up before the first is stored, as in torch: a parameter listed twice makes the difference.
        buffers = [slot.get("momentum_buffer") for slot in slots]
        for group, live, slot, buffer in zip(groups, params, slots, buffers, strict=True):
            stored, options = [buffer], {key: group[key] for key in SGD_OPTIONS}
            with _named(live.name, self.torch_name):
                sgd([live.param], [live.grad], stored, has_sparse_grad=live.grad.is_sparse, foreach=False, **options)
            if group["momentum"] != 0:
                slot["momentum_buffer"] = stored[0]


class Adam:
    """State: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` with amsgrad."""

    name, torch_name = "adam", "torch.optim.Adam"

    def keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def new_state(self, key: str, param: Tensor, slot: Slot) -> Tensor:
        slot[key] = zeros = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        return zeros

    def step_count(self, slot: Slot) -> Tensor | None:
        step = slot.get("step", 0.0)
        fits = type(step) is Tensor and step.dtype == torch.float32 and step.shape == () and step.device.type == "cpu"
        if not fits:  # a number in files of torch 1.11 and before, float64 or on a GPU by some options
            slot["step"] = step = torch.scalar_tensor(float(step), dtype=torch.float32, device="cpu")
        return step  # type: ignore[no-any-return]

    def update(self, groups: Sequence[dict[str, Any]], params: Sequence[Live], slots: Sequence[Slot]) -> None:
        for group, live, slot in zip(groups, params, slots, strict=True):
            if live.grad.is_sparse:
                raise RuntimeError(
                    f"{live.name}: its gradient is sparse, and Adam needs a dense one: nn.Embedding(..., "
                    "sparse=False), or torch.optim.SparseAdam for these parameters"
                )
            for key in self.keys(group):
                if key not in slot:
                    slot[key] = torch.zeros_like(live.param, memory_format=torch.preserve_format, requires_grad=False)
            step = self.step_count(slot)
            assert step is not None
            maxima = [slot["max_exp_avg_sq"]] if group["amsgrad"] else []
            with _named(live.name, self.torch_name):
                _single_tensor_adam(
                    *([live.param], [live.grad], [slot["exp_avg"]], [slot["exp_avg_sq"]], maxima, [step], None, None),
                    has_complex=live.param.is_complex(),
                    beta1=float(group["betas"][0]),
                    beta2=float(group["betas"][1]),
                    capturable=False,
                    differentiable=False,
                    **{key: group[key] for key in ADAM_OPTIONS},
                )


@contextlib.contextmanager
def _named(name: str, torch_name: str) -> Iterator[None]:
    """Errors of torch's update say which parameter it was."""
    try:
        yield
    except (RuntimeError, TypeError) as error:  # sparse with weight decay, say
        raise RuntimeError(f"{name}: {torch_name} cannot update it either: {error}") from error
