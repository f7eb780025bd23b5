"""Recipe aot: graphs trade places with libraries; what cannot be one stays a graph, with one warning.

One library is compiled for the whole session, as the recipe's own process does it; runs find it in a cache folder of
their own. The graphs beside it are interpreted.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from step.runs import graph_of, interpret, make, state_of, train
from step.test_graph import Acts, replace_weight, write_lr
from step.zoo import ZOO, vectors
from torch.utils import _pytree as pytree

from fastrunner.step import aot, aot_cache, auto
from fastrunner.step.background import Job, whole_order
from fastrunner.step.binding import Binding
from fastrunner.step.torch_private import Unfit
from fastrunner.step.trace import trace_step

pytestmark = pytest.mark.timeout(600)  # the first test that needs the library waits until it is compiled
WITHOUT_C = ("recommender",)  # aten::_embedding_bag_backward
MLP = ZOO["mlp"]
HAND_WRITTEN = Path(__file__).resolve().parents[1] / "core" / "aot_library.c"


class Never:
    def __init__(self, *args, **kwargs):
        raise AssertionError("nothing should be compiled")


def compile_family(family, averages=False):
    """The library of a family's graph, by the recipe's own process, into the cache at hand."""
    torch.manual_seed(0)
    model = family.model()
    optimizer = family.optimizer(model.parameters())
    batch = family.batch(0)
    model.train_step(batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    binding = Binding(model, optimizer)
    traced = trace_step(binding, batch, family.clip)
    args = [*binding.static, *(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor))]
    job = Job(whole_order(traced.graph, args, aot_cache.key_of(traced.graph, args)))
    while (why := job.poll()) is None:
        time.sleep(0.1)
    assert why == ""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A cache folder with the library of the MLP."""
    folder = tmp_path_factory.mktemp("cache")
    mode, threads, cache = (
        torch.get_deterministic_debug_mode(),
        torch.get_num_threads(),
        os.environ.get("FASTRUNNER_CACHE"),
    )
    torch.set_deterministic_debug_mode("warn")  # as every test does: the key contains it
    torch.set_num_threads(1)
    os.environ["FASTRUNNER_CACHE"] = str(folder)
    try:
        compile_family(MLP)
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.set_num_threads(threads)
        os.environ.pop("FASTRUNNER_CACHE")
        if cache is not None:
            os.environ["FASTRUNNER_CACHE"] = cache
    (library,) = (folder / "aot").iterdir()
    return library


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and graphs that are interpreted."""
    if "inductor_cache" in os.environ.get("PYTEST_CURRENT_TEST", ""):
        return None
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "aot").mkdir(parents=True, mode=0o700)
    interpret(monkeypatch)
    monkeypatch.setattr(aot, "LOOK_S", 0.0)
    return tmp_path / "cache" / "aot"


@pytest.fixture
def cached(cache, compiled, monkeypatch):
    """The library is in the cache, and nothing else may be compiled."""
    monkeypatch.setattr(aot, "Job", Never)
    return Path(shutil.copy(compiled, cache))


class FakeJob:
    """Is ready after some looks; then it has put a library into the cache."""

    def __init__(self, polls=6, result="", library=None, cache=None):
        self.left, self.result, self.library, self.cache, self.names, self.closed = polls, result, library, cache, [], 0

    def __call__(self, order):
        self.names.append(order["ahead"])
        return self

    def poll(self):
        self.left -= 1
        if self.left > 0:
            return None
        if self.library is not None:
            shutil.copy(self.library, self.cache)
        return self.result

    def close(self):
        self.closed += 1


def warned(caplog):
    return [r.getMessage() for r in caplog.records if "not compiled ahead of time" in r.getMessage()]


def test_a_library_from_the_cache_trains_from_the_first_graph_on(cached):
    runner, losses = train(MLP, "aot", 24)
    graph = graph_of(runner)
    assert (graph.num_ahead, graph.num_calls) == (22, 22)  # all but the first look, and the run's last iteration
    assert "22 of the iterations ahead of time, without Python" in graph.explain()
    eager, wanted = train(MLP, "eager", 24)
    assert losses == pytest.approx(wanted, rel=1e-5)  # dropout too: it draws from torch's generator
    ours, eagers = state_of(runner), state_of(eager)
    for name, value in eagers.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
        assert not name.endswith(" step") or torch.equal(ours[name], value)


def test_a_library_takes_over_between_two_iterations(cache, compiled, monkeypatch, caplog):
    job = FakeJob(8, library=compiled, cache=cache)
    monkeypatch.setattr(aot, "Job", job)
    runner, losses = train(MLP, "aot", 24)
    graph = graph_of(runner)
    assert job.names == [compiled.name.split("-")[0]]
    assert 0 < graph.num_ahead < graph.num_calls == 22
    assert losses == pytest.approx(train(MLP, "eager", 24)[1], rel=1e-5)
    assert warned(caplog) == []


@pytest.mark.parametrize("why", ["the compiling process died of signal 9", "compiling took longer than 1800 s", "full"])
def test_a_compile_that_fails_leaves_the_graph(why, monkeypatch, caplog):
    monkeypatch.setattr(aot, "Job", FakeJob(3, why))
    runner, losses = train(MLP, "aot", 16)
    graph = graph_of(runner)
    assert (graph.num_ahead, graph.num_calls) == (0, 14)
    assert f"not ahead of time: {why}" in graph.explain()
    assert [why in text for text in warned(caplog)] == [True]
    assert losses == train(MLP, "graph", 16)[1]


def test_no_space_for_the_order_leaves_the_graph(monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aot, "Job", full)
    runner, losses = train(MLP, "aot", 12)
    assert graph_of(runner).num_calls == 10
    assert ["No space left" in text for text in warned(caplog)] == [True]
    assert losses == train(MLP, "graph", 12)[1]


def test_a_library_that_is_gone_when_it_is_looked_for(monkeypatch, caplog):
    monkeypatch.setattr(aot, "Job", FakeJob(3))  # says that it is done, and left nothing
    runner, _ = train(MLP, "aot", 12)
    assert graph_of(runner).num_ahead == 0
    assert ["not in the cache any more" in text for text in warned(caplog)] == [True]


@pytest.mark.parametrize("harm", ["flip", "half", "empty"])
def test_a_damaged_file_is_not_loaded_but_made_again(harm, cached, compiled, cache, monkeypatch, caplog):
    contents = bytearray(cached.read_bytes())
    contents[len(contents) // 2] ^= 1
    cached.write_bytes({"flip": contents, "half": contents[: len(contents) // 2], "empty": b""}[harm])
    job = FakeJob(4, library=compiled, cache=cache)
    monkeypatch.setattr(aot, "Job", job)
    runner, losses = train(MLP, "aot", 16)
    assert len(job.names) == 1
    assert graph_of(runner).num_ahead > 0
    assert warned(caplog) == []
    assert losses == pytest.approx(train(MLP, "eager", 16)[1], rel=1e-5)


def test_a_foreign_library_under_the_right_name_is_refused(cached, compiled, monkeypatch, caplog):
    """It has the right name for its contents, and takes other tensors."""
    from core.test_aot_step import build

    cached.unlink()
    foreign = aot_cache.put(compiled.name.split("-")[0], Path(build(cached.parent.parent)))
    runner, losses = train(MLP, "aot", 12)
    assert (graph_of(runner).num_ahead, graph_of(runner).num_calls) == (0, 10)
    assert ["takes 3 tensors" in text for text in warned(caplog)] == [True]
    assert not foreign.exists()
    assert losses == train(MLP, "graph", 12)[1]


class WrongRun(aot.AotRun):
    """A library that forgets to write one parameter."""

    def __call__(self, inputs):
        kept = inputs[0].clone()
        values = super().__call__(inputs)
        inputs[0].copy_(kept)
        for tensor in inputs[: self._num_static]:
            if tensor.shape == kept.shape:
                tensor.copy_(kept)
        return values


@pytest.mark.parametrize("from_cache", [True, False])
def test_a_library_that_is_wrong_is_refused(from_cache, cached, compiled, cache, monkeypatch, caplog):
    monkeypatch.setattr(aot, "AotRun", WrongRun)
    if not from_cache:
        cached.unlink()
        monkeypatch.setattr(aot, "Job", FakeJob(3, library=compiled, cache=cache))
    runner, losses = train(MLP, "aot", 12)
    assert (graph_of(runner).num_ahead, graph_of(runner).num_calls) == (0, 10)
    assert ["differs from eager's" in text for text in warned(caplog)] == [True]
    assert list(cache.glob("*.so")) == []
    assert losses == train(MLP, "graph", 12)[1]


def test_a_run_that_has_diverged_leaves_the_library_to_others(cached):
    """Of NaN nothing can be verified, right or wrong: this run has no library, and the next one finds it there."""
    runner, _ = make(MLP, "aot", 12)
    with torch.no_grad():
        next(runner.model.parameters()).fill_(torch.nan)
    runner.run([[MLP.batch(number) for number in range(4)]], [("train", 1)])
    assert runner.iter == 12
    assert cached.exists()
    assert graph_of(train(MLP, "aot", 12)[0]).num_ahead == 10


@pytest.mark.parametrize("act", [replace_weight, write_lr])
def test_what_a_hook_changes_counts_from_the_next_step_on(act, cached):
    runner, losses = train(MLP, "aot", 12, hooks=[Acts(act)])
    assert graph_of(runner).num_ahead >= 8
    assert losses == pytest.approx(train(MLP, "eager", 12, hooks=[Acts(act)])[1], rel=1e-5)


def test_another_number_of_threads_is_another_library(cached, monkeypatch):
    job = FakeJob(100)
    monkeypatch.setattr(aot, "Job", job)
    runner, losses = train(MLP, "aot", 16, hooks=[Acts(lambda runner: torch.set_num_threads(2), 6)])
    torch.set_num_threads(1)
    graph = graph_of(runner)
    assert len(job.names) == 1
    assert cached.name.split("-")[0] not in job.names
    assert 0 < graph.num_ahead < graph.num_calls
    assert losses == pytest.approx(train(MLP, "eager", 16)[1], rel=1e-5)


def test_nested_batches_and_metas_take_the_same_library(cached):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MLP.model()

        def train_step(self, batch, optimizer=None, **kwargs):
            return self.inner.train_step(batch["data"], optimizer)

    family = replace(MLP, model=Nested, batch=lambda number: dict(data=vectors(number), name="same"))
    runner, losses = train(family, "aot", 12)
    assert (graph_of(runner).num_ahead, graph_of(runner).num_calls) == (10, 10)
    assert losses == pytest.approx(train(family, "eager", 12)[1], rel=1e-5)


def test_a_second_shape_runs_as_a_graph_until_its_own_library_is_there(cached, monkeypatch):
    job = FakeJob(10**6)
    monkeypatch.setattr(aot, "Job", job)
    odd = [vectors(0), vectors(1), vectors(2, size=5)]
    runner, losses = train(MLP, "aot", 18, batches=odd)
    graph = graph_of(runner)
    assert len(job.names) == 1
    assert 8 <= graph.num_ahead < graph.num_calls
    assert losses == pytest.approx(train(MLP, "eager", 18, batches=odd)[1], rel=1e-5)
    assert job.closed == 1  # the end of the run ends the compile


def test_batches_that_take_turns_each_have_their_library(cached, monkeypatch):
    """A dict and a list: two kinds of batches, two graphs, and the same tensors, so that one library serves both."""
    kinds = [vectors(0), list(vectors(1).values()), vectors(2), list(vectors(3).values())]

    class Both(type(MLP.model())):
        def train_step(self, batch, optimizer=None, **kwargs):
            named = batch if isinstance(batch, dict) else dict(zip("xy", batch, strict=True))
            return super().train_step(named, optimizer)

    def model():
        made = MLP.model()
        made.__class__ = Both
        return made

    family = replace(MLP, model=model)
    runner, losses = train(family, "aot", 24, batches=kinds)
    graph = graph_of(runner)
    assert len(graph._bound[0]) == 2
    assert graph.num_ahead > 15
    assert losses == pytest.approx(train(family, "eager", 24, batches=kinds)[1], rel=1e-5)


def test_the_next_run_begins_the_compile_again(cache, compiled, monkeypatch):
    job = FakeJob(10**6, library=compiled, cache=cache)
    monkeypatch.setattr(aot, "Job", job)
    runner, _ = make(MLP, "aot", 8)
    data = [[vectors(i) for i in range(4)]]
    runner.run(data, [("train", 1)])
    assert (len(job.names), job.closed) == (1, 1)
    runner._max_iters, job.left = 20, 3
    runner.run(data, [("train", 1)])
    assert len(job.names) == 2
    assert graph_of(runner).num_ahead > 0


def test_a_step_that_fails_says_what_the_library_says(cached, monkeypatch):
    class Failing(aot.AotStep):
        def __call__(self, batch):
            raise RuntimeError("the library's words")

    runner, _ = make(MLP, "aot", 20, hooks=[Acts(lambda runner: monkeypatch.setattr(aot, "AotStep", Failing), 6)])
    runner.register_hook(Acts(replace_weight, 7))  # bound anew
    with pytest.raises(RuntimeError, match="the library's words"):
        runner.run([[vectors(i) for i in range(4)]], [("train", 1)])


def test_an_average_that_is_taken_in_some_iterations_only(cached, monkeypatch):
    """Two graphs: the one with the average is not in the cache."""
    monkeypatch.setattr(aot, "Job", FakeJob(10**6))
    runner, losses = train(MLP, "aot", 20, ema=3)
    graph = graph_of(runner)
    assert len(graph._graphs) == 2
    assert losses == pytest.approx(train(MLP, "eager", 20, ema=3)[1], rel=1e-5)


def test_a_torch_without_what_is_needed_runs_graphs(monkeypatch, caplog):
    monkeypatch.setattr(aot, "Job", Never)
    monkeypatch.setattr(aot, "ahead_missing", lambda: "torch has no aot_compile")
    runner, _ = train(MLP, "aot", 10)
    assert graph_of(runner).num_calls == 8
    assert ["torch has no aot_compile" in text for text in warned(caplog)] == [True]


class ReadyJob:
    """What ``auto`` compiles is there at once."""

    def __init__(self, order):
        pass

    def poll(self):
        return ""

    def close(self):
        pass


@pytest.mark.parametrize(("short", "gain"), [(1.0, -1e9), (0.0, -1e9), (1.0, 1.0)])
def test_auto_makes_libraries_of_short_graphs_and_takes_them_where_they_pay(
    short, gain, cache, compiled, monkeypatch, caplog
):
    """Graphs are interpreted, libraries are not: ``gain`` decides for both, until the graph is taken."""
    job = FakeJob(4, library=compiled, cache=cache)
    monkeypatch.setattr(aot, "Job", job)
    monkeypatch.setattr(auto, "Job", ReadyJob)
    monkeypatch.setattr(auto, "GAIN", -1e9)
    monkeypatch.setattr(aot, "SHORT_S", short)
    hooks = [Acts(lambda runner: monkeypatch.setattr(auto, "GAIN", gain), 10)]
    runner, losses = train(MLP, "auto", 40, hooks=hooks)
    graph = graph_of(runner)
    assert graph.num_calls > 20
    assert len(job.names) == (1 if short else 0)
    assert (graph.num_ahead > 10) == (short > 0 and gain < 0)
    assert any("it would not pay" in line for line in runner.step.explain()) == (gain > 0)
    assert warned(caplog) == []
    assert losses == pytest.approx(train(MLP, "eager", 40)[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name, family in ZOO.items() if not family.below and name not in WITHOUT_C])
def test_families_have_libraries_that_compute_the_same(name, inductor_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRUNNER_CACHE", str(tmp_path / "libraries"))
    family = ZOO[name]
    compile_family(family)
    monkeypatch.setattr(aot, "Job", Never)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner, losses = train(family, "aot", 20)
    graph = graph_of(runner)
    assert graph.num_ahead == graph.num_calls == 18, graph.explain()
    assert losses == pytest.approx(train(family, "eager", 20)[1], rel=family.rtol)


class Sorts(torch.nn.Module):
    """Has an operation that no C function is for."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 10)

    def train_step(self, batch, optimizer=None, **kwargs):
        scores = self.layer(batch["x"])
        loss = torch.linalg.svdvals(scores).sum()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_operation_without_a_c_function_is_named(monkeypatch, caplog):
    with pytest.raises(AssertionError, match=r"svd.* has no C interface"):
        compile_family(replace(MLP, model=Sorts, clip=None))


