"""The optimizers as they run on a GPU: through Triton's kernels, here in the interpreter on CPU tensors.

Against torch's own optimizers over several steps. On a machine with a GPU the kernels run compiled, on the GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrunner.optim import EmaTerm, FusedAdam, FusedAdamW, FusedSGD, gpu_page, gpu_table, update
from fastrunner.optim.gpu_table import GpuTable

# Nothing; one; a tail; a block and a tail; several chunks. And other layouts. What the kernels do to awkward sizes is
# tested in tests/kernels; here a few are enough.
SHAPES = [(0,), (1,), (17,), (300,), (5, 3), (20, 29)]
CHUNK, BLOCK = 512, 256

Optimizer = torch.optim.Optimizer
Make = Callable[..., Optimizer]

PAIRS = [
    (FusedSGD, torch.optim.SGD, dict(lr=0.1)),
    (FusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    (FusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
    (FusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    (FusedAdam, torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    (FusedAdam, torch.optim.Adam, dict(lr=0.01, betas=(0.0, 0.5), maximize=True)),
    (FusedAdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    (FusedAdamW, torch.optim.AdamW, dict(lr=0.01, amsgrad=True)),
]
IDS = [f"{ours.__name__}-{'-'.join(options)}" for ours, _, options in PAIRS]
every_pair = pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS, ids=IDS)
each_kind = pytest.mark.parametrize(("ours", "theirs", "options"), [PAIRS[0], PAIRS[3], PAIRS[4], PAIRS[7]])
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # lanes that are masked off


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where parameters are made; there the optimizers use the GPU's table."""
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make(*args: Any, isa: str | None, **options: Any) -> GpuTable:
        return GpuTable(*args, **options, chunk=CHUNK, block=BLOCK)

    monkeypatch.setitem(update.TABLES, found.type, make)
    torch.set_default_device(found)
    yield found
    torch.set_default_device(None)


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator(device="cpu").manual_seed(7)
    params = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    made = [nn.Parameter(p.to(torch.get_default_device(), dtype)) for p in params]
    made.append(nn.Parameter(torch.ones(2, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last)))
    unaligned = torch.ones(281, dtype=dtype)
    made.append(nn.Parameter(unaligned[1:]))
    return made


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [dict(params=params[:3]), dict(params=params[3:], lr=0.05, weight_decay=0.0)]


class Both:
    """Ours and torch's optimizer on equal parameters, fed with equal gradients."""

    shapes: ClassVar = SHAPES

    def __init__(self, ours: Make, theirs: Make, options: dict[str, Any], **extra: Any) -> None:
        self.ours, self.theirs = parameters(shapes=self.shapes), parameters(shapes=self.shapes)
        self.fused = ours(groups(self.ours), **options, **extra)
        self.torch = theirs(groups(self.theirs), **options, foreach=False)
        self.generator = torch.Generator(device="cpu").manual_seed(3)

    def gradients(self, *, without: Sequence[int] = (), scale: float = 1.0) -> None:
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            grad = scale * torch.randn(p.shape, generator=self.generator, device="cpu").to(p.device)
            grad = torch.empty_like(p).copy_(grad)
            p.grad, q.grad = (None, None) if i in without else (grad, grad.clone(memory_format=torch.preserve_format))

    def assert_same(self, *, tolerance: float = 1e-6) -> None:
        """Parameters and state. Both round in float32, in another order: a few 2**-24 a step at values of order 1."""
        assert len(self.fused.state) == len(self.torch.state)
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
            ours, theirs = self.fused.state.get(p, {}), self.torch.state.get(q, {})
            assert {k for k, v in ours.items() if v is not None} == {k for k, v in theirs.items() if v is not None}
            for key, value in theirs.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(ours[key].cpu(), value.cpu(), rtol=tolerance, atol=tolerance)


