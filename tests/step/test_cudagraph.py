"""Recipe ``cudagraph`` on the CPU stand-in: the whole life of its graphs, against eager's losses and weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step.captured_runs import Clock, captured_of, interpret_captured, on_stand_in
from step.runs import interpret_halves, make, state_of, train
from step.zoo import ZOO, vectors
from torch import nn
from torch.nn import functional as F

from fastrunner import FusedAdamW, FusedSGD, Hook
from fastrunner.hooks.hook import NEVER
from fastrunner.step import batches as batches_module
from fastrunner.step import cudagraph, worth
from fastrunner.step.graph_backend import Cost
from fastrunner.step.outputs import Outputs
from fastrunner.step.torch_private import Unfit

MLP = ZOO["mlp"]
FIRST = 2 + worth.MEASURED + cudagraph.WARM_UPS  # iterations before the first replay; one sees the first update
BELOW = {"gpt": "generator's state", "branch": "zoo.py:143"}


@pytest.fixture
def backend(monkeypatch):
    return on_stand_in(monkeypatch)


@pytest.mark.parametrize("name", ZOO)
def test_replays_train_as_eager_does(name, backend):
    family, iters = ZOO[name], FIRST + 5
    runner, losses = train(family, "cudagraph", iters, ema=2 if name in ("tied", "depthwise") else None)
    drawn = torch.get_rng_state()
    eager, wanted = train(family, "eager", iters, ema=2 if name in ("tied", "depthwise") else None)
    lines = "\n".join(captured_of(runner).explain())
    if name in BELOW:
        assert BELOW[name] in lines
    elif name not in ("tied", "depthwise"):
        assert backend.num_replays >= 3, lines
    assert losses == pytest.approx(wanted, rel=family.rtol)
    assert torch.equal(drawn, torch.get_rng_state())  # as many draws: a resume is exact
    ours, theirs = state_of(runner), state_of(eager)
    for key, value in theirs.items():
        if "num_batches" in key or key.endswith(" step"):
            assert torch.equal(ours[key], value)
        elif "running" in key:
            torch.testing.assert_close(ours[key], value, rtol=10 * family.rtol, atol=1e-6)


class Net(nn.Module):
    """Dropout and BatchNorm, and a batch that may be of any size."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 10)

    def train_step(self, batch, optimizer=None, **kwargs):
        scores = self.head(self.body(batch["x"]))
        loss = F.cross_entropy(scores, batch["y"])
        acc = (scores.argmax(-1) == batch["y"]).float().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach(), acc=acc), num_samples=len(batch["y"]))


def new_lr(runner):
    runner.optimizer.param_groups[0]["lr"] *= 0.5


def other_mode(runner):
    runner.model.body[1].training = not runner.model.body[1].training


def new_weights(runner):
    for param in runner.model.parameters():
        param.data = 0.9 * param.data  # other memory


def scaled_weights(runner):
    with torch.no_grad():
        runner.model.head.weight.mul_(0.9)  # the same memory


def new_parameter(runner):
    old = runner.model.head.weight
    new = nn.Parameter(old.detach().clone())
    runner.model.head.weight = new
    group = runner.optimizer.param_groups[0]
    group["params"] = [new if p is old else p for p in group["params"]]
    runner.optimizer.state[new] = runner.optimizer.state.pop(old, {})


def evaluation(runner):
    runner.model.eval()
    with torch.no_grad():
        runner.model.train_step(vectors(99))
    runner.model.train()


def state_in_and_out(runner):
    runner.optimizer.load_state_dict(copy.deepcopy(runner.optimizer.state_dict()))
    runner.model.load_state_dict(copy.deepcopy(runner.model.state_dict()))


def frozen(runner):
    runner.model.head.bias.requires_grad_(not runner.model.head.bias.requires_grad)


def reseeded(runner):
    torch.manual_seed(runner.iter)