def test_unfit_is_what_the_compiling_process_ends_with(monkeypatch, tmp_path):
    import pickle

    from fastrunner.step import background

    def refuse(*args):
        raise Unfit("aten::_linalg_svd has no C interface")

    monkeypatch.setattr(background, "compile_ahead", refuse)
    monkeypatch.setattr(background, "graph_of_bytes", lambda data: data)
    monkeypatch.setattr(background.os, "nice", lambda by: None)
    order = tmp_path / "order.pkl"
    order.write_bytes(pickle.dumps(dict(whole=b"", args=[], settings=aot_cache.settings(), ahead="key")))
    with pytest.raises(SystemExit, match="aten::_linalg_svd has no C interface"):
        background.main(str(order))


def test_bursts_leave_what_single_calls_leave(cached, monkeypatch):
    """Losses, weights, state and torch's generator, to the bit; dropout, AdamW's counters and a warm-up among them."""
    data, ends = [MLP.batch(number) for number in range(20)], []
    for why in ("for comparison", None):
        monkeypatch.setattr(aot.AotGraphStep, "why_single", why)
        runner, losses = train(MLP, "aot", 90, batches=data, log_interval=25)
        ends.append((losses, state_of(runner), torch.get_rng_state(), graph_of(runner).num_ahead))
    assert runner.current_plan().bursts.num_iters > 60
    (losses, state, generator, ahead), burst = ends[0], ends[1]
    assert (losses, ahead) == (burst[0], burst[3])
    assert all(torch.equal(value, burst[1][name]) for name, value in state.items())
    assert torch.equal(generator, burst[2])