@every_pair
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_steps_as_torchs(ours: Make, theirs: Make, options: dict[str, Any], max_norm: float | None) -> None:
    both = Both(ours, theirs, options)
    for without in ((5,), (0, 2), (5,), ()):
        both.gradients(without=without)
        if max_norm is not None:
            expected = torch.nn.utils.clip_grad_norm_(both.theirs, max_norm)
        both.torch.step()
        both.fused.step(max_norm=max_norm)
        if max_norm is not None:
            torch.testing.assert_close(both.fused.grad_norm, expected, rtol=1e-6, atol=0)  # torch's own error
            for p, q in zip(both.ours, both.theirs, strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
        both.assert_same()
    assert both.fused.rest == {}


@each_kind
def test_state_goes_to_torch_and_back(ours: Make, theirs: Make, options: dict[str, Any]) -> None:
    """In the middle of training, both ways."""
    both = Both(ours, theirs, options)
    for _ in range(2):
        both.gradients()
        both.torch.step()
        both.fused.step()
    saved = copy.deepcopy(both.fused.state_dict()), copy.deepcopy(both.torch.state_dict())
    both.torch.load_state_dict(saved[0])
    both.fused.load_state_dict(saved[1])
    for _ in range(2):
        both.gradients()
        both.torch.step()
        both.fused.step()
        both.assert_same()


def test_options_are_read_in_each_step() -> None:
    both = Both(FusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9))
    changes: list[dict[str, Any]] = [
        {},
        dict(lr=0.2),
        dict(momentum=0.5, weight_decay=0.1),
        dict(nesterov=True),
        dict(maximize=True),
        dict(momentum=0.0, nesterov=False),
        dict(momentum=0.9),
    ]
    for change in changes:
        for optimizer in (both.fused, both.torch):
            optimizer.param_groups[1].update(change)
        both.gradients()
        both.torch.step()
        both.fused.step()
        both.assert_same()


def test_lr_as_a_tensor_on_the_device() -> None:
    both = Both(FusedAdamW, torch.optim.AdamW, dict(lr=0.01))
    lr = torch.tensor(0.01)
    both.fused.param_groups[0]["lr"] = lr
    for value in (0.01, 0.1):
        lr.fill_(value)
        both.torch.param_groups[0]["lr"] = value
        both.gradients()
        both.torch.step()
        both.fused.step()
        both.assert_same()


@each_kind
def test_a_step_that_is_not_finite_changes_nothing(ours: Make, theirs: Make, options: dict[str, Any]) -> None:
    both = Both(ours, theirs, options, skip_nonfinite=True)
    for bad in (True, False, True, False):  # the first step too
        both.gradients()
        if bad:
            both.ours[3].grad[5] = math.inf
        else:
            both.torch.step()
        both.fused.step()
        assert both.fused.grad_norm.isfinite().item() != bad
        for p, q in zip(both.ours, both.theirs, strict=True):
            # SGD's momentum starts with zeros here: with dampening torch's rule for the first step needs the buffer
            # to be new, and it is kept.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


def test_a_skipped_first_step_stays_the_first_for_a_rebuilt_table() -> None:
    """With dampening the first step writes the gradient itself into the buffer; (1 - dampening) of it later on."""
    both = Both(FusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5), skip_nonfinite=True)
    for number, bad in enumerate((True, False, True, False)):
        without = (4,) if number < 2 else ()  # its first gradient has the table built anew, in a skipped step
        both.gradients(without=without)
        if number == 1:  # a moved parameter, too
            both.ours[2].data = both.ours[2].detach().clone()
        if bad:
            both.ours[3].grad[5] = math.inf
        else:
            both.torch.step()
        table = both.fused._update.table if both.fused._update else None
        both.fused.step()
        assert (both.fused._update.table is table) == (number == 3)
        for p, q in zip(both.ours, both.theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_averages_of_every_parameter(zero: bool) -> None:
    """Frozen ones, ones without a gradient, ones that no optimizer has, and ones that the kernels do not take."""
    params = parameters()
    idle, frozen = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(33), requires_grad=False)
    double, stranger = nn.Parameter(torch.ones(9, dtype=torch.float64)), nn.Parameter(torch.ones(20, 20))
    everything: list[Tensor] = [*params, idle, frozen, double, stranger]
    averages = [torch.full_like(p, 2.0, requires_grad=False) for p in everything]
    expected = [a.clone(memory_format=torch.preserve_format) for a in averages]
    optimizer = FusedSGD([*params, idle, frozen, double], lr=0.1, momentum=0.9)
    term = EmaTerm(everything, averages, 0.5)
    for m in (0.5, 1e-3, 0.0):
        for p in (*params, double, stranger):
            p.grad = torch.empty_like(p).normal_()
        term.momentum = m
        optimizer.step(max_norm=1.0, ema=term, zero=zero)
        for average, other, p in zip(averages, expected, everything, strict=True):
            other.mul_(1 - m).add_(p.detach(), alpha=m)
            torch.testing.assert_close(average, other, rtol=1e-6, atol=1e-6)
        assert all((p.grad is None) == zero for p in (*params, double))
        assert stranger.grad is not None
    optimizer.step()  # and not where they are not asked for
    for average, other in zip(averages, expected, strict=True):
        torch.testing.assert_close(average, other, rtol=1e-6, atol=1e-6)


