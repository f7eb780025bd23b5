"""Wrong steps are refused, each for what is wrong with it; right ones are not (test_zoo.py trains with them)."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from step.zoo import ZOO
from torch import nn

from fastrunner import Fp16OptimizerHook
from fastrunner.optim.ema_term import EmaTerm
from fastrunner.step import torch_private
from fastrunner.step.binding import Binding
from fastrunner.step.torch_private import Unfit
from fastrunner.step.trace import trace_step
from fastrunner.step.trial import Snapshot, result_of
from fastrunner.step.verify import Result, compare, reference, verify

MLP, RESNET, GPT, TIED = (ZOO[name] for name in ("mlp", "resnet", "gpt", "tied"))


def prepared(family, averages=False, updates=None, scaler=None):
    """A traced step of a model that has taken one eager step, and two batches.

    Args:
        updates: whether gradients that add up are updated with; None: they do not add up.
    """
    torch.manual_seed(0)
    model = family.model()
    term = None
    if averages:
        for name, param in list(model.named_parameters()):
            model.register_buffer("ema_" + name.replace(".", "_"), param.detach().clone())
        params = list(model.parameters())
        term = EmaTerm(params, [b for n, b in model.named_buffers() if n.startswith("ema_")], 0.1)
    optimizer = family.optimizer(model.parameters())
    batches = [family.batch(0), family.batch(1)]
    model.train_step(batches[0], optimizer)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    binding = Binding(model, optimizer, term, adds_up=updates is not None, scaler=scaler)
    traced = trace_step(binding, batches[0], family.clip, averages=averages, updates=updates is not False)
    return binding, traced, batches


def check(family, spoil=None, averages=False, **terms):
    """Verify the traced step, after ``spoil(binding, run, inputs)`` has stood in for the call."""
    binding, traced, batches = prepared(family, averages, **terms)

    def run(inputs):
        return traced.graph(*inputs) if spoil is None else spoil(binding, traced.graph, inputs)

    before = [tensor.clone() for tensor in binding.tensors], torch.get_rng_state()
    try:
        verify(binding, traced, run, batches, family.clip, binding.model.train_step)
    finally:  # nothing of the run was touched
        assert all(torch.equal(a, b) for a, b in zip(before[0], binding.tensors, strict=True))
        assert torch.equal(before[1], torch.get_rng_state())
        assert all(p.grad is None for p in binding.model.parameters())


def restored(number):
    """The step, but what it wrote into one tensor is lost."""

    def spoil(binding, graph, inputs):
        tensor = inputs[number(binding)]
        kept = tensor.clone()
        values = graph(*inputs)
        tensor.copy_(kept)
        return values

    return spoil


def scaled(factor):
    def spoil(binding, graph, inputs):
        values = graph(*inputs)
        inputs[binding.trained[2].state[0]].mul_(factor)
        return values

    return spoil


def other_mask(binding, graph, inputs):
    state = torch.get_rng_state()
    torch.manual_seed(99)
    values = graph(*inputs)
    torch.set_rng_state(state)
    torch.rand(0)
    graph(*[tensor.clone() for tensor in inputs])  # leaves the generator where it belongs
    return values


def draws_more(binding, graph, inputs):
    values = graph(*inputs)
    torch.rand(1)
    return values


def half_loss(binding, graph, inputs):
    loss, *rest = graph(*inputs)
    return (loss * 0.99, *rest)


@pytest.mark.parametrize(
    ("family", "spoil", "says"),
    [
        (MLP, restored(lambda b: b.trained[0].state[0]), "gradient of body.0.weight"),
        (MLP, scaled(1.001), "gradient of body.3.weight"),
        (MLP, other_mask, "the loss"),
        (MLP, draws_more, "random numbers"),
        (MLP, half_loss, "the loss"),
        (MLP, restored(lambda b: len(b.static) - 2), "count Adam's steps"),
        (RESNET, restored(lambda b: b.num_params), "buffer body.0.1.running_mean"),
        (RESNET, restored(lambda b: b.num_params + 2), "buffer body.0.1.num_batches_tracked"),
        (RESNET, restored(lambda b: b.trained[0].state[0]), "gradient of body.0.0.weight"),
        (replace(RESNET, model=ZOO["resnet bf16"].model), restored(lambda b: b.trained[0].state[0]), "gradient"),
        (TIED, restored(lambda b: 0), "gradient of body.embedding.weight"),
    ],
)
def test_a_wrong_step_is_refused(family, spoil, says):
    check(family)  # unspoilt it is not
    with pytest.raises(Unfit, match=says):
        check(family, spoil)


def test_a_wrong_average_is_refused():
    check(MLP, averages=True)
    with pytest.raises(Unfit, match="average"):
        check(MLP, restored(lambda b: b.average_pairs[0][0]), averages=True)


def sums(binding):
    return binding.num_params + binding.num_buffers + sum(len(each.state) for each in binding.trained)


@pytest.mark.parametrize(
    ("updates", "spoil", "says"),
    [
        (False, restored(sums), "gradient of body.0.weight"),
        (False, restored(lambda b: b.num_params + b.num_buffers), ""),
        (True, restored(sums), "clear what gradients added up to"),
        (True, restored(lambda b: b.trained[1].state[0]), "gradient of body.0.bias"),
        (True, restored(lambda b: len(b.static) - 2), "count Adam's steps"),
    ],
)
def test_wrong_accumulation_is_refused(updates, spoil, says):
    check(MLP, updates=updates)
    if not says:  # an added gradient leaves momenta alone: there is nothing to lose
        return check(MLP, spoil, updates=updates)
    with pytest.raises(Unfit, match=says):
        check(MLP, spoil, updates=updates)
    return None


def forgets_sums(binding, graph, inputs):
    for total in binding.sums_in(inputs):
        total.zero_()
    return graph(*inputs)


def test_gradients_of_earlier_iterations_that_are_lost_are_found_at_the_second_batch():
    for updates in (False, True):
        with pytest.raises(Unfit, match="gradient of body"):
            check(MLP, forgets_sums, updates=updates)


def never_skips(binding, graph, inputs):
    if inputs[binding.scale].isinf():
        inputs[0].add_(1)
    return graph(*inputs)


@pytest.mark.parametrize("scale", [512.0, "dynamic"])
def test_a_wrong_loss_scale_is_refused(scale):
    def scaler():
        return Fp16OptimizerHook(loss_scale=scale)

    check(MLP, scaler=scaler())
    check(MLP, scaler=scaler(), updates=True)
    check(MLP, scaler=scaler(), updates=False)
    with pytest.raises(Unfit, match="not finite"):
        check(MLP, never_skips, scaler=scaler())
    if scale == "dynamic":
        with pytest.raises(Unfit, match="loss scale"):
            check(MLP, restored(lambda b: b.scale + 1), scaler=scaler())
    with pytest.raises(Unfit, match=r"gradient of body\.0\.weight"):
        check(MLP, restored(lambda b: b.trained[0].state[0]), scaler=scaler())


def test_a_checkpoint_that_recomputes_with_another_mask_is_refused(monkeypatch):
    """What tracing makes of torch's checkpoint if it is not run inline: the loss is right, gradients are not."""
    check(GPT)
    monkeypatch.setattr(torch_private, "_checkpoints_inline", contextlib.nullcontext)
    with pytest.raises(Unfit, match=r"gradient|random numbers"):
        check(GPT)


