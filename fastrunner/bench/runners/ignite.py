"""pytorch-ignite: an Engine over the step of ``raw.py``, a handler for the log."""

from __future__ import annotations

from typing import Any

from torch.nn.utils import clip_grad_norm_

from . import Task

PACKAGE = "ignite"
VARIANTS = ("",)


def train(task: Task, source: Any) -> None:
    from ignite.engine import Engine, Events

    model, optimizer, max_norm = task.model, task.optimizer, task.max_norm
    params = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()

    def step(engine: Any, batch: Any) -> Any:
        loss = model.train_step(batch, optimizer)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            clip_grad_norm_(params, max_norm)
        optimizer.step()
        return loss.detach()

    def log(engine: Any) -> None:
        state = engine.state
        task.logger.info("epoch %d iter %d loss %.4f", state.epoch, state.iteration, state.output.item())

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=task.log_interval), log)
    if task.runner == "epoch":
        trainer.run(source, max_epochs=task.epochs)
    else:
        trainer.run(source, max_iters=task.iterations(source), epoch_length=len(source))