def test_averages_with_a_weight_on_the_device() -> None:
    params = parameters()
    averages = [torch.zeros_like(p, requires_grad=False) for p in params]
    momentum = torch.tensor(0.0)
    optimizer, term = FusedAdamW(params, lr=0.01), EmaTerm(params, averages, momentum)
    for value in (1.0, 0.0):
        momentum.fill_(value)
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step(ema=term)
        for average, p, old in zip(averages, params, before, strict=True):
            torch.testing.assert_close(average, p.detach() if value else old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_16_bits_through_float32_masters(make: Make, dtype: torch.dtype) -> None:
    """Steps that are each too small to move a 16-bit parameter."""
    params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (1, 257)]
    exact = [nn.Parameter(torch.ones(n)) for n in (1, 257)]
    lr = 2.0**-10 if dtype == torch.bfloat16 else 2.0**-13
    optimizer, reference = make(params, lr=lr), make(exact, lr=lr)
    for _ in range(9):
        for p, q in zip(params, exact, strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        reference.step()
    for p, q in zip(params, exact, strict=True):
        master = optimizer.state[p]["master"]
        torch.testing.assert_close(master, q.detach(), rtol=1e-6, atol=1e-6)
        # the interpreter truncates: one unit in the last place
        torch.testing.assert_close(
            p.detach().float(), master, rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, atol=0
        )
        assert p[0].item() < 1.0


@pytest.mark.parametrize("of_masters", [True, False])
def test_averages_of_16_bit_parameters(of_masters: bool) -> None:
    """float32 averages follow masters; those of 16 bits follow the parameters, as MMCV's do."""
    params = [nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (1, 300)]
    idle = nn.Parameter(torch.full((300,), 3.0, dtype=torch.bfloat16))
    dtype = torch.float32 if of_masters else torch.bfloat16
    averages = [torch.zeros(p.shape, dtype=dtype) for p in (*params, idle)]
    optimizer = FusedSGD([*params, idle], lr=2.0**-10)
    term = EmaTerm([*params, idle], averages, 1.0, of_masters=of_masters)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(ema=term)
    for p, average in zip(params, averages, strict=False):
        followed = optimizer.state[p]["master"] if of_masters else p.detach()
        assert torch.equal(average, followed)
        assert average.dtype == dtype
    assert optimizer.state[params[1]]["master"][7].item() == 1 - 3 * 2.0**-10
    assert torch.equal(averages[2], torch.full((300,), 3.0, dtype=dtype))


def test_averages_of_the_optimizers_own() -> None:
    params = [nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(20, dtype=torch.bfloat16))]
    optimizer = FusedAdamW(params, lr=0.5, weight_decay=0.0, ema_decay=0.75)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for average in optimizer.ema_state_dict().values():
        torch.testing.assert_close(average, torch.full(average.shape, 0.75 + 0.25 * 0.5))


