"""Evaluation during training, and the best checkpoint."""

from __future__ import annotations

import bisect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import file
from ..checkpoint.state import rng_state, set_rng_state
from ..data.loader import check_source
from ..dist import get_dist_info
from ..engine import multi_gpu_test, single_gpu_test
from ..spelling import check_keys, parameters, takes_any
from .best import COMPARE, WORST, find_rule, keys_of, plain_score, remove_file
from .ema import averaged_weights
from .folders import check_local, run_folder
from .hook import NEVER, Hook, warn_of_no_epochs
from .logger.base import LoggerHook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


class EvalHook(Hook):
    """Evaluates the model every so often, logs the results, and keeps the checkpoint with the best score.

    Register it behind the timer, with priority LOW, as the OpenMMLab projects do. The model is evaluated with the
    averages of an EMAHook, and is afterwards in the modes (train, eval) that it was in.

    Args:
        dataloader: any iterable with a length.
        start: do not evaluate before this epoch or iteration; a run that starts there or later evaluates before
            training, unless it resumed what was evaluated already. None: no such limit.
        interval: epochs or iterations between two evaluations.
        by_epoch: count epochs; otherwise iterations.
        save_best: name of the score that decides, or "auto": the first one. None: no best checkpoint.
        rule: "greater" or "less" is better; None: by the score's name.
        test_fn: ``test_fn(model, dataloader)`` -> results; by default :func:`fastrunner.engine.single_gpu_test`.
        greater_keys, less_keys: names, or parts of names, of scores of which more or less is better.
        out_dir: folder for a subfolder named as the work_dir, for best checkpoints; by default the work_dir.
        file_client_args: only None and ``dict(backend="disk")``.
        evaluate: ``evaluate(results, **eval_kwargs)`` -> dict of scores; by default
            ``dataloader.dataset.evaluate(results, logger=..., **eval_kwargs)``.
        dynamic_intervals: ``[(milestone, interval), ...]``: the interval from that epoch or iteration on, the first
            being 1.
        **eval_kwargs: passed on to the evaluation.
    Raises:
        TypeError, ValueError: bad arguments, an empty loader, nothing to evaluate with.
        KeyError: an unknown ``rule``; a ``save_best`` that is not among the scores.
    """

    rule_map = COMPARE
    init_value_map = WORST
    _default_greater_keys: Sequence[str] = [
        "acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc",
    ]  # fmt: skip
    _default_less_keys: Sequence[str] = ["loss"]

    def __init__(
        self,
        dataloader: Any,
        start: int | None = None,
        interval: int = 1,
        by_epoch: bool = True,
        save_best: str | None = None,
        rule: str | None = None,
        test_fn: Callable[..., Any] | None = None,
        greater_keys: Sequence[str] | str | None = None,
        less_keys: Sequence[str] | str | None = None,
        out_dir: str | None = None,
        file_client_args: dict[str, Any] | None = None,
        *,
        evaluate: Callable[..., dict[str, Any]] | None = None,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
        **eval_kwargs: Any,
    ) -> None:
        check_source(dataloader, "the dataloader of EvalHook")
        _check_counts(start, interval, by_epoch, save_best)
        if evaluate is not None and not callable(evaluate):
            raise TypeError(f"evaluate must be callable, got {type(evaluate).__name__}")
        check_local(out_dir, file_client_args)
        self.dataloader = dataloader
        self.start = start
        self.interval = interval
        self.by_epoch = by_epoch
        self.save_best = save_best
        self.rule = rule
        self.test_fn: Callable[..., Any] = test_fn or single_gpu_test  # an overridden _do_evaluate calls it
        self.greater_keys = keys_of("greater_keys", greater_keys, self._default_greater_keys)
        self.less_keys = keys_of("less_keys", less_keys, self._default_less_keys)
        self.out_dir = self._given_out_dir = out_dir
        self.eval_kwargs = eval_kwargs
        self.evaluate_fn = evaluate
        self.dynamic_milestones, self.dynamic_intervals = _dynamic(interval, dynamic_intervals)
        self.initial_flag = True  # the run has not begun to train
        self._evaluated = -1  # finished epochs or iterations at the newest evaluation
        self._resumed = False  # that was read from a checkpoint, and before_run has not used it yet
        self._between = False  # the evaluation at hand is not at the end of an epoch or iteration
        self._copy = False  # ... and what it evaluates is what was just resumed
        self._best_names = ("best_score", "best_ckpt")  # in meta.hook_msgs; a second hook has names of its own
        if save_best is not None:
            self.best_ckpt_path: str | None = None
            self._init_rule(rule, save_best)

    def _init_rule(self, rule: str | None, key_indicator: str) -> None:
        if rule is None and key_indicator == "auto":
            self.rule = None  # the first result will tell
        else:
            self.rule = find_rule(rule, key_indicator, self.greater_keys, self.less_keys)
            self.compare_func = self.rule_map[self.rule]
        self.key_indicator = key_indicator

    # When.

    def before_run(self, runner: BaseRunner) -> None:
        own = (
            type(self).evaluate is not EvalHook.evaluate or "evaluate" in self.__dict__ or self.evaluate_fn is not None
        )
        if not own and not hasattr(getattr(self.dataloader, "dataset", None), "evaluate"):
            raise TypeError(
                f"the loader's data set has no evaluate(results, logger, ...); give {type(self).__name__} one: "
                "evaluate=lambda results: dict(acc=...)"
            )
        self._check_options()
        warn_of_no_epochs(self, runner, "it will evaluate nothing")
        self.out_dir = run_folder(runner, self._given_out_dir)
        if self.out_dir != runner.work_dir:
            runner.logger.info(f"The best checkpoint will be saved to {self.out_dir}.")
        self.initial_flag = True
        if self.save_best is not None:
            if runner.meta is None:
                runner.meta = {}
            saving = [hook for hook in runner._hooks if getattr(hook, "save_best", None) is not None]
            number = saving.index(self) if self in saving else 0
            if number:
                self._best_names = (f"best_score.{number}", f"best_ckpt.{number}")
            self.best_ckpt_path = runner.meta.setdefault("hook_msgs", {}).get(self._best_names[1])
            self._catch_up(runner)
        self._resumed = False

    def _check_options(self) -> None:
        """Raise KeyError for options that neither the hook nor the evaluation knows: now, not when it is due."""
        own = type(self).evaluate is not EvalHook.evaluate or "evaluate" in self.__dict__
        if not self.eval_kwargs or own:
            return
        evaluate = self.evaluate_fn or self.dataloader.dataset.evaluate
        if not takes_any(evaluate):
            known = (*parameters(type(self)), *parameters(evaluate))
            check_keys(self.eval_kwargs, known, f"{type(self).__name__}, with its evaluation,")

    def before_train_epoch(self, runner: BaseRunner) -> None:
        if self.by_epoch:
            self._before_training(runner)

    def before_train_iter(self, runner: BaseRunner) -> None:
        if not self.by_epoch:
            self._before_training(runner)

    def after_train_epoch(self, runner: BaseRunner) -> None:
        if self.by_epoch and self._should_evaluate(runner):
            self._evaluate_now(runner)

    def after_train_iter(self, runner: BaseRunner) -> None:
        if not self.by_epoch and self._should_evaluate(runner):
            for hook in runner._hooks:
                if isinstance(hook, LoggerHook):
                    hook.after_train_iter(runner)  # what training has gathered; then the output is the evaluation's
            runner.log_buffer.clear_output()
            self._evaluate_now(runner)

    due_if_alone = True  # a user's hook may change the interval

    def due(self, runner: BaseRunner) -> int:
        if self.by_epoch:
            return NEVER  # not at iterations
        if self.initial_flag and self.start is not None:
            return runner.iter
        first = max(runner.iter, (self.start or 0) - 1)
        interval = self._interval_at(first)
        nearest = first + -(first + 1 - (self.start or 0)) % interval if interval > 0 else NEVER
        later = self.dynamic_milestones[bisect.bisect(self.dynamic_milestones, first + 1) :]
        return min(nearest, later[0] - 1) if later else nearest

    def _should_evaluate(self, runner: BaseRunner) -> bool:
        return self._is_due(runner.epoch if self.by_epoch else runner.iter)

    def _is_due(self, current: int) -> bool:
        """Whether an evaluation follows epoch or iteration number ``current``, counted from 0."""
        since = current + 1 - (self.start or 0)
        interval = self._interval_at(current)
        return since >= 0 and interval > 0 and since % interval == 0

    def _interval_at(self, current: int) -> int:
        if self.dynamic_milestones:
            self.interval = self.dynamic_intervals[bisect.bisect(self.dynamic_milestones, current + 1) - 1]
        return self.interval

    def _before_training(self, runner: BaseRunner) -> None:
        """The evaluation before training, once a run."""
        if not self.initial_flag:
            return
        self.initial_flag = False
        done = runner.epoch if self.by_epoch else runner.iter
        if self.start is None or done < self.start or self._evaluated == done:
            return
        self._evaluate_now(runner, between=True)
        # At once: loggers clear the buffer when the epoch starts, and mix it with training's values otherwise.
        mode, runner.mode = runner.mode, "val"
        for hook in runner._hooks:
            if isinstance(hook, LoggerHook):
                hook.after_train_epoch(runner)
        runner.mode = mode
        runner.log_buffer.clear_output()

    def _done(self, runner: BaseRunner) -> int:
        """Finished epochs or iterations, with the one whose end this is."""
        return (runner.epoch if self.by_epoch else runner.iter) + (not self._between)

    # What.

    def _evaluate_now(self, runner: BaseRunner, between: bool = False) -> None:
        """Evaluate, with EMA's averages where there are, and leave modes and random states as they were."""
        seek = getattr(self.dataloader, "seek", None)
        if seek is not None:
            seek(runner.epoch, 0)  # what a loader draws depends on the counters alone, also after a resume
        self._between = between
        try:
            with averaged_weights(runner), undisturbed(runner.model):
                self._do_evaluate(runner)
            self._evaluated = self._done(runner)
        finally:
            self._between = False

    def _do_evaluate(self, runner: BaseRunner) -> None:
        """Evaluate, and save if it is the best. Projects override this."""
        results = self._test(runner)
        runner.log_buffer.output["eval_iter_num"] = len(self.dataloader)
        key_score = self.evaluate(runner, results)
        if self.save_best is not None and key_score is not None:
            self._save_ckpt(runner, key_score)

    def _test(self, runner: BaseRunner) -> Any:
        return self.test_fn(runner.model, self.dataloader)

    def evaluate(self, runner: BaseRunner, results: Any) -> Any:
        """Put the scores into the log buffer; returns the one that decides, or None."""
        if self.evaluate_fn is not None:
            scores = self.evaluate_fn(results, **self.eval_kwargs)
        else:
            scores = self.dataloader.dataset.evaluate(results, logger=runner.logger, **self.eval_kwargs)
        for name, value in scores.items():
            runner.log_buffer.output[name] = value
        runner.log_buffer.ready = True
        if self.save_best is None:
            return None
        if not scores:
            warnings.warn(
                "Since `eval_res` is an empty dict, the behavior to save the best checkpoint will be skipped in this "
                "evaluation.",
                stacklevel=2,
            )
            return None
        if self.key_indicator == "auto":
            self._init_rule(self.rule, next(iter(scores)))
        if self.key_indicator not in scores:
            raise KeyError(f"save_best={self.key_indicator!r} is not among the scores {sorted(scores)}")
        return scores[self.key_indicator]

    def _save_ckpt(self, runner: BaseRunner, key_score: Any) -> None:
        """Save if the score is better than the best so far; the old file is removed once the new one is on disk."""
        if key_score is None:  # nothing was evaluated; projects' own _do_evaluate calls this all the same
            return
        assert runner.meta is not None
        assert self.rule is not None
        assert self.out_dir is not None
        messages = runner.meta.setdefault("hook_msgs", {})
        best_score, best_ckpt = self._best_names
        if not self.compare_func(key_score, messages.get(best_score, self.init_value_map[self.rule])):
            return
        number, unit = self._done(runner), "epoch" if self.by_epoch else "iter"
        self._evaluated = number  # the file says so: who resumes from it need not evaluate again
        name = f"best_{self.key_indicator}_{unit}_{number}.pth".replace(os.sep, "_")
        old, self.best_ckpt_path = self.best_ckpt_path, os.path.join(self.out_dir, name)
        messages[best_score], messages[best_ckpt] = plain_score(key_score), self.best_ckpt_path
        if self._copy:
            copy_with_meta(runner.resumed_from, self.best_ckpt_path, hook_msgs=messages)
        else:
            whole = name.replace("{", "{{").replace("}", "}}")
            runner.save_checkpoint(self.out_dir, filename_tmpl=whole, create_symlink=False)
        if old != self.best_ckpt_path:
            remove_file(old, runner)
        runner.logger.info(f"Now best checkpoint is saved as {name}.")
        runner.logger.info(f"Best {self.key_indicator} is {key_score:0.4f} at {number} {unit}.")

    # Resuming.

    def _catch_up(self, runner: BaseRunner) -> None:
        """Evaluate what was resumed, if its checkpoint was written by a hook that runs before this one.

        The file is what the best checkpoint would have been, so it is copied if its score is the best.
        """
        done = runner.epoch if self.by_epoch else runner.iter
        if not self._resumed or self._evaluated == done or done == 0 or not self._is_due(done - 1):
            return
        self._copy = True
        try:
            self._evaluate_now(runner, between=True)
        finally:
            self._copy = False
        scores = {name: value for name, value in runner.log_buffer.output.items() if name != "eval_iter_num"}
        runner.logger.info(f"evaluated what was resumed: {scores}")
        runner.log_buffer.clear_output()

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated": self._evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluated = state["evaluated"]
        self._resumed = True


