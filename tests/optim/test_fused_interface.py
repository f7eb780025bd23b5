"""FusedSGD as a torch.optim.Optimizer: state, hooks, closures, options, versions, imports, errors."""

from __future__ import annotations

import copy
import math
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastrunner.optim import FusedSGD

OPTIONS: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        torch.manual_seed(seed)
        net(torch.randn(11, 7)).square().mean().backward()
        optimizer.step()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


Make = Callable[[nn.Module], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "ours": lambda net: FusedSGD(net.parameters(), **OPTIONS),
    "torch": lambda net: torch.optim.SGD(net.parameters(), foreach=False, **OPTIONS),
}


# ---- state


@pytest.mark.parametrize(("first", "second"), [("ours", "torch"), ("torch", "ours"), ("ours", "ours")])
def test_state_dict_moves_between_ours_and_torchs_mid_training(first: str, second: str) -> None:
    net, straight = model(), model()
    train(straight, MAKERS["torch"](straight), range(6))
    before = MAKERS[first](net)
    train(net, before, range(3))
    after = MAKERS[second](net)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(net, after, range(3, 6))
    assert torch.equal(weights(net), weights(straight))


def test_state_dict_has_torchs_keys() -> None:
    dicts = []
    for make in MAKERS.values():
        net = model()
        optimizer = make(net)
        train(net, optimizer, range(1))
        dicts.append(optimizer.state_dict())
    ours, theirs = dicts
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    assert {k: v.keys() for k, v in ours["state"].items()} == {k: v.keys() for k, v in theirs["state"].items()}


def test_file_of_torch_1_9_loads() -> None:
    """Old files lack the newer options, and hold None for a buffer that was never made."""
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([param], **OPTIONS, maximize=True)
    group = dict(lr=0.5, momentum=0.9, dampening=0, weight_decay=0, nesterov=False, params=[0])
    optimizer.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": [group]})
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 1.5))  # options that the file lacks are the constructor's


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_alone(clone: Callable[[Any], Any]) -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), **OPTIONS, clip_grad_norm=0.01)
    train(net, optimizer, range(2))
    other_net, other = clone((net, optimizer))
    assert other.clip_grad_norm == 0.01
    train(net, optimizer, range(2, 4))
    halfway = weights(other_net).clone()
    train(other_net, other, range(2, 4))
    assert not torch.equal(halfway, weights(other_net))
    assert torch.equal(weights(net), weights(other_net))


# ---- options


def test_lr_is_read_in_every_step_and_stays_a_float() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = FusedSGD([param], lr=1.0)
    for lr in (1.0, 0.5, 2, torch.tensor(0.25), torch.tensor([0.125], dtype=torch.float64)):
        optimizer.param_groups[0]["lr"] = lr
        param.data.zero_()
        param.grad = torch.ones(2)
        optimizer.step()
        assert param.tolist() == [-float(lr)] * 2
        assert optimizer.param_groups[0]["lr"] is lr