def test_state_in_another_layout_is_moved_once() -> None:
    """A checkpoint of a contiguous model goes on in a channels_last one, and a step count on the CPU on the GPU."""
    param = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = FusedAdam([param], lr=0.1)
    values = torch.linspace(0, 1, 48).view(4, 3, 2, 2)
    state = dict(step=torch.tensor(3.0, device="cpu"), exp_avg=values.clone(), exp_avg_sq=values.double().float())
    optimizer.state[param] = state
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.rest == {}
    assert (state["step"].item(), state["step"].device) == (4.0, param.device)
    assert state["exp_avg"].stride() == param.stride()
    torch.testing.assert_close(state["exp_avg"], 0.9 * values)
    moved = state["exp_avg"]
    optimizer.step()
    assert state["exp_avg"] is moved


def test_a_16_bit_parameter_that_was_loaded_is_not_overwritten_by_its_master() -> None:
    param = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    optimizer = FusedSGD([param], lr=0.5)
    for value, expected in ((1.0, 0.5), (4.0, 3.5)):
        with torch.no_grad():
            param.fill_(value)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert torch.equal(param.detach(), torch.full_like(param, expected))


def test_torchs_own_optimizer_on_16_bits_keeps_state_of_16_bits() -> None:
    """``Update`` steps torch.optim.SGD itself for the runner: without masters, in the parameter's dtype."""
    param = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([param], lr=0.5, momentum=0.5)
    step = update.Update(update.algorithm_of(optimizer), masters=False)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        step.step(optimizer.param_groups, optimizer.state)
    assert set(optimizer.state[param]) == {"momentum_buffer"}
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full_like(param, 1.5))
    assert torch.equal(param.detach(), torch.full_like(param, 1 - 0.5 - 0.75))


class Odd(Both):
    """Parameters that the kernels do not take, among others."""

    shapes: ClassVar = [(17,)]

    def __init__(self, ours: Make, theirs: Make, options: dict[str, Any], **extra: Any) -> None:
        super().__init__(ours, theirs, options, **extra)
        for params, optimizer in ((self.ours, self.fused), (self.theirs, self.torch)):
            storage = torch.ones(20)
            more = [
                nn.Parameter(torch.ones(9, dtype=torch.float64)),
                nn.Parameter(torch.ones(10, 2)[:, 0]),
                nn.Parameter(storage[:12]),
                nn.Parameter(storage[8:]),
                nn.Parameter(torch.ones(3, dtype=torch.complex64)),
            ]
            params += more
            optimizer.add_param_group(dict(params=more))

    def gradients(self, *, without: Sequence[int] = (), scale: float = 1.0) -> None:
        for p, q in zip(self.ours, self.theirs, strict=True):
            grad = torch.randn(p.shape, generator=self.generator, device="cpu", dtype=p.dtype).to(p.device)
            p.grad, q.grad = grad, grad.clone()


@each_kind
@pytest.mark.parametrize("skip", [False, True])
def test_the_rest_goes_to_torchs_operations(ours: Make, theirs: Make, options: dict[str, Any], skip: bool) -> None:
    both = Odd(ours, theirs, options, skip_nonfinite=skip)
    for _ in range(2):
        both.gradients()
        expected = torch.nn.utils.clip_grad_norm_(both.theirs, 0.7)
        both.torch.step()
        both.fused.step(max_norm=0.7)
        torch.testing.assert_close(both.fused.grad_norm.float(), expected.float(), rtol=1e-6, atol=0)
        both.assert_same()
    assert [why for (group, _), why in both.fused.rest.items() if group == 2] == [
        "is float64",
        "has gaps in memory",
        "shares memory with another parameter",
        "shares memory with another parameter",
        "is complex64",
    ]


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_masters_of_16_bit_parameters_that_the_kernels_do_not_take(make: Make) -> None:
    """The same as one that they do take."""
    dense, gaps = torch.ones(300, dtype=torch.bfloat16), torch.ones(300, 2, dtype=torch.bfloat16)[:, 0]
    params = [nn.Parameter(dense), nn.Parameter(gaps)]
    optimizer = make(params, lr=2.0**-10)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.rest == {(0, 1): "has gaps in memory"}
    ours, theirs = (optimizer.state[p]["master"] for p in params)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert ours[0].item() < 1.0