ACTS = [new_lr, other_mode, new_weights, scaled_weights, new_parameter, evaluation, state_in_and_out, frozen, reseeded]


class ActsHook(Hook):
    """Does things at given iterations, between two of them."""

    def __init__(self, acts):
        self.acts = acts

    def due(self, runner):
        return min((at for at in self.acts if at >= runner.iter), default=NEVER)

    def after_train_iter(self, runner):
        if runner.iter in self.acts:
            self.acts[runner.iter](runner)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([4, 4, 4, 6, 9]), min_size=30, max_size=45),
    acts=st.dictionaries(st.integers(0, 40), st.sampled_from(ACTS), max_size=4),
    optimizer=st.sampled_from([sgd, adamw]),
    clip=st.sampled_from([None, 0.5]),
    ema=st.sampled_from([None, 1, 3]),
    rows=st.sampled_from([2, 256]),
)
def test_whatever_happens_between_replays_losses_and_weights_are_eagers(sizes, acts, optimizer, clip, ema, rows):
    family = replace(MLP, model=Net, optimizer=optimizer, clip=clip)
    batches = [vectors(number, size) for number, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        on_stand_in(patch)
        patch.setattr("fastrunner.step.scalar_ring.ROWS", rows)
        runner, losses = train(family, "cudagraph", len(sizes), batches, ema=ema, hooks=[ActsHook(acts)])
        eager, wanted = train(family, "eager", len(sizes), batches, ema=ema, hooks=[ActsHook(acts)])
    # The same operations but for the update, which rounds otherwise; what follows magnifies that, 40 steps at most.
    assert losses == pytest.approx(wanted, rel=1e-3), captured_of(runner).explain()
    ours, theirs = state_of(runner), state_of(eager)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.endswith(" step") or "num_batches" in key:
            assert torch.equal(ours[key].float(), value.float()), key


def test_shapes_that_come_and_go_have_graphs_of_their_own_and_the_least_used_goes(backend, monkeypatch):
    monkeypatch.setattr(cudagraph, "MAX_GRAPHS", 2)
    rounds = [size for size in (4, 6, 8) for _ in range(12)]
    batches = [vectors(number, size) for number, size in enumerate([*rounds, *rounds])]
    family = replace(MLP, model=Net)
    runner, losses = train(family, "cudagraph", len(batches), batches)
    step = captured_of(runner)
    assert backend.num_records == step.num_captures == 6  # each of the three went once, and was made again
    assert len(step._order) == 2
    assert step.num_dropped == 4
    assert any("2 CUDA graphs" in line and "4 dropped" in line for line in step.explain())
    assert losses == pytest.approx(train(family, "eager", len(batches), batches)[1], rel=1e-4)


def test_a_tail_batch_runs_below_unless_it_recurs(backend):
    batches = [vectors(0), vectors(1), vectors(2, 3)]
    runner, _ = train(replace(MLP, model=Net), "cudagraph", 18, batches)
    assert backend.num_records == 1
    assert len(captured_of(runner)._order) == 1


def test_shapes_that_never_repeat_are_a_reason(backend, monkeypatch, caplog):
    monkeypatch.setattr(batches_module, "MAX_SHAPES", 5)
    runner, _ = train(MLP, "cudagraph", 12, [vectors(number, 4 + number) for number in range(12)])
    assert "no shape repeats" in captured_of(runner).explain()[-1]
    assert len([r for r in caplog.records if "no CUDA graph" in r.getMessage()]) == 1


def test_it_stays_off_where_the_device_does_not_wait_for_the_host(monkeypatch):
    backend = on_stand_in(monkeypatch, clock=Clock([Cost(1.0, 5.0), Cost(9.0, 5.0), Cost(1.0, 5.0)]))
    runner, _ = train(MLP, "cudagraph", 15)
    assert backend.num_records == 0
    assert (
        "it would not pay: launching takes 1000000 us, the device works for 5000000 us and waits 0 %"
        in (captured_of(runner).explain()[-1])
    )


def test_short_memory_drops_the_least_used_graph_first_and_is_then_a_reason(backend):
    family = replace(MLP, model=Net)
    runner, _ = make(family, "cudagraph", 100)
    step = captured_of(runner)
    runner._max_iters = 14
    runner.run([[vectors(number) for number in range(14)]], [("train", 1)])
    assert len(step._order) == 1
    backend.free = 100
    runner._max_iters = 40
    runner.run([[vectors(number, 5) for number in range(26)]], [("train", 1)])
    assert len(step._order) == 0
    assert step.num_dropped == 1
    assert "memory is short" in step.explain()[-1]


class Steps(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.layer, self.body = nn.Linear(16, 10), body
        self.register_buffer("mean", torch.zeros(10))
        self.generator = torch.Generator().manual_seed(3)
        self.scale = torch.full((10,), 0.5)

    def train_step(self, batch, optimizer=None, **kwargs):
        loss = self.body(self, batch)
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(batch["y"]))


def plain(model, batch):
    return F.cross_entropy(model.layer(batch["x"]) * model.scale, batch["y"])


def reads(model, batch):
    loss = plain(model, batch)
    return loss * (1 + loss.item())  # LINE


def makes(model, batch):
    return plain(model, batch) * torch.tensor([1.0, 1.0]).sum()


def of_the_host(model, batch):
    return plain(model, batch) + HOST.sum()


def draws(model, batch):
    keep = torch.empty_like(batch["x"]).bernoulli_(0.5, generator=FOREIGN)
    return F.cross_entropy(model.layer(batch["x"] * keep), batch["y"])


HOST, FOREIGN = torch.zeros(3), torch.Generator()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (reads, "reads the host"),
        (makes, "memory of the host"),
        (of_the_host, "not on the device"),
        (draws, "a generator draws that is not registered"),
    ],
)
def test_what_cannot_be_captured_is_named_once_with_its_line_and_the_run_goes_on(body, says, backend, caplog):
    family = replace(MLP, model=lambda: Steps(body), clip=None)
    FOREIGN.manual_seed(5)
    runner, losses = train(family, "cudagraph", 12)
    (why,) = [line for line in captured_of(runner).explain() if line.startswith("no CUDA graph")]
    assert says in why
    assert "test_cudagraph.py:" in why
    assert backend.num_replays == 0
    assert len([r for r in caplog.records if "no CUDA graph" in r.getMessage()]) == 1
    FOREIGN.manual_seed(5)
    assert losses == pytest.approx(train(family, "eager", 12)[1], rel=1e-5)


