"""EvalHook and DistEvalHook: what was decided differently from mmcv, resuming, other loaders, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runner.helpers import TinyModel, batches
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastrunner import (
    ClosureHook,
    Digits,
    DistEvalHook,
    EMAHook,
    EpochBasedRunner,
    EvalHook,
    FusedSGD,
    Hook,
    IterBasedRunner,
    Photos,
    build_dataloader,
    supervised,
)
from fastrunner.engine import collect_results_cpu, multi_gpu_test, single_gpu_test

KINDS = [EpochBasedRunner, IterBasedRunner]


class Dropout(TinyModel):
    """Draws random numbers in training, and gives one result a sample in testing."""

    def train_step(self, data_batch, optimizer=None, **kwargs):
        return super().train_step(nn.functional.dropout(data_batch, 0.5, training=self.training))

    def test_step(self, data_batch):
        return list(self.layer(data_batch))


def scores(values, seen=None):
    """An ``evaluate`` that gives one after the other."""
    given = iter(values)

    def evaluate(results, **kwargs):
        if seen is not None:
            seen.append(len(results))
        return dict(acc=next(given))

    return evaluate


def make(kind, hook=None, priority="LOW", length=6, work_dir="out", log=2, **checkpoint):
    torch.manual_seed(0)
    model = Dropout()
    limit = dict(max_epochs=length) if kind is EpochBasedRunner else dict(max_iters=length)
    runner = kind(model, optimizer=FusedSGD(model.parameters(), lr=0.1), work_dir=work_dir, **limit)
    by_epoch = kind is EpochBasedRunner
    runner.register_training_hooks(
        dict(policy="fixed"),
        {},
        dict(by_epoch=by_epoch, **checkpoint) if checkpoint else None,
        dict(interval=log, hooks=[dict(type="TextLoggerHook", by_epoch=by_epoch)]),
    )
    if hook is not None:
        runner.register_hook(hook, priority)
    return runner


def records(work_dir="out"):
    (path,) = Path(work_dir).glob("*.log.json")
    return [record for record in map(json.loads, path.read_text().splitlines()) if "mode" in record]


def best_files(work_dir="out"):
    return sorted(path.name for path in Path(work_dir).glob("best*"))


# Decisions.


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_of_zero_can_be_the_best(kind):
    by_epoch = kind is EpochBasedRunner
    hook = EvalHook(batches(2), by_epoch=by_epoch, save_best="acc", evaluate=scores([-1.0, 0.0, -2.0]))
    runner = make(kind, hook, length=3)
    runner.run([batches(2)], [("train", 1)])
    assert runner.meta["hook_msgs"]["best_score"] == 0.0
    assert best_files() == [f"best_acc_{'epoch' if by_epoch else 'iter'}_2.pth"]


def test_nan_is_never_the_best_and_numbers_of_other_types_are():
    values = [float("nan"), torch.tensor(1.0), float("nan"), torch.tensor(2.5)]
    runner = make(EpochBasedRunner, EvalHook(batches(1), save_best="acc", evaluate=scores(values)), length=4)
    runner.run([batches(2)], [("train", 1)])
    assert best_files() == ["best_acc_epoch_4.pth"]
    assert type(torch.load("out/best_acc_epoch_4.pth")["meta"]["hook_msgs"]["best_score"]) is float


@pytest.mark.parametrize("priority", ["NORMAL", "LOW"])  # before and after the timer
@pytest.mark.parametrize("log", [1, 2, 3])
def test_an_evaluation_that_meets_a_log_is_logged_beside_it(priority, log):
    """mmcv: at NORMAL it ends with KeyError 'data_time'; at LOW, what was gathered since the last log is forgotten."""
    losses = []
    hook = EvalHook(batches(1), interval=2, by_epoch=False, evaluate=scores([0.1, 0.2, 0.3]))
    runner = make(IterBasedRunner, hook, priority, log=log)
    runner.register_hook(ClosureHook("after_train_iter", lambda r: losses.append(r.outputs["loss"].item())))
    runner.run([batches(3)], [("train", 1)])
    train = {r["iter"]: r["loss"] for r in records() if r["mode"] == "train"}
    assert train == {
        end: pytest.approx(sum(losses[end - log : end]) / log, abs=1e-5)  # records have 5 digits
        for end in range(log, 7, log)
    }
    assert [(r["iter"], r["acc"]) for r in records() if r["mode"] == "val"] == [(1, 0.1), (1, 0.2), (1, 0.3)]
    assert all({"data_time", "time"} <= r.keys() for r in records()[2 if log == 1 else 1 :] if r["mode"] == "train")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "interval", "evaluated"), [(0, 2, [0, 2, 4, 6]), (0, 4, [0, 4]), (1, 2, [1, 3, 5])])
def test_before_training_it_evaluates_whatever_the_interval_and_logs_it(kind, start, interval, evaluated):
    by_epoch = kind is EpochBasedRunner
    unit = "epoch" if by_epoch else "iter"
    hook = EvalHook(batches(1), start, interval, by_epoch, save_best="acc", evaluate=scores(range(1, 9)))
    at = []
    make_name = EvalHook._save_ckpt
    hook._save_ckpt = lambda runner, score: (at.append(hook._done(runner)), make_name(hook, runner, score))
    make(kind, hook).run([batches(2)], [("train", 1)])
    assert at == evaluated
    assert best_files() == [f"best_acc_{unit}_{evaluated[-1]}.pth"]
    logged = [r["acc"] for r in records() if r["mode"] == "val"]
    assert logged == list(range(1, len(evaluated) + 1))
    if by_epoch:
        assert [r["epoch"] for r in records() if r["mode"] == "val"] == evaluated


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_with_evaluations(kind):
    """Their random numbers, their modes and their averages are gone when they are over."""

    def go(work_dir, *hooks):
        runner = make(kind, work_dir=work_dir)
        for hook in hooks:
            runner.register_hook(hook, "LOW")
        modes = []
        runner.register_hook(ClosureHook("before_train_iter", lambda r: modes.append(r.model.training)))
        runner.run([batches(3)], [("train", 1)])
        assert all(modes)
        return [p.tolist() for p in runner.model.parameters()]

    loader = DataLoader([torch.ones(2)] * 3, shuffle=True)  # draws a seed, and an order
    units = (True, False) if kind is EpochBasedRunner else (False,)
    noisy = [EvalHook(loader, by_epoch=unit, evaluate=lambda r: dict(acc=torch.rand(1).item())) for unit in units]
    assert go("with", *noisy) == go("without")


def test_modes_of_single_modules_are_kept():
    runner = make(EpochBasedRunner, EvalHook(batches(1), by_epoch=False, evaluate=lambda r: {}), length=1)
    seen = []

    class Freeze(Hook):
        def before_train_iter(self, runner):
            runner.model.layer.eval()

        def after_train_iter(self, runner):
            seen.append((runner.model.training, runner.model.layer.training))

    runner.register_hook(Freeze(), "LOWEST")
    runner.run([batches(2)], [("train", 1)])
    assert seen == [(True, False)] * 2


@pytest.mark.parametrize(
    ("kind", "by_epoch"), [(EpochBasedRunner, True), (EpochBasedRunner, False), (IterBasedRunner, False)]
)
def test_averages_are_evaluated_and_saved(kind, by_epoch):
    seen = []
    hook = EvalHook(batches(1), by_epoch=by_epoch, save_best="acc", evaluate=scores(range(1, 99)),
                    test_fn=lambda model, loader: seen.append(model.layer.weight.clone()) or [0])  # fmt: skip
    runner = make(kind, hook, length=3)
    runner.register_hook(EMAHook(momentum=0.1), 45)
    averages = []
    stage = "after_train_epoch" if by_epoch else "after_train_iter"
    name = "layer.weight" if by_epoch else "ema_layer_weight"  # swapped already, at an epoch's end
    runner.register_hook(ClosureHook(stage, lambda r: averages.append(r.model.state_dict()[name].clone())), "LOW")
    runner.run([batches(2)], [("train", 1)])
    assert len(seen) == len(averages) > 2
    assert all(map(torch.equal, seen, averages))
    (best,) = best_files()
    assert torch.equal(torch.load(f"out/{best}")["state_dict"]["layer.weight"], seen[-1])


# When.


@pytest.mark.parametrize("plan", ["on", "off"])
def test_dynamic_intervals(plan, monkeypatch):
    """Every 4 iterations, from iteration 6 on every 3, from 13 on every 1."""
    monkeypatch.setenv("FASTRUNNER_PLAN", plan)
    at = []
    hook = EvalHook(
        batches(1), interval=4, by_epoch=False, dynamic_intervals=[(6, 3), (13, 1)],
        evaluate=lambda results: at.append(runner.iter + 1) or dict(acc=0.5),
    )  # fmt: skip
    runner = make(IterBasedRunner, hook, length=16)
    runner.run([batches(3)], [("train", 1)])
    assert at == [4, 6, 9, 12, 13, 14, 15, 16]


def test_dynamic_intervals_by_epoch():
    at = []
    hook = EvalHook(
        batches(1), interval=2, dynamic_intervals=[(5, 1)],
        evaluate=lambda results: at.append(runner.epoch + 1) or dict(acc=0.5),
    )  # fmt: skip
    runner = make(EpochBasedRunner, hook, length=7)
    runner.run([batches(1)], [("train", 1)])
    assert at == [2, 4, 5, 6, 7]


@pytest.mark.parametrize("start", [None, 0, 3, 7])
@pytest.mark.parametrize("interval", [1, 3, 5])
@pytest.mark.parametrize("dynamic", [None, [(4, 2)], [(2, 5), (9, 1)]])
def test_due_is_when_it_evaluates(start, interval, dynamic):
    """From every iteration on, ``due`` names the first one that it would evaluate at, or one before."""
    hook = EvalHook([0], start, interval, False, evaluate=len, dynamic_intervals=dynamic)
    hook.initial_flag = False

    class At:
        iter = 0

    for At.iter in range(20):
        due, now = hook.due(At), At.iter
        true = next(i for i in range(now, 100) if hook._is_due(i))
        assert now <= due <= true
        assert due == true or dynamic  # at a milestone it is asked again


def test_an_idle_hook_is_not_called(monkeypatch):
    calls = []
    inner = EvalHook.after_train_iter
    monkeypatch.setattr(EvalHook, "after_train_iter", lambda self, r: (calls.append(r.iter), inner(self, r))[1])
    runner = make(IterBasedRunner, EvalHook(batches(1), interval=4, by_epoch=False, evaluate=lambda r: {}), log=100)
    runner.run([batches(3)], [("train", 1)])
    assert 3 in calls
    assert len(calls) <= 2  # the first iteration, when a plan is made, and the one that is due


# Resuming.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("priority", [41, "LOW"])  # before CheckpointHook, and after it
def test_best_score_and_file_survive_a_resume(kind, at, priority):
    """Also where the checkpoint was written just before the evaluation: it is done again."""
    by_epoch = kind is EpochBasedRunner
    unit = "epoch" if by_epoch else "iter"
    table = dict(enumerate([0.0, 0.3, 0.1, 0.8, 0.2, 0.8, 0.5]))
    at_hand = {}

    def evaluate(results):
        done = at_hand["hook"]._done(at_hand["runner"])
        return dict(acc=table[done])

    def go(work_dir, resume=None):
        hook = EvalHook(batches(1), by_epoch=by_epoch, save_best="acc", evaluate=evaluate)
        runner = make(kind, hook, priority, work_dir=work_dir, interval=1)
        at_hand.update(hook=hook, runner=runner)
        if resume:
            runner.resume(resume)
        runner.run([batches(2)], [("train", 1)])
        return runner

    whole = go("whole")
    assert best_files("whole") == [f"best_acc_{unit}_3.pth"]
    whole_best = torch.load(f"whole/best_acc_{unit}_3.pth")
    again = go("again", f"whole/{unit}_{at}.pth")
    assert again.meta["hook_msgs"]["best_score"] == 0.8
    assert Path(again.meta["hook_msgs"]["best_ckpt"]).name == f"best_acc_{unit}_3.pth"
    if at <= 2 or (at == 3 and priority == "LOW"):
        assert best_files("again") == [f"best_acc_{unit}_3.pth"]
        best = torch.load(f"again/best_acc_{unit}_3.pth")
        assert torch.equal(best["state_dict"]["layer.weight"], whole_best["state_dict"]["layer.weight"])
        assert best["resume"]["counters"] == whole_best["resume"]["counters"]
    assert [p.tolist() for p in again.model.parameters()] == [p.tolist() for p in whole.model.parameters()]


def test_what_was_evaluated_before_a_resume_is_not_evaluated_again():
    seen = []
    hook = EvalHook(batches(1), start=1, evaluate=scores(range(9), seen))
    make(EpochBasedRunner, hook, 41, length=3, interval=1).run([batches(1)], [("train", 1)])
    assert len(seen) == 3
    hook = EvalHook(batches(1), start=1, evaluate=scores(range(9), seen))
    again = make(EpochBasedRunner, hook, 41, length=3, interval=1, work_dir="again")
    again.resume("out/epoch_2.pth")
    again.run([batches(1)], [("train", 1)])
    assert len(seen) == 4


# Loaders, test functions, evaluations.


def test_digits_with_our_loader_and_the_data_sets_own_evaluation():
    model = supervised(nn.Sequential(nn.Flatten(), Scaled(), nn.Linear(64, 10)), nn.CrossEntropyLoss())
    runner = EpochBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.5), work_dir="out", max_epochs=2)
    runner.register_training_hooks(
        dict(policy="fixed"), {}, None, dict(interval=10, hooks=[dict(type="TextLoggerHook")])
    )
    hook = EvalHook(build_dataloader(Digits("val"), 50, 0, shuffle=False), save_best="auto")
    runner.register_hook(hook, "LOW")
    runner.run([build_dataloader(Digits("train"), 64, 0)], [("train", 1)])
    val = [r for r in records() if r["mode"] == "val"]
    assert val[-1]["acc"] > 0.8  # chance is 0.1
    data = Digits("val")
    right = (model(data.images).argmax(1) == data.labels).double().mean().item()
    assert val[-1]["acc"] == pytest.approx(right, abs=1e-5)  # records have 5 digits
    assert hook.key_indicator == "acc"


class Scaled(nn.Module):
    def forward(self, images):
        return images.float() / 255


def test_a_model_as_mmcvs_and_one_that_cannot_be_asked():
    class Mmcv(nn.Module):
        def forward(self, img, return_loss=True):
            assert not return_loss
            assert not self.training
            return [float(x) for x in img]

    data = [dict(img=torch.tensor([1.0, 2.0])), dict(img=torch.tensor([3.0]))]
    assert single_gpu_test(Mmcv(), data) == [1.0, 2.0, 3.0]
    with pytest.raises(TypeError, match=r"Linear has no test_step\(data_batch\), and a batch that is a Tensor"):
        single_gpu_test(nn.Linear(1, 1), [torch.ones(1, 1)])


def test_more_results_than_samples_are_padding():
    loader = DataLoader([torch.ones(2)] * 3, batch_size=2)
    assert len(multi_gpu_test(Dropout(), loader)) == 3
    assert collect_results_cpu([1, 2, 3], 2) == [1, 2]


def test_dist_eval_hook_in_one_process():
    hook = DistEvalHook(batches(2), save_best="acc", evaluate=scores([1.0, 2.0]))
    runner = make(EpochBasedRunner, hook, length=2)
    runner.run([batches(1)], [("train", 1)])
    assert best_files() == ["best_acc_epoch_2.pth"]
    assert not Path("out/.eval_hook").exists()


def test_a_projects_own_do_evaluate():
    """What nine of twelve projects do: the hook's ``_do_evaluate`` with a test function of theirs."""

    class CustomDistEvalHook(DistEvalHook):
        def _do_evaluate(self, runner):
            if not self._should_evaluate(runner):
                return
            runner.log_buffer.output["eval_iter_num"] = len(self.dataloader)
            key_score = self.evaluate(runner, ["theirs"])
            if self.save_best:
                self._save_ckpt(runner, key_score)

    seen = []
    hook = CustomDistEvalHook(batches(2), interval=2, save_best="acc", evaluate=scores([1.0, 2.0], seen))
    make(EpochBasedRunner, hook, length=4).run([batches(1)], [("train", 1)])
    assert seen == [1, 1]
    assert best_files() == ["best_acc_epoch_4.pth"]
    assert [r["epoch"] for r in records() if r["mode"] == "val"] == [2, 4]