def test_a_gradient_that_two_views_share_is_scaled_once() -> None:
    params = [nn.Parameter(torch.zeros(300)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0)
    shared = torch.full((300,), 2.0)
    for p in params:
        p.grad = shared.view(300)
    optimizer.step(max_norm=1.0)
    torch.testing.assert_close(shared, torch.full((300,), 2.0 / math.sqrt(600 * 4)))


def test_sparse_gradients() -> None:
    weight = nn.Parameter(torch.ones(5, 2))
    grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (5, 2))
    sgd, adam = FusedSGD([weight], lr=1.0), FusedAdam([weight], lr=1.0)
    weight.grad = grad
    sgd.step()
    assert weight.detach().sum().item() == 8.0
    assert sgd.rest == {(0, 0): "has a gradient that is sparse"}
    with pytest.raises(TypeError, match=r"parameter group 0, parameter 0: its gradient is sparse"):
        sgd.step(max_norm=1.0)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        adam.step()


def test_a_gradient_that_two_parameters_share_is_scaled_once() -> None:
    params = [nn.Parameter(torch.zeros(300)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0)
    shared = torch.full((300,), 2.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        p.grad = shared
        p.data.zero_()
    optimizer.step(max_norm=1.0)
    torch.testing.assert_close(shared, torch.full((300,), 2.0 / math.sqrt(600 * 4)))
    for p in params:
        torch.testing.assert_close(p.detach(), -shared)


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a GPU: ``item()``, ``float()``, ``if tensor:``, ``nonzero()``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")
        assert func.overloadpacket.__name__ not in names, f"{func} reads the device"
        return func(*args, **(kwargs or {}))


def test_the_check_for_reads_would_notice() -> None:
    with NoReads(), pytest.raises(AssertionError, match="reads the device"):
        float(torch.ones(1))


@each_kind
@pytest.mark.parametrize("skip", [False, True])
def test_nothing_is_read_by_the_host(ours: Make, theirs: Make, options: dict[str, Any], skip: bool) -> None:
    """Not in the first step, nor with parameters that the kernels do not take; a norm, a lr, a weight on the device."""
    both = Odd(ours, theirs, options, skip_nonfinite=skip)
    averages = [torch.zeros_like(p, requires_grad=False) for p in both.ours]
    term = EmaTerm(both.ours, averages, torch.tensor(0.5))
    both.fused.param_groups[0]["lr"] = torch.tensor(0.1)
    for _ in range(2):
        both.gradients()
        with NoReads():
            both.fused.step(max_norm=0.5, ema=term, zero=True)
    assert both.fused.grad_norm.item() > 0


def replace_data(both: Both) -> None:
    for params in (both.ours, both.theirs):
        params[4].data = torch.full_like(params[4], 7.0)


def transpose(both: Both) -> None:
    for params, optimizer in ((both.ours, both.fused), (both.theirs, both.torch)):
        params[5].data = params[5].data.t()
        state = optimizer.state[params[5]]
        state["momentum_buffer"] = state["momentum_buffer"].t()


def clear_state(both: Both) -> None:
    for optimizer in (both.fused, both.torch):
        optimizer.state.clear()


def replace_buffer(both: Both) -> None:
    for params, optimizer in ((both.ours, both.fused), (both.theirs, both.torch)):
        optimizer.state[params[3]]["momentum_buffer"] = torch.ones_like(params[3])


def swap_groups(both: Both) -> None:
    for optimizer in (both.fused, both.torch):
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]


def shrink(both: Both) -> None:
    for params, optimizer in ((both.ours, both.fused), (both.theirs, both.torch)):
        params[3].data = params[3].data[:100]
        del optimizer.state[params[3]]


@pytest.mark.parametrize("change", [replace_data, transpose, clear_state, replace_buffer, swap_groups, shrink])
def test_changes_behind_the_tables_back(change: Callable[[Both], None]) -> None:
    both = Both(FusedSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9))
    for number in range(4):
        if number == 2:
            change(both)
        both.gradients()
        both.torch.step()
        both.fused.step()
        both.assert_same()


