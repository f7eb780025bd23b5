"""Lightning: a Trainer without progress bar, checkpoints and summary; its CSV logger, ``self.log`` of the loss."""

from __future__ import annotations

from typing import Any

from . import Task

PACKAGE = "lightning"
VARIANTS = ("",)


def train(task: Task, source: Any) -> None:
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined,unused-ignore]
        """``training_step`` in Lightning's words."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model.train_step(batch, None)["loss"]
            self.log("loss", loss, batch_size=1)
            return loss

        def configure_optimizers(self) -> Any:
            return task.optimizer

    by_epoch = task.runner == "epoch"
    trainer = lightning.Trainer(
        accelerator="cpu" if next(task.model.parameters()).device.type == "cpu" else "gpu",
        devices=1,
        max_epochs=task.epochs if by_epoch else -1,
        max_steps=-1 if by_epoch else task.iterations(source),
        gradient_clip_val=task.max_norm,
        log_every_n_steps=task.log_interval,
        logger=CSVLogger(task.folder),
        default_root_dir=task.folder,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(task.model), source)