def wrong_row(change):
    """The step, with other numbers than the host filled in."""

    def spoil(binding, graph, inputs):
        change(inputs[len(binding.static) - 1])
        return graph(*inputs)

    return spoil


def other_lr(row):
    row[0] *= 1.01


def other_group(row):
    row[:3] = row[3:6].clone()


def no_decay(row):
    row[5] = 0


@pytest.mark.parametrize(
    ("name", "change"), [("mlp", other_lr), ("gpt", other_lr), ("resnet", other_lr), ("tied", other_lr)]
)
def test_a_wrong_lr_is_refused(name, change):
    with pytest.raises(Unfit, match=r"the update of .* differs|the gradient of body.embedding"):  # SGD has no momenta
        check(ZOO[name], wrong_row(change))


@pytest.mark.parametrize("change", [other_lr, other_group, no_decay])
def test_groups_that_change_places_and_a_lost_decay_are_refused(change):
    check(ZOO["depthwise"])
    with pytest.raises(Unfit, match=r"the update of .* differs"):
        check(ZOO["depthwise"], wrong_row(change))


@pytest.mark.parametrize("factor", [0.5, 1.01, 2.0])
def test_another_clip_is_refused(factor):
    binding, _, batches = prepared(MLP)
    traced = trace_step(binding, batches[0], MLP.clip * factor)
    with pytest.raises(Unfit, match="gradient of body"):
        verify(binding, traced, lambda i: traced.graph(*i), batches, MLP.clip, binding.model.train_step)