def test_nothing_to_evaluate_gives_no_best_and_a_warning():
    runner = make(EpochBasedRunner, EvalHook(batches(1), save_best="acc", evaluate=lambda r: {}), length=1)
    with pytest.warns(UserWarning, match="Since `eval_res` is an empty dict, the behavior to save the best checkpoint"):
        runner.run([batches(1)], [("train", 1)])
    assert best_files() == []


def test_two_hooks_have_a_best_each():
    """mmcv compares one's score with the other's."""
    runner = make(EpochBasedRunner, length=3)
    runner.register_hook(EvalHook(batches(1), save_best="acc", evaluate=scores([0.1, 0.3, 0.2])), "LOW")
    losses = iter([9.0, 8.0, 7.0])
    runner.register_hook(EvalHook(batches(1), save_best="loss", evaluate=lambda r: dict(loss=next(losses))), "LOW")
    runner.run([batches(1)], [("train", 1)])
    assert best_files() == ["best_acc_epoch_2.pth", "best_loss_epoch_3.pth"]
    messages = runner.meta["hook_msgs"]
    assert (messages["best_score"], messages["best_score.1"]) == (0.3, 7.0)


def test_out_dir_and_names_with_slashes():
    hook = EvalHook(batches(1), save_best="coco/bbox_mAP", out_dir="best", evaluate=lambda r: {"coco/bbox_mAP": 1.0})
    make(EpochBasedRunner, hook, length=1).run([batches(1)], [("train", 1)])
    assert Path("best/out/best_coco_bbox_mAP_epoch_1.pth").is_file()