def test_a_generator_of_the_models_own_is_registered(backend):
    def body(model, batch):
        keep = torch.empty_like(batch["x"]).bernoulli_(0.5, generator=model.generator)
        return F.cross_entropy(model.layer(batch["x"] * keep), batch["y"])

    family = replace(MLP, model=lambda: Steps(body), clip=None)
    runner, losses = train(family, "cudagraph", 14)
    assert backend.num_replays > 0
    eager, wanted = train(family, "eager", 14)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(runner.model.generator.get_state(), eager.model.generator.get_state())


def test_a_step_that_changes_python_state_is_refused(backend):
    def body(model, batch):
        model.count = getattr(model, "count", 0) + 1
        return plain(model, batch) * (1 + 0.1 * model.count)

    runner, _ = train(replace(MLP, model=lambda: Steps(body), clip=None), "cudagraph", 12)
    assert "Steps.count" in captured_of(runner).explain()[-1]
    assert backend.num_records == 0


@pytest.mark.parametrize("wrong", ["gradient", "buffer", "average", "count"])
def test_a_capture_that_computes_something_else_is_refused(wrong, backend, monkeypatch):
    """Planted errors: what is recorded differs from what warmed up."""
    original = cudagraph.Captured.record

    def record(self, generators):
        body, binding = self._body, self._binding

        def other(batch):
            done = body(batch)
            with torch.no_grad():
                if wrong == "gradient":
                    binding.static[binding.trained[0].state[0]].mul_(1.01)
                elif wrong == "buffer":
                    binding.buffers["body.1.running_mean"].mul_(0.9)
                elif wrong == "count":
                    binding.counters.add_(1)
                else:
                    binding.static[binding.average_pairs[0][0]].mul_(1.01)
            return done

        self._body = other
        original(self, generators)

    monkeypatch.setattr(cudagraph.Captured, "record", record)
    family = replace(MLP, model=Net, optimizer=adamw if wrong == "count" else sgd, clip=None)
    runner, losses = train(family, "cudagraph", 14, ema=1)
    assert len(captured_of(runner)._order) == 0
    says = {"gradient": "the gradient of", "buffer": "the change of buffer", "average": "average", "count": "steps"}
    assert says[wrong] in captured_of(runner).explain()[-1]
    assert losses == pytest.approx(train(family, "eager", 14, ema=1)[1], rel=1e-4)


