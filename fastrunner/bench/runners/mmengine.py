"""mmengine: its Runner with the default hooks but no checkpoints, no visualizer backend, no environment report."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import AsLoader, Task

PACKAGE = "mmengine"
VARIANTS = ("shipped", "nosleep")


def train(task: Task, source: Any) -> None:
    from mmengine.logging import MMLogger
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner

    class Model(nn.Module):
        """``train_step`` in mmengine's words."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def train_step(self, batch: Any, optim_wrapper: Any) -> dict[str, Any]:
            with optim_wrapper.optim_context(self):
                outputs = self.model.train_step(batch, None)
            optim_wrapper.update_params(outputs["loss"])
            return outputs["log_vars"]  # type: ignore[no-any-return]

    iters = task.iterations(source)
    by_epoch = task.runner == "epoch"
    runner = Runner(
        Model(task.model),
        work_dir=str(task.folder),
        train_dataloader=AsLoader(source),
        train_cfg={"by_epoch": True, "max_epochs": task.epochs}
        if by_epoch
        else {"by_epoch": False, "max_iters": iters},
        optim_wrapper=OptimWrapper(
            task.optimizer, clip_grad=None if task.max_norm is None else {"max_norm": task.max_norm}
        ),
        default_hooks={"logger": {"type": "LoggerHook", "interval": task.log_interval}, "checkpoint": None},
        log_processor={"by_epoch": by_epoch, "window_size": task.log_interval},
        experiment_name=f"bench{len(MMLogger._instance_dict)}",  # a second run of one name is refused
    )
    runner.train()