def test_each_group_has_its_own_options() -> None:
    """One group a parameter is what MMCV's paramwise_cfg makes."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    others = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    different: list[dict[str, Any]] = [
        dict(lr=0.5),
        dict(momentum=0.0),
        dict(weight_decay=0.3, dampening=0.5),
        dict(nesterov=True),
    ]
    ours = FusedSGD([{"params": [p], **o} for p, o in zip(params, different, strict=True)], **OPTIONS)
    theirs = torch.optim.SGD([{"params": [p], **o} for p, o in zip(others, different, strict=True)], **OPTIONS)
    for _ in range(3):
        for p in (*params, *others):
            p.grad = torch.linspace(0, 1, 3)
        ours.step()
        theirs.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_momentum_may_be_scheduled_through_zero() -> None:
    param, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ours, theirs = FusedSGD([param], lr=0.1), torch.optim.SGD([other], lr=0.1)
    for momentum in (0.0, 0.9, 0.95, 0.0, 0.5):
        for p, optimizer in ((param, ours), (other, theirs)):
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = torch.linspace(0, 1, 5)
            optimizer.step()
        assert torch.equal(param, other)
        assert len(ours.state) == len(theirs.state)


def test_add_param_group_mid_training() -> None:
    net, other = model(), model()
    ours: torch.optim.Optimizer = FusedSGD(net[0].parameters(), **OPTIONS)
    theirs: torch.optim.Optimizer = torch.optim.SGD(other[0].parameters(), **OPTIONS)
    train(net, ours, range(2))
    train(other, theirs, range(2))
    ours.add_param_group({"params": list(net[2].parameters()), "lr": 0.01})
    theirs.add_param_group({"params": list(other[2].parameters()), "lr": 0.01})
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
    net.zero_grad()
    other.zero_grad()
    train(net, ours, range(2, 4))
    train(other, theirs, range(2, 4))
    assert torch.equal(weights(net), weights(other))


def test_clip_grad_norm_option_clips_every_step() -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = FusedSGD([param], lr=1.0, clip_grad_norm=1.0)
    assert optimizer.grad_norm is None
    param.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert (optimizer.grad_norm.dtype, optimizer.grad_norm.shape) == (torch.float32, ())
    assert float(optimizer.grad_norm) == 4.0
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.5))
    torch.testing.assert_close(param.grad, torch.full((4,), 0.5))
    assert optimizer.clipped_step(8.0) is optimizer.grad_norm  # an argument goes before the option
    torch.testing.assert_close(param.detach(), torch.full((4,), -1.0))


def test_step_without_clipping_takes_no_norm() -> None:
    param = nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    optimizer = FusedSGD([param])
    optimizer.step()
    assert optimizer.grad_norm is None


def test_no_gradient_at_all() -> None:
    optimizer = FusedSGD([nn.Parameter(torch.ones(4))], **OPTIONS)
    assert float(optimizer.clipped_step(1.0)) == 0.0
    assert not optimizer.state


# ---- torch's protocol around a step


def test_closure_runs_first_with_gradients_enabled() -> None:
    param = nn.Parameter(torch.tensor([3.0]))
    optimizer = FusedSGD([param], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 9.0
    assert param.item() == 0.0


def test_step_hooks_are_called_by_both_kinds_of_step() -> None:
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    optimizer = FusedSGD([param], lr=1.0)
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", param.item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", param.item())))
    optimizer.step()
    optimizer.clipped_step(10.0)
    assert seen == [("before", 0.0), ("after", -1.0), ("before", -1.0), ("after", -2.0)]


def test_step_hooks_of_all_optimizers_are_called() -> None:
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        FusedSGD([nn.Parameter(torch.zeros(1))]).step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("profiled", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, profiled: bool) -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    params[0].grad = torch.ones(2)
    with torch.autograd.profiler.profile(enabled=profiled):
        FusedSGD(params).zero_grad(set_to_none)
    assert params[0].grad is None if set_to_none else torch.equal(params[0].grad, torch.zeros(2))
    assert params[1].grad is None


def test_profiler_sees_the_step() -> None:
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    optimizer = FusedSGD([param])
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert {"Optimizer.step#FusedSGD.step", "Optimizer.zero_grad#FusedSGD.zero_grad"} <= names


def test_a_subclass_with_its_own_step_keeps_its_hooks() -> None:
    class Counting(FusedSGD):
        steps = 0

        def step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().step(*args, **kwargs)

    optimizer = Counting([nn.Parameter(torch.zeros(1))])
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.steps))
    optimizer.clipped_step(1.0)
    assert set(seen) == {1}  # more than once if the base class was used before, as in torch


@pytest.mark.filterwarnings("error")
def test_lr_schedulers_count_clipped_steps() -> None:
    """They replace ``optimizer.step`` and warn if it was not called before them."""
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    optimizer = FusedSGD([param], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer.clipped_step(10.0)
    scheduler.step()
    optimizer.step()
    assert param.item() == -1.5


def test_grad_scaler_drives_it() -> None:
    """It unscales, and skips the step where it found inf."""
    param = nn.Parameter(torch.zeros(2))
    optimizer = FusedSGD([param], lr=1.0, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, expected in ((1.0, -1.0), (math.inf, -1.0), (1.0, -2.9)):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale((param * factor).sum()))
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(param.detach(), torch.full((2,), expected))


def test_stale_graphs_fail_as_in_torch() -> None:
    """A graph that saved a weight before the step must not go backward through the new one."""
    param = nn.Parameter(torch.ones(2))
    bystander = nn.Parameter(torch.ones(2))
    loss, other_loss = param.square().sum(), bystander.square().sum()
    optimizer = FusedSGD([param, bystander], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)
    torch.autograd.backward(other_loss)  # it had no gradient and was not changed


@pytest.mark.parametrize(("write_back", "scaled"), [(True, True), (True, False), (False, True)])
def test_versions_of_gradients_move_only_if_they_are_written(write_back: bool, scaled: bool) -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    before = param.grad._version
    FusedSGD([param]).clipped_step(0.1 if scaled else 100.0, write_back=write_back)
    assert (param.grad._version > before) == (write_back and scaled)


class Interrupting:
    """An lr that is interrupted while the core reads it."""

    def __float__(self) -> float:
        signal.raise_signal(signal.SIGINT)
        return 0.1


def test_an_interrupt_before_the_update_leaves_everything_as_it_was() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["lr"] = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        optimizer.clipped_step(0.5)
    assert torch.equal(param.detach(), torch.ones(3))
    assert torch.equal(param.grad, torch.ones(3))
    assert "momentum_buffer" not in optimizer.state[param]
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 0.9))


def test_interrupts_never_leave_half_a_step() -> None:
    """Wherever the signal comes, weights and momenta belong to the same number of steps."""
    size = 300_000

    def optimize() -> tuple[nn.Parameter, FusedSGD]:
        param = nn.Parameter(torch.zeros(size))
        param.grad = torch.ones(size)
        return param, FusedSGD([param], lr=1.0, momentum=0.5)

    param, optimizer = optimize()
    whole = {(0.0, None)}
    for _ in range(40):
        optimizer.step()
        momentum = optimizer.state[param]["momentum_buffer"]
        whole.add((param.detach()[0].item(), momentum[0].item()))

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in range(1, 16):
            param, optimizer = optimize()
            try:
                signal.setitimer(signal.ITIMER_REAL, delay * 1e-4)
                for _ in range(40):
                    optimizer.step()
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                torch.set_grad_enabled(True)  # inside no_grad's own __exit__, a signal leaves gradients off
            slot = optimizer.state.get(param, {}).get("momentum_buffer")
            values, momenta = set(param.tolist()), {None} if slot is None else set(slot.tolist())
            assert len(values) == len(momenta) == 1
            assert (values.pop(), momenta.pop()) in whole
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_gil_is_released_during_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread gets on in the middle of one long step; with the GIL held it could only before and after."""
    monkeypatch.setenv("FASTRUNNER_ISA", "scalar")  # slow: the step takes some 100 ms
    torch.set_num_threads(1)
    param = nn.Parameter(torch.zeros(8_000_000))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer.step()
    ticks: list[float] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        start = time.perf_counter()
        optimizer.step()
        duration = time.perf_counter() - start
    finally:
        done.set()
        thread.join()
    assert any(start + duration / 4 < tick < start + duration * 3 / 4 for tick in ticks)


