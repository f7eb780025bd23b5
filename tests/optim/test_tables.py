"""The table notices what was changed behind its back, and never writes where something used to be."""

from __future__ import annotations

import gc
import re
import weakref
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastrunner import _core
from fastrunner.optim import EmaTerm, FusedAdam, FusedAdamW, FusedSGD
from fastrunner.optim.algorithms import Sgd
from fastrunner.optim.tables import ParamTable, Table

SIZE = 100


def table_of(optimizer: FusedSGD | FusedAdam) -> Table:
    assert optimizer._update is not None
    assert optimizer._update.table is not None
    return optimizer._update.table


OPTIONS: dict[str, dict[str, object]] = {"sgd": dict(lr=0.1, momentum=0.9), "adam": dict(lr=0.1, weight_decay=0.1)}
FUSED: dict[str, type[FusedSGD] | type[FusedAdam]] = {"sgd": FusedSGD, "adam": FusedAdam}
TORCH: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
KEYS = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


class Pair:
    """Ours and torch's optimizer on equal parameters; what is done to one is done to the other."""

    def __init__(self, kind: str) -> None:
        self.ours = [nn.Parameter(torch.linspace(-1, 1, SIZE)) for _ in range(3)]
        self.theirs = [nn.Parameter(torch.linspace(-1, 1, SIZE)) for _ in range(3)]
        self.fused = FUSED[kind](self.ours, **OPTIONS[kind])  # type: ignore[arg-type]
        self.torch = TORCH[kind](self.theirs, foreach=False, **OPTIONS[kind])  # type: ignore[call-arg]
        self.step()

    def both(self) -> list[tuple[list[nn.Parameter], torch.optim.Optimizer]]:
        return [(self.ours, self.fused), (self.theirs, self.torch)]

    def step(self) -> None:
        for params, optimizer in self.both():
            for p in params:
                p.grad = torch.linspace(0, 1, p.numel()).view(p.shape).to(p.dtype)
                p.grad = torch.empty_like(p).copy_(p.grad)
            optimizer.step()
        for p, q in zip(self.ours, self.theirs, strict=True):
            assert torch.equal(p, q)


def keys_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return KEYS["sgd" if "momentum" in optimizer.defaults else "adam"]


def replace_data(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1].data = torch.full((SIZE,), 7.0)


def grow(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1].data = torch.full((2 * SIZE,), 7.0)
    del optimizer.state[params[1]]