class UpTo:
    """Batches that stop a run after ``count`` iterations; no list, so that they are taken one by one."""

    def __init__(self, batches, count, runner):
        self.batches, self.left, self.runner = batches, count, runner

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.left -= 1
            if self.left == 0:
                self.runner.stop("enough")
            yield batch


@pytest.mark.parametrize("after_us", [1, 150, 600])
def test_ctrl_c_in_a_burst_counts_what_the_core_has_done(after_us, cached, monkeypatch):
    """The signal comes while no Python runs; its handler runs when the burst is over, and by then all is counted."""
    data = [MLP.batch(number) for number in range(300)]
    many = aot.AotGraphStep.many

    def armed(step, iteration):
        if iteration >= 100:
            signal.setitimer(signal.ITIMER_REAL, after_us / 1e6)
        return many(step, iteration)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(aot.AotGraphStep, "many", armed)
    before = signal.signal(signal.SIGALRM, interrupt)
    runner, _ = make(MLP, "aot", 10**6)
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run([data], [("train", 1)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (place,) = runner.loader_states()
    assert 300 * place["epoch"] + place["position"] == runner.iter
    assert runner.iter >= 100
    assert len(runner.log_buffer.val_history["loss"]) == runner.iter
    other, _ = make(MLP, "aot", 10**6)
    other.run([UpTo(data, runner.iter, other)], [("train", 1)])
    assert other.iter == runner.iter
    ours, others = state_of(runner), state_of(other)
    assert all(torch.equal(value, others[name]) for name, value in ours.items())