def test_average_that_moved() -> None:
    param = nn.Parameter(torch.zeros(300))
    average = torch.zeros(300)
    optimizer, term = FusedSGD([param], lr=1.0), EmaTerm([param], [average], 1.0)
    optimizer.step(ema=term)
    average.data = torch.ones(300)
    optimizer.step(ema=term)
    assert torch.equal(average, torch.zeros(300))


def test_versions_tell_autograd() -> None:
    """A graph that saved the old weight fails, as after torch's own step."""
    weight = nn.Parameter(torch.ones(300))
    optimizer = FusedSGD([weight], lr=0.1)
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_of_another_shape_is_refused_by_name() -> None:
    weight = nn.Parameter(torch.ones(5))
    weight.grad = torch.ones(5)
    optimizer = FusedSGD([("fc.weight", weight)], lr=1.0, momentum=0.5)
    optimizer.state[weight]["momentum_buffer"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"parameter 0 \('fc\.weight'\): its momentum_buffer is \(7,\)"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(5))


@pytest.mark.parametrize("option", ["lr", "weight_decay", "dampening"])
def test_an_option_that_is_no_number_is_named(option: str) -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = FusedSGD([weight], lr=1.0)
    optimizer.param_groups[0][option] = "1e-3"
    weight.grad = torch.ones(5)
    with pytest.raises(TypeError, match=f"parameter group 0: {option} must be a number"):
        optimizer.step()


def test_a_table_is_not_built_into_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, and one after a change: what a graph would then replay is building it."""
    weight = nn.Parameter(torch.ones(5))
    optimizer = FusedSGD([weight], lr=1.0)
    monkeypatch.setattr(gpu_table, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="do a step outside of the capture first"):
        optimizer.step()


def test_a_captured_page_is_never_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph copies its page again at each replay: it must find the addresses of its own gradients there."""
    weight = nn.Parameter(torch.ones(5))
    optimizer = FusedSGD([weight], lr=1.0)
    optimizer.step()
    copied: list[Tensor] = []
    new_host = gpu_page.Page._host

    def host(page: gpu_page.Page) -> Tensor:
        copied.append(new_host(page))
        return copied[-1]

    monkeypatch.setattr(gpu_page.Page, "_host", host)
    captured: list[tuple[Tensor, Tensor]] = []
    for capturing in (False, True, True, True, True, False, True, False):
        monkeypatch.setattr(gpu_page, "capturing", lambda device, answer=capturing: answer)
        weight.grad = torch.ones(5)
        optimizer.step()
        assert copied[-1][0].item() == weight.grad.data_ptr()
        assert all(copied[-1] is not page for page, _ in captured)
        if capturing:
            captured.append((copied[-1], copied[-1].clone()))
    assert len(captured) == 5
    assert all(torch.equal(page, then) for page, then in captured)


def test_too_many_captured_steps_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = FusedSGD([weight], lr=1.0)
    optimizer.step()
    monkeypatch.setattr(gpu_page, "capturing", lambda device: True)
    for _ in range(gpu_page.NUM_SPARES):
        optimizer.step()
    with pytest.raises(RuntimeError, match="more than 4 optimizer steps were captured"):
        optimizer.step()


def test_default_device_and_dtype_of_the_user_do_not_matter() -> None:
    params = parameters()
    averages = [torch.zeros_like(p, requires_grad=False) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer, term = FusedAdamW(params, lr=0.5, weight_decay=0.0), EmaTerm(params, averages, 1.0)
    before = [p.detach().clone() for p in params]
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        optimizer.step(max_norm=1e9, ema=term)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, then, average in zip(params, before, averages, strict=True):
        torch.testing.assert_close(p.detach(), then - 0.5)
        assert torch.equal(average, p.detach())


def test_no_parameters_with_gradients() -> None:
    params = parameters()
    optimizer = FusedAdamW(params, lr=0.1)
    optimizer.step(max_norm=1.0)
    assert optimizer.grad_norm.item() == 0.0
    assert dict(optimizer.state) == {}
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