def test_tensors_that_are_no_scalars_are_the_iterations_own(backend):
    class Outputs(Net):
        def train_step(self, batch, optimizer=None, **kwargs):
            outputs = super().train_step(batch)
            return {**outputs, "scores": self.head.weight.detach() * 1, "name": "x"}

    kept = []

    class Keep(Hook):
        def due(self, runner):
            return NEVER

        def after_run(self, runner):
            kept.append(runner.outputs)

    family = replace(MLP, model=Outputs)
    runner, _ = make(family, "cudagraph", 14, hooks=[Keep()])
    step = captured_of(runner)
    seen = []
    original = step.__class__.__call__

    def call(self, batch, iteration):
        done = original(self, batch, iteration)
        if done is not None:
            seen.append((done[0]["scores"], done[0]["scores"].clone(), done[0]["name"]))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudagraph.CudaGraphStep, "__call__", call)
        runner.run([[vectors(number) for number in range(4)]], [("train", 1)])
    assert backend.num_replays > 4
    assert all(torch.equal(scores, then) and name == "x" for scores, then, name in seen)
    assert not torch.equal(seen[-1][0], seen[-2][0])


@pytest.mark.parametrize("name", ["mlp", "depthwise", "lstm", "gpt"])
def test_an_iteration_of_the_graph_recipe_can_be_captured(name, backend, monkeypatch):
    """Other than the operations of ``fused``, reads for the log and checkpoints are no reason there."""
    interpret_captured(monkeypatch)
    family, iters = ZOO[name], FIRST + 4
    runner, losses = train(family, None, iters, step=dict(recipe="cudagraph", captures="graph"), ema=1)
    assert backend.num_replays >= 3, captured_of(runner).explain()
    assert losses == pytest.approx(train(family, "eager", iters, ema=1)[1], rel=family.rtol)


