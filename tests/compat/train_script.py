"""A training script as OpenMMLab's users write them: every import is mmcv's. It prints one line of JSON.

It was run with mmcv 1.7.2 (``golden/compat.json``), and runs with fastrunner under ``import fastrunner.compat.mmcv``.
"""

import argparse
import json
import logging
import os.path as osp
import sys

import mmcv
import torch
from mmcv import Config, DictAction
from mmcv.parallel import DataContainer as DC
from mmcv.parallel import MMDataParallel, collate
from mmcv.runner import (
    HOOKS,
    BaseModule,
    Hook,
    Sequential,
    build_optimizer,
    build_runner,
    force_fp32,
    get_dist_info,
    load_checkpoint,
    set_random_seed,
)
from mmcv.runner.hooks.lr_updater import LrUpdaterHook, annealing_linear
from mmcv.utils import Registry, build_from_cfg, get_logger, print_log
from torch import nn
from torch.utils.data import DataLoader, Dataset

DATASETS = Registry("dataset")
MODELS = Registry("model")

CONFIG = """
model = dict(type='Regressor', width=3, init_cfg=dict(type='Constant', layer='Linear', val=0.25, bias=0.5))
data = dict(samples_per_gpu=2, train=dict(type='Numbers', length=6), val=dict(type='Numbers', length=2))
optimizer = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.01, paramwise_cfg=dict(bias_lr_mult=2.))
optimizer_config = dict(grad_clip=dict(max_norm=1.0))
lr_config = dict(policy='Ramp', warmup='linear', warmup_iters=2, warmup_ratio=0.5)
runner = dict(type='EpochBasedRunner', max_epochs=2)
checkpoint_config = dict(interval=1)
log_config = dict(interval=2, hooks=[dict(type='TextLoggerHook')])
custom_hooks = [dict(type='Witness', priority='VERY_LOW')]
workflow = [('train', 1), ('val', 1)]
"""


@DATASETS.register_module()
class Numbers(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        x = torch.tensor([0.5 * i, 1.0 - 0.25 * i, 0.125])
        return dict(x=DC(x, stack=True, pad_dims=None), meta=DC(dict(name=f"{i}"), cpu_only=True), y=float(i % 2))


@MODELS.register_module()
class Regressor(BaseModule):
    def __init__(self, width, init_cfg=None):
        super().__init__(init_cfg)
        self.net = Sequential(nn.Linear(width, 1))

    @force_fp32(apply_to=("error",))
    def loss(self, error):
        return (error * error).mean()

    def forward(self, x, y, meta, return_loss=True):
        assert all(isinstance(each["name"], str) for each in meta)
        return self.loss(self.net(x).squeeze(1) - y.float())

    def train_step(self, data, optimizer):
        loss = self(**data)
        return dict(loss=loss, log_vars=dict(loss=loss.item()), num_samples=len(data["meta"]))

    def val_step(self, data, optimizer=None):
        return self.train_step(data, optimizer)


@HOOKS.register_module()
class RampLrUpdaterHook(LrUpdaterHook):
    def get_lr(self, runner, base_lr):
        return annealing_linear(base_lr, 0.0, runner.epoch / runner.max_epochs)


@HOOKS.register_module()
class Witness(Hook):
    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner):
        self.seen.append([runner.epoch, runner.iter, runner.current_lr()[0], round(runner.outputs["loss"].item(), 5)])


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("work_dir")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    args = parser.parse_args(argv)
    cfg = Config.fromstring(CONFIG, ".py")
    cfg.merge_from_dict(args.cfg_options or {})
    set_random_seed(0, deterministic=True)
    mmcv.mkdir_or_exist(args.work_dir)
    logger = get_logger("script", log_file=osp.join(args.work_dir, "script.log"), log_level=logging.INFO)
    print_log(f"rank and world size: {get_dist_info()}", logger)

    model = build_from_cfg(cfg.model, MODELS)
    model.init_weights()
    model = MMDataParallel(model, device_ids=[0])
    loaders = [
        DataLoader(
            build_from_cfg(cfg.data[name], DATASETS),
            batch_size=cfg.data.samples_per_gpu,
            collate_fn=lambda batch: collate(batch, samples_per_gpu=cfg.data.samples_per_gpu),
        )
        for name in ("train", "val")
    ]
    runner = build_runner(
        cfg.runner,
        default_args=dict(
            model=model,
            optimizer=build_optimizer(model, cfg.optimizer),
            work_dir=args.work_dir,
            logger=logger,
            meta=dict(seed=0, config=cfg.pretty_text),
        ),
    )
    runner.register_training_hooks(
        cfg.lr_config, cfg.optimizer_config, cfg.checkpoint_config, cfg.log_config,
        custom_hooks_config=cfg.custom_hooks,
    )  # fmt: skip
    runner.run(loaders, cfg.workflow)

    again = build_from_cfg(cfg.model, MODELS)
    content = load_checkpoint(again, osp.join(args.work_dir, "latest.pth"), map_location="cpu", strict=True)
    witness = next(hook for hook in runner.hooks if isinstance(hook, Witness))
    with open(osp.join(args.work_dir, f"{runner.timestamp}.log.json")) as file:
        records = [json.loads(line) for line in file]
    print(
        json.dumps(
            dict(
                seen=witness.seen,
                weights=[round(x, 5) for p in again.parameters() for x in p.flatten().tolist()],
                groups=len(runner.optimizer.param_groups),
                keys=sorted(content["state_dict"]),
                epoch=content["meta"]["epoch"],
                records=[[r["mode"], r["epoch"], r["iter"], r["lr"], r["loss"]] for r in records if "mode" in r],
            )
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
