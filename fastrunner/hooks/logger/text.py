"""The console line and the ``.log.json`` records, in MMCV's formats: log-analysis scripts read both."""

from __future__ import annotations

import datetime
import json
import os
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...registry import HOOKS
from ..folders import check_local, copy_out, run_folder
from .base import LoggerHook

if TYPE_CHECKING:
    from ...runner.base import BaseRunner

# Not repeated among the values of a console line: they stand in its head, or nowhere.
_IN_HEAD = frozenset(("mode", "Epoch", "iter", "lr", "time", "data_time", "memory", "epoch"))


@HOOKS.register_module()
class TextLoggerHook(LoggerHook):
    """Logs to the console through ``runner.logger``, and to ``<work_dir>/<timestamp>.log.json``.

    Args:
        by_epoch, interval, ignore_last, reset_flag: see :class:`LoggerHook`.
        interval_exp_name: print ``meta["exp_name"]`` every so many iterations, and at the end of each epoch.
        out_dir: copy the run's files there when it ends, into a subfolder named as the work_dir.
        out_suffix: which files of the work_dir, by their ends.
        keep_local: False moves them.
        file_client_args: only None and ``dict(backend="disk")``.
    """

    def __init__(
        self,
        by_epoch: bool = True,
        interval: int = 10,
        ignore_last: bool = True,
        reset_flag: bool = False,
        interval_exp_name: int = 1000,
        out_dir: str | None = None,
        out_suffix: str | tuple[str, ...] = (".log.json", ".log", ".py"),
        keep_local: bool = True,
        file_client_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(interval, ignore_last, reset_flag, by_epoch)
        if out_dir is None and file_client_args is not None:
            raise ValueError('file_client_args should be "None" when `out_dir` is not specified.')
        check_local(out_dir, file_client_args)
        self.out_dir = self._given_out_dir = out_dir
        self.out_suffix = tuple(out_suffix) if isinstance(out_suffix, list) else out_suffix
        self.keep_local = keep_local
        self.time_sec_tot: float = 0
        self.interval_exp_name = interval_exp_name
        self.start_iter = 0
        self.json_log_path = ""
        self._json: IO[str] | None = None

    def before_run(self, runner: BaseRunner) -> None:
        super().before_run(runner)
        if self._given_out_dir is not None:
            self.out_dir = run_folder(runner, self._given_out_dir)
            runner.logger.info(f"Text logs will be saved to {self.out_dir} after the training process.")
        self.start_iter = runner.iter
        self.time_sec_tot = 0
        self.json_log_path = os.path.join(runner.work_dir, f"{runner.timestamp}.log.json")
        if runner.meta is not None:
            self._dump_log(runner.meta, runner)

    def after_run(self, runner: BaseRunner) -> None:
        if self.out_dir is not None and self.out_dir != runner.work_dir and runner.rank == 0:
            self.close()
            copy_out(runner, self.out_dir, self.out_suffix, self.keep_local)

    def log(self, runner: BaseRunner) -> OrderedDict[str, Any]:
        output = runner.log_buffer.output
        # An evaluation by iteration says at which iteration it was: the counter may have moved on.
        cur_iter = output.pop("eval_iter_num") if "eval_iter_num" in output else self.get_iter(runner, inner_iter=True)
        log_dict: OrderedDict[str, Any] = OrderedDict(
            mode=self.get_mode(runner), epoch=self.get_epoch(runner), iter=cur_iter
        )
        lr = runner.current_lr()
        log_dict["lr"] = {k: v[0] for k, v in lr.items()} if isinstance(lr, dict) else lr[0]
        if "time" in output and torch.cuda.is_available():
            log_dict["memory"] = self._get_max_memory(runner)
        log_dict.update(output)
        if type(self) is not TextLoggerHook or self.__dict__.keys() & {"_log_info", "_dump_log"}:
            self._log_info(log_dict, runner)  # a user's own, called as MMCV calls it
            self._dump_log(log_dict, runner)
        else:
            runner.log_writer.submit(self._write, self._facts(log_dict, runner), log_dict, runner)
        return log_dict

    def _log_info(self, log_dict: dict[str, Any], runner: BaseRunner) -> None:
        self._print(self._facts(log_dict, runner), log_dict, runner)

    def _write(self, facts: tuple[str | None, int | None, float], log_dict: dict[str, Any], runner: BaseRunner) -> None:
        self._print(facts, log_dict, runner)
        self._dump_log(log_dict, runner)

    def _facts(self, log_dict: dict[str, Any], runner: BaseRunner) -> tuple[str | None, int | None, float]:
        """What a line needs of the runner as it is now: a line before it, the length it counts to, seconds left."""
        before, length, eta_sec = None, None, 0.0
        if runner.meta is not None and "exp_name" in runner.meta:
            at_end = self.by_epoch and self.end_of_epoch(runner)
            if self.every_n_iters(runner, self.interval_exp_name) or at_end:
                before = f"Exp name: {runner.meta['exp_name']}"
        if log_dict["mode"] == "train":
            length = len(runner.data_loader) if self.by_epoch else runner.max_iters
            if "time" in log_dict:
                self.time_sec_tot += log_dict["time"] * self.interval
                time_sec_avg = self.time_sec_tot / (runner.iter - self.start_iter + 1)
                eta_sec = time_sec_avg * (runner.max_iters - runner.iter - 1)  # type: ignore[operator]
        return before, length, eta_sec

    def _print(self, facts: tuple[str | None, int | None, float], log_dict: dict[str, Any], runner: BaseRunner) -> None:
        before, length, eta_sec = facts
        if before is not None:
            runner.logger.info(before)
        if log_dict["mode"] == "train":
            head = self._train_head(log_dict, length, eta_sec)
        elif self.by_epoch:
            head = f"Epoch({log_dict['mode']}) [{log_dict['epoch']}][{log_dict['iter']}]\t"
        else:
            head = f"Iter({log_dict['mode']}) [{log_dict['iter']}]\t"
        items = (
            f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in log_dict.items()
            if name not in _IN_HEAD
        )
        runner.logger.info(head + ", ".join(items))

    def _train_head(self, log_dict: dict[str, Any], length: int | None, eta_sec: float) -> str:
        where = f"Epoch [{log_dict['epoch']}]" if self.by_epoch else "Iter "
        head, lr = f"{where}[{log_dict['iter']}/{length}]\t", log_dict["lr"]
        head += (
            " ".join(f"lr_{k}: {v:.3e}" for k, v in lr.items()) if isinstance(lr, dict) else f"lr: {lr:.3e}"
        ) + ", "
        if "time" in log_dict:
            head += f"eta: {datetime.timedelta(seconds=int(eta_sec))}, time: {log_dict['time']:.3f}, "
            head += f"data_time: {log_dict.get('data_time', float('nan')):.3f}, "
            if torch.cuda.is_available():
                head += f"memory: {log_dict['memory']}, "
        return head

    def _get_max_memory(self, runner: BaseRunner) -> int:
        """Peak memory in MiB since the start; the largest of all ranks."""
        device = getattr(runner.model, "output_device", None)
        mem_mb = torch.tensor(
            [int(torch.cuda.max_memory_allocated(device=device)) // 2**20], dtype=torch.int, device=device or "cuda"
        )
        if runner.world_size > 1:
            dist.reduce(mem_mb, 0, op=dist.ReduceOp.MAX)
        return int(mem_mb.item())

    def _dump_log(self, log_dict: dict[str, Any], runner: BaseRunner) -> None:
        if runner.rank != 0:
            return
        if self._json is None:
            os.makedirs(os.path.dirname(self.json_log_path), exist_ok=True)
            self._json = open(self.json_log_path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        record = OrderedDict((key, self._round_float(value)) for key, value in log_dict.items())
        self._json.write(json.dumps(record, default=_plain) + "\n")
        self._json.flush()

    def _round_float(self, items: Any) -> Any:
        if isinstance(items, list):
            return [self._round_float(item) for item in items]
        return round(items, 5) if isinstance(items, float) else items

    def close(self) -> None:
        if self._json is not None:
            self._json.close()
            self._json = None


def _plain(value: Any) -> Any:
    """json's view of what it does not know itself."""
    if isinstance(value, (set, range)):
        return list(value)
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