def shrink_in_place(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1].data = params[1].data[: SIZE // 2]
    del optimizer.state[params[1]]


def to_float64(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1].data = params[1].data.double()
    if "exp_avg" in keys_of(optimizer):  # of float32, which torch's Adam does not mix
        del optimizer.state[params[1]]


def transpose(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The same address and the same number of elements, in another order."""
    params[1].data = params[1].data.view(4, 25).t()
    for key in keys_of(optimizer):
        optimizer.state[params[1]][key] = torch.linspace(0, 1, SIZE).view(25, 4)


def share(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1].data = params[0].data


def clear_state(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def new_state(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def new_slot(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[1]] = {key: torch.ones(SIZE) for key in keys_of(optimizer)}
    if "exp_avg" in keys_of(optimizer):
        optimizer.state[params[1]]["step"] = torch.tensor(7.0)


def delete_buffer(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if "momentum_buffer" in optimizer.state[params[1]]:  # torch's Adam would stumble over it
        del optimizer.state[params[1]]["momentum_buffer"]


def replace_buffer(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[1]][keys_of(optimizer)[-1]] = torch.ones(SIZE)


def move_buffer(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[1]][keys_of(optimizer)[0]].data = torch.ones(SIZE)


def replace_step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[1]]["step"] = torch.tensor(7.0)


def move_step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if "step" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["step"].data = torch.tensor(7.0)


def resize_storage(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The tensor stays, its memory goes and comes back elsewhere."""
    values = params[1].detach().clone()
    params[1].untyped_storage().resize_(0)
    blocker = torch.ones(SIZE)
    params[1].untyped_storage().resize_(4 * SIZE)
    params[1].data.copy_(values)
    assert bool(blocker.all())


def swap(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The same Python object, another tensor inside: what Module.to does with swap_module_params_on_conversion."""
    params[1].grad = None
    torch.utils.swap_tensors(params[1], nn.Parameter(torch.full((SIZE,), 3.0)))


def replace_parameter(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1] = nn.Parameter(torch.full((SIZE,), 5.0))
    optimizer.param_groups[0]["params"][1] = params[1]


def drop_parameter(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:2]


def drop_group(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[:] = [{**optimizer.param_groups[0], "params": params[1:]}]


@pytest.mark.parametrize(
    "change",
    [
        *(replace_data, grow, shrink_in_place, to_float64, transpose, share),
        *(clear_state, new_state, new_slot, delete_buffer, replace_buffer, move_buffer, replace_step, move_step),
        *(resize_storage, swap),
        *(replace_parameter, drop_parameter, drop_group),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_change_behind_its_back_is_followed(
    kind: str, reader: str, nearest_roots: None, change: Callable[[list[nn.Parameter], torch.optim.Optimizer], None]
) -> None:
    pair = Pair(kind)
    pair.step()
    for params, optimizer in pair.both():
        change(params, optimizer)
    for _ in range(3):
        pair.step()


def test_groups_may_shrink_while_one_had_a_parameter_of_the_rest() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = FusedSGD([{"params": [p]} for p in params], lr=1.0)
    for expected in ([0.0, 0.0], [-1.0, 0.0]):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.clipped_step(100.0)
        assert [p[0].item() for p in params] == expected
        del optimizer.param_groups[1:]
    assert optimizer.rest == {}


def test_params_of_a_group_may_be_a_tuple() -> None:
    """Then torch steps as well; a list is only what its constructor makes of them."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0)
    optimizer.param_groups[0]["params"] = tuple(params)
    for expected in (0.0, -1.0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [p[0].item() for p in params] == [expected, expected]


def test_old_memory_is_left_alone() -> None:
    """The table has seen the address of memory that the parameter has left, and that somebody else owns now."""
    param = nn.Parameter(torch.ones(SIZE))
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9)
    param.grad = torch.ones(SIZE)
    optimizer.step()
    old, momentum = param.data, optimizer.state[param]["momentum_buffer"]
    copies = old.clone(), momentum.clone()
    param.data = torch.zeros(SIZE)
    optimizer.state.clear()
    optimizer.step()
    assert torch.equal(old, copies[0])
    assert torch.equal(momentum, copies[1])


STALE: dict[str, tuple[Callable[[nn.Parameter, FusedSGD], object], str]] = {
    "moved": (
        lambda p, o: setattr(p, "data", p.data.clone()),
        "parameter group 0, parameter 1 has moved to another address",
    ),
    "resized": (
        lambda p, o: setattr(p, "data", p.data[:50]),
        "parameter group 0, parameter 1 has another number of elements than before",
    ),
    "dtype": (
        lambda p, o: setattr(p, "data", p.data.half()),
        "parameter group 0, parameter 1 has another dtype than before",
    ),
    "gradient": (
        lambda p, o: setattr(p, "grad", torch.ones(2 * SIZE)[::2]),
        "parameter group 0, parameter 1 has a gradient that has another shape or other strides than its parameter",
    ),
    "buffer": (
        lambda p, o: o.state[p].update(momentum_buffer=torch.ones(SIZE)),
        "parameter group 0, parameter 1 has another momentum buffer than before",
    ),
    "state": (lambda p, o: o.state.pop(p), "optimizer.state was replaced or added to"),
    "groups": (lambda p, o: o.param_groups[0]["params"].pop(), "param_groups hold other parameters than before"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_table_says_what_changed_and_writes_nothing(case: str, reader: str) -> None:
    change, message = STALE[case]
    params = [nn.Parameter(torch.ones(SIZE)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(SIZE)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    table = ParamTable(Sgd(), optimizer.param_groups, optimizer.state)
    table.step(optimizer.param_groups, optimizer.state)
    change(params[1], optimizer)
    before = params[0].detach().clone()
    with pytest.raises(_core.StaleTable, match=f"^{re.escape(message)}$"):
        table.step(optimizer.param_groups, optimizer.state, max_norm=1e-3)
    assert torch.equal(params[0].detach(), before)
    assert params[0].grad is not None
    assert torch.equal(params[0].grad, torch.ones(SIZE))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_new_gradients_do_not_rebuild_the_table(kind: str, reader: str, nearest_roots: None) -> None:
    pair = Pair(kind)
    table = table_of(pair.fused)
    for _ in range(3):
        pair.step()
        for p in pair.ours:
            p.grad = None
    assert table_of(pair.fused) is table


def test_first_gradient_later_than_the_others() -> None:
    """Its momentum starts then, with the gradient itself and no dampening."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=1.0, momentum=0.5, dampening=0.5)
    params[0].grad = torch.ones(3)
    optimizer.step()
    params[1].grad = torch.ones(3)
    optimizer.step()
    assert params[0].tolist() == [-2.0] * 3  # 1, then 0.5 * 1 + 0.5 * 1
    assert params[1].tolist() == [-1.0] * 3


def test_an_average_that_moves_is_followed(reader: str) -> None:
    params = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
    averages = [torch.zeros(SIZE) for _ in range(2)]
    optimizer, term = FusedAdamW(params, lr=0.0, weight_decay=0.0), EmaTerm(params, averages, 0.5)
    for moved in (False, True, False):
        if moved:
            old = averages[1].data
            averages[1].data = torch.ones(SIZE)
        for p in params:
            p.grad = torch.ones(SIZE)
        optimizer.step(ema=term)
    assert torch.equal(averages[1], torch.full((SIZE,), 0.25))
    assert torch.equal(old, torch.zeros(SIZE))


def odd_gradients() -> dict[str, Callable[[nn.Parameter], None]]:
    def assign(make: Callable[[], Tensor]) -> Callable[[nn.Parameter], None]:
        def change(p: nn.Parameter) -> None:
            p.grad = make()

        return change

    def other_dtype(p: nn.Parameter) -> None:
        p.grad = torch.ones(10, 10)
        p.grad.data = torch.ones(10, 10, dtype=torch.float64)

    def other_shape(p: nn.Parameter) -> None:
        p.grad = torch.ones(10, 10)
        p.grad.data = torch.ones(5, 5)

    return {
        "transposed": assign(lambda: torch.ones(10, 10).t()),
        "strided": assign(lambda: torch.ones(20, 10)[::2]),
        "expanded": assign(lambda: torch.ones(1).expand(10, 10)),
        "other dtype": other_dtype,
        "other shape": other_shape,
    }


@pytest.mark.parametrize("case", odd_gradients())
def test_an_odd_gradient_is_as_torch_does_or_an_error(case: str, reader: str) -> None:
    """Nothing is written to memory that is not the parameter's own."""
    ours, theirs = ([nn.Parameter(torch.ones(10, 10)) for _ in range(2)] for _ in range(2))
    fused, reference = FusedSGD(ours, lr=0.5), torch.optim.SGD(theirs, lr=0.5, foreach=False)
    for _ in range(2):
        for p in (*ours, *theirs):
            p.grad = torch.ones(10, 10)
        fused.step()
        reference.step()
    results = []
    for params, optimizer in ((ours, fused), (theirs, reference)):
        odd_gradients()[case](params[1])
        try:
            optimizer.step()
            results.append(None)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            results.append(type(error))
    assert (results[0] is None) == (results[1] is None)
    if results[0] is None:
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("size", [SIZE, 3_000_000])  # a long step holds on to them while it lets go of the GIL
def test_gradients_are_not_kept_alive(size: int, reader: str) -> None:
    param = nn.Parameter(torch.ones(size))
    param.grad = torch.ones(size)
    grad = weakref.ref(param.grad)
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9)
    optimizer.clipped_step(0.1)
    param.grad = None
    assert grad() is None


def test_optimizer_and_parameters_can_be_collected_from_a_cycle() -> None:
    """A parameter's hook may refer to the optimizer, whose table refers to the parameter."""
    param = nn.Parameter(torch.ones(SIZE))
    param.grad = torch.ones(SIZE)
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    param.owner = optimizer  # type: ignore[attr-defined]
    alive = weakref.ref(optimizer), weakref.ref(param)
    del optimizer, param
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_table_holds_what_it_writes_to() -> None:
    """Without the optimizer, the table alone keeps parameters and buffers."""
    param = nn.Parameter(torch.ones(SIZE))
    groups, state = [{"params": [param], **FusedSGD([param]).defaults}], {}  # type: ignore[var-annotated]
    buffer = torch.ones(SIZE)
    states: list[dict[str, Tensor] | None] = [{"momentum_buffer": buffer}]
    table = _core.UpdateTable("sgd", groups, state, [param], [0], [{}], states, [None])
    alive = weakref.ref(param), weakref.ref(buffer)
    assert table.num_tensors == 1
    del param, buffer, states
    groups.clear()
    gc.collect()
    assert all(ref() is not None for ref in alive)
    with pytest.raises(_core.StaleTable, match="param_groups hold other parameters"):
        table.step(groups, state, None, False, 0.0, None, False, False)


def test_core_refuses_what_it_cannot_update() -> None:
    strided = nn.Parameter(torch.ones(4, 6)[:, ::2])
    with pytest.raises(ValueError, match="a parameter is not dense"):
        _core.UpdateTable("sgd", [{"params": [strided]}], {}, [strided], [0], [None], [None], [None])
    plain = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="must be of the same length"):
        _core.UpdateTable("sgd", [{"params": [plain]}], {}, [plain], [0, 0], [None], [None], [None])
    with pytest.raises(ValueError, match="groups holds an index that param_groups does not have"):
        _core.UpdateTable("sgd", [{"params": [plain]}], {}, [plain], [1], [None], [None], [None])


DENSE = {
    "scalar": torch.ones(()),
    "empty": torch.ones(0, 3),
    "contiguous": torch.ones(2, 3, 4),
    "transposed": torch.ones(2, 3, 4).permute(2, 0, 1),
    "channels_last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "ones": torch.ones(4, 3)[:, :1].t().contiguous().t(),
}
NOT_DENSE = {
    "every other": torch.ones(8)[::2],
    "column": torch.ones(4, 3)[:, :1],
    "expanded": torch.ones(1).expand(4),
    "part": torch.ones(4, 4)[:2, :2],
    "overlapping": torch.ones(10).as_strided((4, 4), (1, 2)),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_layouts_are_taken(name: str) -> None:
    assert _core.refusal(DENSE[name]) is None


@pytest.mark.parametrize("name", NOT_DENSE)
def test_gaps_and_overlaps_are_refused(name: str) -> None:
    assert _core.refusal(NOT_DENSE[name]) == "is not dense: its elements overlap or have gaps between them"


@pytest.mark.parametrize("what", ["parameter", "gradient", "momentum_buffer"])
def test_freed_memory_is_an_error_by_name_and_nothing_is_written(what: str, reader: str) -> None:
    """Storage resized to nothing, as sharding does between uses. torch's own step may end the process."""
    params = [nn.Parameter(torch.ones(70_000)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    victim = params[1]
    grad = victim.grad
    assert grad is not None
    tensor = {"parameter": victim.data, "gradient": grad, "momentum_buffer": optimizer.state[victim]["momentum_buffer"]}
    before = params[0].detach().clone()
    tensor[what].untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"group 0, parameter 1: its {what} has no memory"):
            optimizer.step(max_norm=1.0)
    assert torch.equal(params[0], before)
    tensor[what].untyped_storage().resize_(70_000 * 4)
    tensor[what].fill_(1.0)
    optimizer.step(max_norm=1.0)
    assert optimizer.rest == {}