def test_compiled_modules_can_be_captured(backend, monkeypatch):
    """With a compiler that runs modules as they are: which step is captured, not what it compiles to."""
    interpret_halves(monkeypatch)
    torch._dynamo.reset()
    step = dict(recipe="cudagraph", captures="compile", modules=["body"])
    runner, losses = train(replace(MLP, model=Net), None, FIRST + 4, step=step)
    assert runner.step._compiled.compiled == ("body",)
    assert runner.step._compiled._num_ready == 1
    assert backend.num_replays > 0
    assert losses == pytest.approx(train(replace(MLP, model=Net), "eager", FIRST + 4)[1], rel=1e-4)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_resume_has_the_bits_of_the_run_that_was_not_stopped(optimizer, backend, tmp_path):
    family = replace(MLP, model=Net, optimizer=optimizer)
    batches = [vectors(number) for number in range(30)]
    whole, losses = make(family, "cudagraph", 30)
    whole.register_checkpoint_hook(dict(interval=17, by_epoch=False))
    whole.run([batches], [("train", 1)])
    resumed, rest = make(family, "cudagraph", 30, seed=99)
    resumed.resume("out/iter_17.pth")
    resumed.run([batches], [("train", 1)])
    assert captured_of(resumed).num_calls > 0
    assert rest.losses == losses.losses[17:]
    for key, value in state_of(whole).items():
        assert torch.equal(state_of(resumed)[key], value), key


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_updates_that_are_not_finite_are_skipped_on_the_device(kind, backend):
    """As the optimizer itself does: weights, state and counters stay, whichever iteration it is."""
    bad = [6, 12, 13]  # of a warm-up, and of replays
    batches = [vectors(number) for number in range(18)]
    for number in bad:
        batches[number]["x"][0, 0] = float("inf")
    family = replace(MLP, optimizer=lambda params: kind(params, lr=1e-2, skip_nonfinite=True))
    runner, _ = train(family, "cudagraph", 18, batches)
    assert captured_of(runner).num_calls > 5
    eager, _ = train(family, "eager", 18, batches)
    ours, theirs = state_of(runner), state_of(eager)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key].float(), value.float(), rtol=1e-4, atol=1e-5, msg=key)
        if key.endswith(" step"):
            assert int(ours[key]) == 15


def test_tensors_of_the_host_among_the_outputs_are_a_reason(backend):
    class Host(Net):
        def train_step(self, batch, optimizer=None, **kwargs):
            outputs = super().train_step(batch)
            return {**outputs, "log_vars": {"loss": outputs["loss"].detach(), "count": torch.ones((), device="meta")}}

    model = Host()
    captured = cudagraph.Captured(
        backend, lambda batch: (Outputs(model.train_step(batch)), None), None, None, vectors(0)
    )
    with pytest.raises(Unfit, match="a tensor of the host"):
        captured.warm_up(list(vectors(0).values()))


def test_auto_takes_it_where_the_model_is_on_a_gpu_and_the_device_waits(monkeypatch):
    backend = on_stand_in(monkeypatch, clock=Clock([Cost(1.0, 0.5)]))
    runner, losses = train(replace(MLP, model=Net), "auto", FIRST + 4)
    assert captured_of(runner).num_calls == backend.num_replays - 2 > 0  # two replays were compared with eager
    assert losses == pytest.approx(train(replace(MLP, model=Net), "eager", FIRST + 4)[1], rel=1e-4)
    on_stand_in(monkeypatch, clock=Clock([Cost(1.0, 0.99)]))
    runner, losses = train(replace(MLP, model=Net), "auto", FIRST + 4)
    assert captured_of(runner).num_calls == 0
    assert "it would not pay" in runner.step.explain()[-1]


def test_without_a_gpu_it_runs_on_the_recipe_below_and_says_so_once(caplog):
    runner, losses = train(MLP, "cudagraph", 5)
    assert len([r for r in caplog.records if "CUDA graphs are a GPU's" in r.getMessage()]) == 1
    assert "not cudagraph: the model is on the CPU, and CUDA graphs are a GPU's" in runner.step.explain()
    assert losses == train(MLP, "fused", 5)[1]


def test_a_hook_that_looks_at_gradients_makes_its_iterations_run_below(backend):
    seen = []

    class Looks(Hook):
        def due(self, runner):
            return runner.iter + 3 - runner.iter % 3

        def after_train_iter(self, runner):
            seen.append(all(p.grad is not None for p in runner.model.parameters()))

    runner, _ = train(replace(MLP, model=Net), "cudagraph", 24, hooks=[Looks()])
    assert seen
    assert all(seen)
    assert captured_of(runner).num_calls > 0


def test_an_old_loss_that_goes_back_through_overwritten_weights_fails_as_in_torch(backend):
    runner, _ = train(replace(MLP, model=Net), "cudagraph", 10)
    step, batch = captured_of(runner), vectors(3)
    loss = runner.model.train_step(batch)["loss"]
    assert step(batch, 10) is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