class Zero(nn.Module):
    """Its first bias stands before a BatchNorm: its true gradient is zero, and what it gets is rounding."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def train_step(self, batch, optimizer=None):
        loss = nn.functional.cross_entropy(self.body(batch["x"]), batch["y"])
        return dict(loss=loss, log_vars={}, num_samples=8)


def test_noise_where_the_true_gradient_is_zero_is_no_reason():
    def other_rounding(binding, graph, inputs):
        values = graph(*inputs)
        if inputs[len(binding.static) - 1][0] == 0:  # asked for gradients
            inputs[binding.trained[1].state[0]].neg_()  # the noise, with another sign
        return values

    check(replace(MLP, model=Zero), other_rounding)


def test_a_model_that_cannot_be_computed_in_float64_is_verified_too():
    class Single(Zero):
        def train_step(self, batch, optimizer=None):
            return super().train_step(dict(batch, x=batch["x"].float()))

    family = replace(MLP, model=Single)
    check(family)
    with pytest.raises(Unfit, match=r"gradient of body\.3\.weight"):
        check(family, restored(lambda b: b.trained[4].state[0]))


def test_the_reference_is_eagers_step():
    binding, _, batches = prepared(MLP)
    torch.manual_seed(5)
    result = reference(binding, batches[1], MLP.clip, binding.model.train_step)
    torch.manual_seed(5)
    binding.model.zero_grad()
    binding.model.train_step(batches[1])["loss"].backward()
    nn.utils.clip_grad_norm_(binding.model.parameters(), MLP.clip)
    for name, param in binding.model.named_parameters():
        torch.testing.assert_close(result.grads[name], param.grad, rtol=1e-6, atol=1e-8)


# eager's distance from float64 in 16 bits, of the size of the gradient
DEEP = {"first": 0.37, "last": 0.02, "before norm": 1.0}


def rounded(seed, draws=False):
    """A result in 16 bits, of a deep network whose exact gradients are 1 (and 1e-4 where the true gradient is 0)."""
    generator = torch.Generator().manual_seed(seed)
    grads = {}
    for name, share in DEEP.items():
        size = 1e-4 if name == "before norm" else 1.0
        away = torch.randn(1000, generator=generator, dtype=torch.float64)
        grads[name] = size * (torch.ones(1000, dtype=torch.float64) + (share if seed else 0) * away)
    return Result(torch.tensor(2.0), grads, {}, torch.zeros(1), draws)


@pytest.mark.parametrize("seed", range(2, 8))
def test_what_16_bits_leave_of_a_deep_networks_gradients_is_not_held_against_another_rounding(seed):
    compare(rounded(seed), rounded(1), rounded(0), low=True)


@pytest.mark.parametrize("name", ["first", "last"])
@pytest.mark.parametrize("wrong", [lambda g: 0 * g, lambda g: 2 * g, lambda g: -g, lambda g: g.roll(1) * g[::2].sum()])
def test_a_wrong_gradient_in_16_bits_is_refused(name, wrong):
    ours = rounded(2)
    ours.grads[name] = wrong(ours.grads[name])
    with pytest.raises(Unfit, match=f"the gradient of {name} differs"):
        compare(ours, rounded(1), rounded(0), low=True)


def test_where_masks_are_drawn_a_far_float64_run_is_no_reference():
    with pytest.raises(Unfit, match="the gradient of first differs"):  # 0.5 apart: not within 10 times 0.02
        compare(rounded(2), rounded(1, draws=True), rounded(0), low=True)


@pytest.mark.parametrize(("family", "draws"), [(RESNET, False), (MLP, True)])
def test_whether_an_eager_step_draws_is_seen(family, draws):
    binding, _, batches = prepared(family)
    model, optimizer = binding.model, binding.optimizer
    assert reference(binding, batches[0], None, model.train_step).draws is draws
    assert result_of(model.train_step, model, optimizer, batches[0], Snapshot(model, optimizer)).draws is draws