def test_two_steps_at_once_are_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedSGD([param], lr=0.1)
    optimizer.step()

    class Reentrant:
        def __bool__(self) -> bool:
            optimizer.step()
            return False

    optimizer.param_groups[0]["maximize"] = Reentrant()
    with pytest.raises(RuntimeError, match=r"step the same optimizer at once.*lock"):
        optimizer.step()


def test_no_dynamo_is_imported_up_to_a_checkpoint() -> None:
    """torch.optim's constructors, zero_grad, state_dict and load_state_dict import dynamo and inductor: two seconds."""
    code = """
import sys, torch
from fastrunner.optim import FusedAdam, FusedAdamW, FusedSGD
for kind in (FusedSGD, FusedAdam, FusedAdamW):
    net = torch.nn.Linear(3, 2)
    optimizer = kind(net.parameters(), lr=0.1, clip_grad_norm=1.0, ema_decay=0.9)
    optimizer.zero_grad()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.clipped_step(0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1, dtype=torch.float64))]})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert optimizer.rest, "the float64 parameter should have gone through torch's functional optimizer"
print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))])
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "[]\n"


# ---- errors

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(lr=-0.1), ValueError, "parameter group 1: lr must be >= 0, got -0.1"),
    (dict(lr=math.nan), ValueError, "parameter group 1: lr must be >= 0, got nan"),
    (dict(lr="1e-3"), TypeError, "parameter group 1: lr must be a number, got '1e-3' (str); YAML reads 1e-3 as text"),
    (dict(lr=torch.ones(2)), TypeError, "parameter group 1: lr must be a number"),
    (dict(momentum=-0.9), ValueError, "parameter group 1: momentum must be >= 0, got -0.9"),
    (dict(weight_decay=-1), ValueError, "parameter group 1: weight_decay must be >= 0, got -1"),
    (dict(dampening=None), TypeError, "parameter group 1: dampening must be a number, got None"),
    (dict(nesterov=True, momentum=0), ValueError, "parameter group 1: nesterov wants momentum > 0"),
    (dict(nesterov=True, dampening=0.1), ValueError, "dampening == 0, got momentum=0.9 and dampening=0.1"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_name_the_group(options: dict[str, Any], error: type[Exception], message: str) -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], **options}]

    with pytest.raises(error, match=re.escape(message)):
        FusedSGD(groups(), **OPTIONS)
    good, bad = groups()
    optimizer = FusedSGD([good], **OPTIONS)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [0, -1.0, math.nan])
def test_bad_max_norm(bad: float) -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="clip_grad_norm must be > 0, got"):
        FusedSGD(params, clip_grad_norm=bad)
    with pytest.raises(ValueError, match=r"max_norm must be > 0, got .*; to train without clipping, do not pass it"):
        FusedSGD(params).clipped_step(bad)
    with pytest.raises(TypeError, match="max_norm must be a number, got '1' "):
        FusedSGD(params).clipped_step("1")  # type: ignore[arg-type]


def test_an_option_spoilt_later_is_named() -> None:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = FusedSGD([param])
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="parameter group 0: lr must be a number, got str"):
        optimizer.step()
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="parameter group 0 has no option 'lr'"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(2))


def test_mixed_devices_name_the_parameter() -> None:
    groups = [
        {"params": [("a", nn.Parameter(torch.ones(2)))]},
        {"params": [("b", nn.Parameter(torch.ones(2))), ("c", nn.Parameter(torch.ones(2, device="meta")))]},
    ]
    message = r"parameter group 1, parameter 1 \('c'\) is on meta, the parameters before it are on cpu; move the model"
    with pytest.raises(ValueError, match=message):
        FusedSGD(groups)


def test_state_dict_of_another_shape_changes_nothing() -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), **OPTIONS)
    train(net, optimizer, range(2))
    good = copy.deepcopy(optimizer.state_dict())

    def refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.load_state_dict(bad)
        for key, slot in good["state"].items():
            assert torch.equal(optimizer.state_dict()["state"][key]["momentum_buffer"], slot["momentum_buffer"])
        assert optimizer.state_dict()["param_groups"] == good["param_groups"]

    refused(
        lambda bad: bad["state"][2].update(momentum_buffer=torch.ones(4, 4)),
        "parameter group 0, parameter 2: the momentum_buffer to load is (4, 4), the parameter has shape (3, 5)",
    )
    refused(
        lambda bad: bad["param_groups"].append({"params": []}), "the state_dict has 2 parameter groups, the optimizer 1"
    )
    refused(
        lambda bad: bad["param_groups"][0]["params"].pop(), "group 0: the state_dict has 3 parameters, the optimizer 4"
    )
    train(net, optimizer, range(2, 3))