# Rules and bad input.


@pytest.mark.parametrize(
    ("key", "options", "rule"),
    [
        ("acc_top1", {}, "greater"),
        ("MIOU", {}, "greater"),
        ("val_loss", {}, "less"),
        ("loss_top", {}, "greater"),  # a part of a greater key comes first
        ("loss_top", dict(less_keys=["loss_top"]), "less"),  # an equal one before parts
        ("fid", dict(less_keys="fid"), "less"),
        ("fid", dict(greater_keys=("FID",)), "greater"),
        ("fid", dict(rule="less"), "less"),
        ("acc", dict(rule="less"), "less"),
    ],
)
def test_rules(key, options, rule):
    assert EvalHook([0], save_best=key, evaluate=len, **options).rule == rule


class Evaluable(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(dataloader=3), TypeError, "the dataloader of EvalHook must be an iterable with a length"),
        (dict(dataloader=[]), ValueError, "the dataloader of EvalHook is empty"),
        (dict(interval=0), ValueError, "interval must be a positive number"),
        (dict(interval=1.5), TypeError, "interval must be an int"),
        (dict(start=-1), ValueError, "start epoch -1 is smaller than 0"),
        (dict(by_epoch=1), TypeError, "by_epoch must be a bool"),
        (dict(save_best=True), TypeError, 'save_best must be the name of a score, "auto" or None'),
        (dict(save_best="fid"), ValueError, "nothing says whether more or less of 'fid' is better"),
        (dict(save_best="auto", rule="more"), KeyError, "rule must be"),
        (dict(greater_keys=3), TypeError, "greater_keys must be a list of str"),
        (dict(less_keys=[3]), TypeError, "less_keys must be a list of str"),
        (dict(evaluate=3), TypeError, "evaluate must be callable"),
        (dict(out_dir="s3://x"), ValueError, "local folders only"),
        (dict(dynamic_intervals=[(3, 0)]), ValueError, "dynamic_intervals must be pairs"),
        (dict(dynamic_intervals=[(5, 1), (3, 1)]), ValueError, "milestones rising"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        EvalHook(**{"dataloader": [0], **arguments})


def test_what_can_only_be_known_in_the_run():
    with pytest.raises(TypeError, match=r"the loader's data set has no evaluate\(results, logger"):
        make(EpochBasedRunner, EvalHook(DataLoader(Evaluable()))).run([batches(1)], [("train", 1)])
    hook = EvalHook(batches(1), save_best="accuracy", evaluate=lambda r: dict(acc=1.0))
    with pytest.raises(KeyError, match=r"save_best='accuracy' is not among the scores \['acc'\]"):
        make(EpochBasedRunner, hook, work_dir="two").run([batches(1)], [("train", 1)])
    for name in ("save_bst", "save_best_"):  # an option that would be handed on to an evaluation that does not know it
        hook = EvalHook(batches(1), **{name: "acc"}, evaluate=lambda results, metric=None: dict(acc=1.0))
        with pytest.raises(KeyError, match=rf"EvalHook.* has no {name}; did you mean save_best instead of {name}\?"):
            make(EpochBasedRunner, hook, work_dir="three").run([batches(1)], [("train", 1)])
        assert hook.initial_flag  # it is said before the first iteration
    hook = EvalHook(batches(1), metric="x", evaluate=lambda results, metric=None: dict(acc=1.0))
    make(EpochBasedRunner, hook, work_dir="three", length=1).run([batches(1)], [("train", 1)])
    with pytest.raises(ValueError, match="3 results for 355 samples"):
        Digits("val").evaluate([torch.ones(10)] * 3)


@pytest.mark.parametrize("hook_class", [EvalHook, DistEvalHook])
def test_an_overridden_do_evaluate_finds_the_function_that_tests(hook_class):
    class Remembers(hook_class):  # as mmcls has it
        def _do_evaluate(self, runner):
            where = dict(tmpdir=None, gpu_collect=True) if hook_class is DistEvalHook else {}
            self.latest_results = self.test_fn(runner.model, self.dataloader, **where)
            self.evaluate(runner, self.latest_results)

    hook = Remembers(batches(), by_epoch=False, interval=3, evaluate=lambda results: dict(n=len(results)))
    make(IterBasedRunner, hook).run([batches()], [("train", 1)])
    assert len(hook.latest_results) == sum(map(len, batches()))


def test_photos_through_dali():
    """Twice, so that the loader has to start over; with a model whose answer can be worked out from the files."""
    data = Photos("val", size=32)
    loader = build_dataloader(data, 64, 1, shuffle=False)
    torch.manual_seed(0)
    net = nn.Sequential(Scaled(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    model = supervised(net, nn.CrossEntropyLoss())
    runner = EpochBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.0), work_dir="out", max_epochs=2)
    log = dict(interval=10, hooks=[dict(type="TextLoggerHook")])
    runner.register_training_hooks(dict(policy="fixed"), {}, None, log)
    hook = EvalHook(loader)
    runner.register_hook(hook, "LOW")
    runner.run([[next(iter(loader))]], [("train", 1)])
    first, second = [r["acc"] for r in records() if r["mode"] == "val"]
    assert first == second
    results = single_gpu_test(model, loader)
    assert first == pytest.approx(data.evaluate(results)["acc"], abs=1e-5)
    assert len(results) == len(data) == 500


def test_a_best_checkpoint_needs_no_second_evaluation():
    seen = []
    hook = EvalHook(batches(), save_best="acc", evaluate=scores([1, 4], seen))
    make(EpochBasedRunner, hook, length=2).run([batches()], [("train", 1)])
    assert len(seen) == 2
    again = EvalHook(batches(), save_best="acc", evaluate=scores([3, 7], seen))
    runner = make(EpochBasedRunner, again, length=4)
    runner.resume("out/best_acc_epoch_2.pth")
    runner.run([batches()], [("train", 1)])
    assert len(seen) == 4  # of epochs 3 and 4
    assert runner.meta["hook_msgs"]["best_score"] == 7
