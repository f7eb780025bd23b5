"""Hugging Face Accelerate: the loop of ``raw.py`` with what its guide replaces: prepare, backward, clip, accumulate."""

from __future__ import annotations

from typing import Any

from . import AsLoader, Task

PACKAGE = "accelerate"
VARIANTS = ("",)


def train(task: Task, source: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=next(task.model.parameters()).device.type == "cpu")
    # The loader is not prepared: that would rebuild it, and the batches are on the device already.
    loader = AsLoader(source)
    model, optimizer = accelerator.prepare(task.model, task.optimizer)
    interval, done = task.log_interval, 0
    model.train()
    for epoch in range(task.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model.train_step(batch, optimizer)["loss"]
                optimizer.zero_grad()
                accelerator.backward(loss)
                if task.max_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), task.max_norm)
                optimizer.step()
            done += 1
            if done % interval == 0:
                task.logger.info("epoch %d iter %d loss %.4f", epoch + 1, done, loss.item())
