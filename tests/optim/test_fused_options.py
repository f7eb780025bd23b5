"""Averages, skipped steps and zeroing, with and without the runner; errors; what is saved of them."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrunner.optim import EmaTerm, FusedAdam, FusedAdamW, FusedSGD

Fused = FusedSGD | FusedAdam
MAKERS: dict[str, Callable[..., Fused]] = {
    "sgd": lambda params, **k: FusedSGD(params, lr=0.1, momentum=0.9, **k),
    "adam": lambda params, **k: FusedAdam(params, lr=0.1, **k),
    "adamw": lambda params, **k: FusedAdamW(params, lr=0.1, **k),
}
SIZES = (0, 1, 15, 64, 4_097)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        net.zero_grad()
        torch.manual_seed(seed)
        net(torch.randn(11, 7)).square().mean().backward()
        optimizer.step()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---- averages


@pytest.mark.parametrize("kind", MAKERS)
def test_ema_decay_averages_all_parameters(kind: str, reader: str) -> None:
    """Frozen parameters and ones without a gradient, too; they begin as the first step finds the parameters."""
    params = [nn.Parameter(torch.randn(n)) for n in SIZES]
    frozen, idle = nn.Parameter(torch.randn(9), requires_grad=False), nn.Parameter(torch.randn(9))
    everything = [*params, frozen, idle]
    optimizer = MAKERS[kind](everything, ema_decay=0.75)
    with torch.no_grad():
        for p in everything:
            p.mul_(2.0)  # a checkpoint loaded after the optimizer was made, say
    expected = [p.detach().clone() for p in everything]
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        torch._foreach_mul_(expected, 0.75)
        torch._foreach_add_(expected, [p.detach() for p in everything], alpha=0.25)
    averages = optimizer.ema_state_dict()
    assert list(averages) == list(range(len(everything)))
    for a, b in zip(averages.values(), expected, strict=True):
        assert torch.equal(a, b)


def test_averages_have_the_parameters_names_where_there_are_some() -> None:
    net = model()
    optimizer = FusedSGD(net.named_parameters(), ema_decay=0.9)
    assert list(optimizer.ema_state_dict()) == [name for name, _ in net.named_parameters()]
    net.load_state_dict(optimizer.ema_state_dict())  # type: ignore[arg-type]


def test_averages_and_parameters_of_a_new_group() -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = FusedSGD([first], lr=1.0, ema_decay=0.5)
    first.grad = torch.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert [a[0].item() for a in optimizer.ema_state_dict().values()] == [-1.25, -0.5]


def test_an_ema_term_goes_before_ema_decay() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = FusedSGD([param], lr=1.0, ema_decay=0.5)
    average = torch.zeros(3)
    param.grad = torch.ones(3)
    optimizer.step(ema=EmaTerm([param], [average], 1.0))
    assert average[0] == -1.0
    param.grad = torch.ones(3)
    optimizer.step()
    assert average[0] == -1.0
    assert optimizer.ema_state_dict()[0][0] == -1.5


@pytest.mark.parametrize("clone", ["state_dict", "deepcopy"])
@pytest.mark.parametrize("kind", MAKERS)
def test_averages_are_saved_and_go_on(kind: str, clone: str) -> None:
    net, straight = model(), model()
    optimizer, reference = (MAKERS[kind](n.parameters(), ema_decay=0.9) for n in (net, straight))
    train(straight, reference, range(6))
    train(net, optimizer, range(3))
    if clone == "deepcopy":
        net, optimizer = copy.deepcopy((net, optimizer))
    else:
        file = io.BytesIO()
        torch.save((net.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights_file, state = torch.load(file, weights_only=True)
        net = model()
        net.load_state_dict(weights_file)
        optimizer = MAKERS[kind](net.parameters(), ema_decay=0.9)
        optimizer.load_state_dict(state)
    train(net, optimizer, range(3, 6))
    assert torch.equal(weights(net), weights(straight))
    for a, b in zip(optimizer.ema_state_dict().values(), reference.ema_state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_averages_need_ema_decay() -> None:
    with pytest.raises(ValueError, match=r"FusedSGD keeps averages only if it is made with ema_decay=\.\.\."):
        FusedSGD([nn.Parameter(torch.ones(2))]).ema_state_dict()


@pytest.mark.parametrize("bad", [0, 1.0, math.nan, "x"])
def test_bad_ema_decay(bad: Any) -> None:
    with pytest.raises(TypeError if bad == "x" else ValueError, match="ema_decay must be"):
        FusedAdamW([nn.Parameter(torch.ones(2))], ema_decay=bad)


def test_averages_of_another_model_are_refused() -> None:
    optimizer = FusedSGD([nn.Parameter(torch.ones(2))], ema_decay=0.5)
    optimizer.step()
    state = optimizer.state_dict()
    state["ema"] = {0: torch.ones(3)}
    with pytest.raises(ValueError, match="the averages to load are of other parameters"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", MAKERS)
def test_averages_that_the_core_cannot_take_are_taken_all_the_same(kind: str) -> None:
    """float64 and 16-bit parameters, averages in other memory formats or twice in the same memory."""
    params = [
        nn.Parameter(torch.randn(20, dtype=torch.float64)),
        nn.Parameter(torch.randn(20).bfloat16()),
        nn.Parameter(torch.randn(4, 5)),
        nn.Parameter(torch.randn(20)),
        nn.Parameter(torch.randn(20)),
    ]
    memory = torch.zeros(30)

    def averages() -> list[Tensor]:
        shared = memory.clone()
        first = [torch.zeros(20, dtype=p.dtype) for p in params[:2]]
        return [*first, torch.zeros(5, 4).t(), shared[:20], shared[10:]]

    mine, expected = averages(), averages()
    optimizer, term = MAKERS[kind](params), EmaTerm(params, mine, 0.25)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step(ema=term, max_norm=1.0)
        EmaTerm([p.detach() for p in params], expected, 0.25).update()
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b)


# ---- steps that are skipped


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_norm_that_is_not_finite_skips_the_step(kind: str, bad: float, clip: float | None, reader: str) -> None:
    params = [nn.Parameter(torch.ones(4_097)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = MAKERS[kind](params, skip_nonfinite=True, clip_grad_norm=clip, ema_decay=0.5)

    def step(value: float) -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        assert params[0].grad is not None
        params[0].grad[77] = value
        optimizer.step()

    step(1.0)
    before = copy.deepcopy([[p.detach() for p in params], [optimizer.state[p] for p in params]])
    averages = [a.clone() for a in optimizer.ema_state_dict().values()]
    step(bad)
    after = [[p.detach() for p in params], [optimizer.state[p] for p in params]]
    assert repr(after) == repr(before)
    assert torch.equal(params[0].detach(), before[0][0])  # type: ignore[arg-type]
    assert params[0].grad is not None
    assert params[0].grad[0] == 1.0  # not scaled by NaN
    assert optimizer.grad_norm is not None
    assert not math.isfinite(float(optimizer.grad_norm))
    for a, b, p in zip(optimizer.ema_state_dict().values(), averages, params, strict=True):
        assert torch.equal(a, 0.5 * b + 0.5 * p.detach())  # averages move on
    step(1.0)
    assert not torch.equal(params[0].detach(), before[0][0])  # type: ignore[arg-type]


def test_without_skip_nonfinite_it_spreads() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, math.nan, 1.0])
    FusedAdamW([param], clip_grad_norm=1.0).step()
    assert bool(param.isnan().all())


# ---- zeroing


@pytest.mark.parametrize("size", [5, 3_000_000])
@pytest.mark.parametrize("kind", MAKERS)
def test_zero_lets_go_of_every_gradient(kind: str, size: int, reader: str) -> None:
    params = [nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    idle = nn.Parameter(torch.ones(3))
    optimizer = MAKERS[kind]([*params, idle])
    for p in params:
        p.grad = torch.ones_like(p)
    held = params[0].grad
    assert held is not None
    optimizer.step(zero=True)
    assert [p.grad for p in (*params, idle)] == [None] * 3
    assert bool((held == 1.0).all())  # never stored zeros
    params[0].sum().backward()  # autograd puts a new one in its place
    assert params[0].grad is not None
    assert bool((params[0].grad == 1.0).all())


# ---- torch's state


@pytest.mark.parametrize("options", [{}, dict(amsgrad=True, weight_decay=0.1)], ids=["plain", "amsgrad"])
@pytest.mark.parametrize(("first", "second"), [("ours", "torch"), ("torch", "ours"), ("ours", "ours")])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adams_state_dict_moves_mid_training(
    kind: str, first: str, second: str, options: dict[str, Any], nearest_roots: None
) -> None:
    kinds: dict[str, Any] = {
        "ours": {"adam": FusedAdam, "adamw": FusedAdamW}[kind],
        "torch": {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind],
    }
    net, straight = model(), model()
    train(straight, kinds["torch"](straight.parameters(), lr=0.1, **options), range(6))
    before = kinds[first](net.parameters(), lr=0.1, **options)
    train(net, before, range(3))
    after = kinds[second](net.parameters(), lr=0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(net, after, range(3, 6))
    assert torch.equal(weights(net), weights(straight))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adams_state_dict_has_torchs_keys(kind: str) -> None:
    dicts = []
    for make in (MAKERS[kind], {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]):
        net = model()
        optimizer = make(net.parameters())
        train(net, optimizer, range(1))
        dicts.append(optimizer.state_dict())
    ours, theirs = dicts
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    assert {k: v.keys() for k, v in ours["state"].items()} == {k: v.keys() for k, v in theirs["state"].items()}
    for k, slot in ours["state"].items():
        for name, value in slot.items():
            assert (value.dtype, value.shape) == (theirs["state"][k][name].dtype, theirs["state"][k][name].shape)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0, dtype=torch.float64), torch.tensor([3.0])])
def test_counters_of_other_kinds_are_taken(step: Any) -> None:
    """Numbers in files of torch 1.11 and before; float64 under a default dtype of float64."""
    param = nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([param], lr=0.1)
    state = {"step": step, "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
    group = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k != "decoupled_weight_decay"}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    param.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 4.0
    assert optimizer.state[param]["step"].dtype == torch.float32
    assert optimizer.rest == {}


def test_a_state_of_adam_does_not_make_adamw_adam() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = FusedAdamW([param], lr=0.1)
    optimizer.load_state_dict(torch.optim.Adam([param], lr=0.1).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_of_another_shape_changes_nothing(key: str) -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = FusedAdam([("fc.bias", param)], lr=0.1)
    state = optimizer.state_dict()
    state["state"] = {0: {"step": 1, "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5), key: torch.ones(6)}}
    message = f"parameter group 0, parameter 0 ('fc.bias'): the {key} to load is (6,), the parameter has shape (5,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(state)
    assert not optimizer.state


def test_amsgrad_may_be_switched_on_later() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([param], lr=0.1)
    for amsgrad in (False, True, False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        param.grad = torch.ones(4)
        optimizer.step()
    assert optimizer.state[param]["step"] == 4
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.6), rtol=1e-5, atol=0)  # g is constant: steps of lr


def test_sparse_gradients_are_refused_by_name() -> None:
    net = nn.Embedding(10, 4, sparse=True)
    optimizer = FusedAdam(net.named_parameters(), lr=0.1)
    net(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 \('weight'\): its gradient is sparse, and Adam needs a dense"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_rest_is_torchs(kind: str) -> None:
    """float64, complex, strided and shared memory: torch's own formula, with torch's bits."""

    def params() -> list[nn.Parameter]:
        random = torch.Generator().manual_seed(0)
        memory = torch.randn(30, generator=random)
        return [
            nn.Parameter(torch.randn(5, generator=random, dtype=torch.float64)),
            nn.Parameter(torch.randn(5, generator=random, dtype=torch.complex64)),
            nn.Parameter(torch.randn(10, 4, generator=random)[:, ::2]),
            nn.Parameter(memory[:20]),
            nn.Parameter(memory[10:]),
        ]

    ours, theirs = params(), params()
    fused = MAKERS[kind](ours)
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](theirs, lr=0.1, foreach=False)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=p.dtype)
            q.grad = p.grad.clone()
        fused.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
    assert len(fused.rest) == 5


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(lr=-0.1), ValueError, "parameter group 0: lr must be >= 0, got -0.1"),
    (dict(eps=-1e-8), ValueError, "parameter group 0: eps must be >= 0"),
    (dict(weight_decay=math.nan), ValueError, "parameter group 0: weight_decay must be >= 0, got nan"),
    (dict(betas=(1.0, 0.9)), ValueError, "parameter group 0: betas[0] must be in [0, 1), got 1.0"),
    (dict(betas=(0.9, -0.1)), ValueError, "parameter group 0: betas[1] must be in [0, 1), got -0.1"),
    (dict(betas=0.9), TypeError, "parameter group 0: betas must be two numbers, got 0.9"),
    (dict(betas=(0.9, "x")), TypeError, "parameter group 0: betas[1] must be a number, got 'x' (str)"),
    (dict(clip_grad_norm=math.nan), ValueError, "clip_grad_norm must be > 0, got nan"),
    (dict(clip_grad_norm=-math.inf), ValueError, "clip_grad_norm must be > 0, got -inf"),
]


@pytest.mark.parametrize("kind", [FusedAdam, FusedAdamW])
@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(kind: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        kind([nn.Parameter(torch.ones(2))], **options)


def test_a_beta_spoilt_later_is_named() -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = FusedAdam([param])
    optimizer.param_groups[0]["betas"] = (0.9, "fast")
    with pytest.raises(TypeError, match="parameter group 0: betas must be a number, got str"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))
