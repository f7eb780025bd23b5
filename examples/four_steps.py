"""The four steps of a training script, as users of MMCV write them, on scikit-learn's digits.

    python examples/four_steps.py                              # EpochBasedRunner
    python examples/four_steps.py --runner iter --work-dir out # IterBasedRunner
    python examples/four_steps.py --work-dir out --resume-from out/latest.pth

``train`` is the script; the rest makes the things that it calls model, dataset, cfg and logger.
"""

from __future__ import annotations

import argparse

from torch import nn

from fastrunner import (
    HOOKS,
    Config,
    Digits,
    build_dataloader,
    build_from_cfg,
    build_optimizer,
    build_runner,
    supervised,
)


def train(model, dataset, cfg, logger):
    # 1. optimizer and loaders
    optimizer = build_optimizer(model, cfg.optimizer)
    data_loaders = [build_dataloader(ds, cfg.data.samples_per_gpu, cfg.data.workers_per_gpu) for ds in dataset]

    # 2. runner
    default_args = dict(model=model, batch_processor=None, optimizer=optimizer, logger=logger)
    if cfg.get("work_dir", None):
        default_args["work_dir"] = cfg.work_dir
    runner = build_runner(cfg.runner, default_args=default_args)

    # 3. hooks
    runner.register_training_hooks(cfg.lr_config, cfg.optimizer_config, cfg.checkpoint_config, cfg.log_config)
    if cfg.get("custom_hooks", None):
        for hook_cfg in cfg.custom_hooks:
            hook_cfg = hook_cfg.copy()
            priority = hook_cfg.pop("priority", "NORMAL")
            runner.register_hook(build_from_cfg(hook_cfg, HOOKS), priority=priority)
    if cfg.get("resume_from", None):
        runner.resume(cfg.resume_from)
    elif cfg.get("load_from", None):
        runner.load_checkpoint(cfg.load_from)

    # 4. run
    runner.run(data_loaders, cfg.workflow)
    return runner


def make_model() -> nn.Module:
    """A small CNN for uint8 images (N, 1, 8, 8); normalises them itself."""
    return supervised(nn.Sequential(Scale(), *conv(1, 16), *conv(16, 32), nn.Flatten(), nn.Linear(32 * 64, 10)),
                      nn.CrossEntropyLoss())  # fmt: skip


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


class Scale(nn.Module):
    def forward(self, img):
        return img.float() / 255


def make_config(kind: str = "epoch", **changes) -> Config:
    by_epoch = kind == "epoch"
    length = dict(type="EpochBasedRunner", max_epochs=6) if by_epoch else dict(type="IterBasedRunner", max_iters=120)
    cfg = dict(
        optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4),
        data=dict(samples_per_gpu=64, workers_per_gpu=0),
        runner=length,
        lr_config=dict(policy="step", step=[4] if by_epoch else [80], warmup="linear", warmup_iters=10),
        optimizer_config=dict(grad_clip=dict(max_norm=1.0)),
        checkpoint_config=dict(interval=2 if by_epoch else 40),
        log_config=dict(interval=10, hooks=[dict(type="TextLoggerHook")]),
        custom_hooks=[dict(type="EMAHook", momentum=0.01)],
        workflow=[("train", 2), ("val", 1)],
    )
    return Config({**cfg, **changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", choices=("epoch", "iter"), default="epoch")
    parser.add_argument("--work-dir")
    parser.add_argument("--resume-from")
    args = parser.parse_args()
    cfg = make_config(args.runner, work_dir=args.work_dir, resume_from=args.resume_from)
    dataset = [Digits(split="train"), Digits(split="val")]
    train(make_model(), dataset, cfg, logger=None)


if __name__ == "__main__":
    main()
