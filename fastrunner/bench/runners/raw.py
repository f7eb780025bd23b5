"""The loop that a careful person writes by hand: torch's fused optimizer, one host read a log interval."""

from __future__ import annotations

from typing import Any

from torch.nn.utils import clip_grad_norm_

from . import Task

PACKAGE = None
VARIANTS = ("",)


def train(task: Task, source: Any) -> None:
    model, optimizer, max_norm, interval = task.model, task.optimizer, task.max_norm, task.log_interval
    params = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    done = 0
    for epoch in range(task.epochs):
        for batch in source:
            loss = model.train_step(batch, optimizer)["loss"]
            optimizer.zero_grad()
            loss.backward()
            if max_norm is not None:
                clip_grad_norm_(params, max_norm)
            optimizer.step()
            done += 1
            if done % interval == 0:
                task.logger.info("epoch %d iter %d loss %.4f", epoch + 1, done, loss.item())