class DistEvalHook(EvalHook):
    """:class:`EvalHook` for several processes: each rank tests its share, rank 0 evaluates and saves.

    Args:
        broadcast_bn_buffer: give all ranks rank 0's BatchNorm statistics first.
        tmpdir: a folder that all ranks see, for results; None: ``<work_dir>/.eval_hook``.
        gpu_collect: send results through the process group instead.
        test_fn: ``test_fn(model, dataloader, tmpdir=..., gpu_collect=...)``, on every rank; by default
            :func:`fastrunner.engine.multi_gpu_test`.
        Others: see :class:`EvalHook`.
    """

    def __init__(
        self,
        dataloader: Any,
        start: int | None = None,
        interval: int = 1,
        by_epoch: bool = True,
        save_best: str | None = None,
        rule: str | None = None,
        test_fn: Callable[..., Any] | None = None,
        greater_keys: Sequence[str] | str | None = None,
        less_keys: Sequence[str] | str | None = None,
        broadcast_bn_buffer: bool = True,
        tmpdir: str | None = None,
        gpu_collect: bool = False,
        out_dir: str | None = None,
        file_client_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataloader, start, interval, by_epoch, save_best, rule, test_fn or multi_gpu_test, greater_keys, less_keys,
            out_dir, file_client_args, **kwargs,
        )  # fmt: skip
        self.broadcast_bn_buffer = broadcast_bn_buffer
        self.tmpdir = tmpdir
        self.gpu_collect = gpu_collect

    def _do_evaluate(self, runner: BaseRunner) -> None:
        if self.broadcast_bn_buffer and get_dist_info()[1] > 1:
            for module in runner.model.modules():
                if isinstance(module, _BatchNorm) and module.running_var is not None:
                    assert module.running_mean is not None
                    dist.broadcast(module.running_var, 0)
                    dist.broadcast(module.running_mean, 0)
        results = self._test(runner)
        if runner.rank != 0:
            return
        runner.log_buffer.output["eval_iter_num"] = len(self.dataloader)
        key_score = self.evaluate(runner, results)
        if self.save_best is not None and key_score is not None:
            self._save_ckpt(runner, key_score)

    def _test(self, runner: BaseRunner) -> Any:
        tmpdir = self.tmpdir or os.path.join(runner.work_dir, ".eval_hook")
        return self.test_fn(runner.model, self.dataloader, tmpdir=tmpdir, gpu_collect=self.gpu_collect)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Afterwards every module is in the mode (train, eval) it was in, and the random states are what they were.

    Training is so the same with and without evaluations, whatever a loader of theirs draws.
    """
    modes = [(module, module.training) for module in model.modules()] if hasattr(model, "modules") else []
    random_states = rng_state()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        set_rng_state(random_states)


def copy_with_meta(source: tuple[str, bool], target: str, **meta: Any) -> None:
    """Write the checkpoint ``source`` (path, trusted) once more, with these items in its meta."""
    path, trusted = source
    content = file.read(path, "cpu", trusted=trusted)
    content["meta"].update(file.plain(meta))
    file.write(content, target)


def _check_counts(start: Any, interval: Any, by_epoch: Any, save_best: Any) -> None:
    for name, value in (("start", start), ("interval", interval)):
        if (name, value) != ("start", None) and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if interval <= 0:
        raise ValueError(f"interval must be a positive number, but got {interval}")
    if start is not None and start < 0:
        raise ValueError(f"The evaluation start epoch {start} is smaller than 0")
    if not isinstance(by_epoch, bool):
        raise TypeError(f"by_epoch must be a bool, got {by_epoch!r}")
    if save_best is not None and not isinstance(save_best, str):
        raise TypeError(f'save_best must be the name of a score, "auto" or None, got {save_best!r}')


def _dynamic(interval: int, pairs: Any) -> tuple[list[int], list[int]]:
    """Where each interval begins, and the intervals; both empty where the interval stays."""
    if pairs is None:
        return [], []
    milestones, intervals = [0], [interval]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair) or pair[0] <= milestones[-1]:
            raise ValueError(f"dynamic_intervals must be pairs (milestone, interval), milestones rising; got {pairs!r}")
        milestones.append(pair[0])
        intervals.append(pair[1])
    return milestones, intervals
