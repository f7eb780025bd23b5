"""LogWriter: off the loop's thread, in order, and nothing is lost however a run ends."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
from runner.helpers import TinyModel, batches

from fastrunner import FusedSGD, Hook, IterBasedRunner
from fastrunner.log.writer import LogWriter


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.getMessage(), record.threadName))


def make() -> tuple[LogWriter, logging.Logger, list]:
    logger, handler = logging.Logger("lines", logging.INFO), Lines()
    logger.addHandler(handler)
    writer = LogWriter(logger)
    writer.deferring = True
    return writer, logger, handler.lines


def test_lines_stay_in_order_and_are_written_elsewhere():
    writer, logger, lines = make()
    gate = threading.Event()
    writer.submit(gate.wait)
    for i in range(5):
        writer.submit(logger.info, str(i))
    gate.set()
    logger.info("directly")  # waits for those before it
    writer.close()
    here = threading.current_thread().name
    assert lines == [(str(i), "fastrunner-log") for i in range(5)] + [("directly", here)]
    assert not logger.filters
    assert not any(thread.name == "fastrunner-log" for thread in threading.enumerate())


def test_not_deferring_writes_at_once_behind_what_waits():
    writer, _, _ = make()
    done, gate = [], threading.Event()
    writer.submit(lambda: (gate.wait(), done.append("deferred")))
    writer.deferring = False
    gate.set()
    writer.submit(done.append, "at once")
    assert done == ["deferred", "at once"]
    writer.close()


@pytest.mark.parametrize("way", ["submit", "flush", "close"])
def test_an_error_reaches_the_loop_once(way):
    writer, _, _ = make()
    gate = threading.Event()

    def fail():
        gate.wait()
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    gate.set()
    if way == "submit":
        writer._idle.wait()
    with pytest.raises(OSError, match="No space left"):
        writer.submit(lambda: None) if way == "submit" else getattr(writer, way)()
    writer.close()


def test_a_forked_process_can_log():
    writer, logger, _ = make()
    gate = threading.Event()
    writer.submit(gate.wait)  # a line is waiting, and its thread is not in the child
    child = os.fork()
    if child == 0:
        logger.info("in the child")
        os._exit(7)
    _, status = os.waitpid(child, 0)
    gate.set()
    writer.close()
    assert os.waitstatus_to_exitcode(status) == 7


class Fails(Hook):
    def due(self, runner):
        return 17

    def after_train_iter(self, runner):
        raise self.error


@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()], ids=repr)
def test_every_record_is_there_however_the_run_ends(error):
    model = TinyModel()
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=18, work_dir="out")
    runner.register_training_hooks(None, {}, None, dict(interval=2, hooks=[dict(type="TextLoggerHook")]))
    if error is not None:
        hook = Fails()
        hook.error = error
        runner.register_hook(hook, "HIGHEST")
        with pytest.raises(type(error)):
            runner.run([batches()], [("train", 1)])
    else:
        runner.run([batches()], [("train", 1)])
    (file,) = Path("out").glob("*.log.json")
    iters = [json.loads(line)["iter"] for line in file.read_text().splitlines()]
    assert iters == list(range(2, 17 if error else 19, 2))
    assert not any(thread.name == "fastrunner-log" for thread in threading.enumerate())


def test_what_a_users_hook_prints_comes_after_what_was_logged():
    class Prints(Hook):
        def due(self, runner):
            return runner.iter + 4 - runner.iter % 4

        def before_train_iter(self, runner):
            runner.seen.append(("hook", runner.iter, sum("Iter [" in line for line, _ in lines)))

    model, handler = TinyModel(), Lines()
    logger, lines = logging.Logger("run", logging.INFO), handler.lines
    logger.addHandler(handler)
    runner = IterBasedRunner(model, optimizer=FusedSGD(model.parameters(), lr=0.1), max_iters=13, logger=logger)
    runner.seen = []
    runner.register_training_hooks(None, {}, None, dict(interval=1, hooks=[dict(type="TextLoggerHook")]))
    runner.register_hook(Prints(), "HIGHEST")
    runner.run([batches()], [("train", 1)])
    assert runner.seen == [("hook", 4, 4), ("hook", 8, 8), ("hook", 12, 12)]


def test_closing_waits_for_a_job_that_logs_itself():
    writer, logger, lines = make()
    for i in range(200):  # whichever of the two is first
        writer.deferring = True
        writer.submit(lambda i=i: logger.info(str(i)))
        writer.close()
    assert [line for line, _ in lines] == [str(i) for i in range(200)]
