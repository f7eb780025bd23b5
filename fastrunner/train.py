"""``python -m fastrunner.train CONFIG``: a run from a config file, in the words of the OpenMMLab projects.

    model = dict(type="SmallCNN")                                  # from MODELS; needs train_step
    data = dict(samples_per_gpu=64, workers_per_gpu=2,             # from DATASETS
                train=dict(type="Digits", split="train"), val=dict(type="Digits", split="val"),
                train_dataloader=dict(drop_last=True))             # what differs between the loaders
    optimizer, optimizer_config, lr_config, momentum_config, checkpoint_config, log_config, evaluation, custom_hooks,
    runner, workflow, load_from, resume_from, work_dir, seed, log_level, custom_imports, dist_params
    fp16 = dict(loss_scale=512.0)                                  # Fp16OptimizerHook instead of OptimizerHook
    total_epochs = 12                                              # older configs: runner = EpochBasedRunner

Python configs are executed: run only those that you trust. YAML and JSON configs are read safely. ``custom_imports``
imports your modules, which register their classes. :func:`build` is the same without the command line.

Variables of the config's own are left alone. A key that nearly is one of those above, an option for a key that neither
they nor the file have, and an unknown key of ``data`` are errors.
"""

from __future__ import annotations

import argparse
import logging
import os
import os.path as osp
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .config import Config, DictAction
from .data.loader import build_dataloader
from .dist import get_dist_info, init_dist
from .environment import collect_env, set_random_seed
from .hooks.evaluation import DistEvalHook, EvalHook
from .log import get_logger
from .model.parallel import MMDataParallel, MMDistributedDataParallel
from .optim import build_optimizer
from .registry import DATASETS, MODELS, build_from_cfg
from .runner import build_runner
from .runner.utils import get_time_str
from .spelling import check_keys, misspelt
from .step.config import RECIPES, make_config

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
KEYS = (
    "model", "data", "optimizer", "optimizer_config", "lr_config", "momentum_config", "checkpoint_config", "log_config",
    "evaluation", "custom_hooks", "runner", "workflow", "load_from", "resume_from", "work_dir", "seed", "log_level",
    "custom_imports", "dist_params", "find_unused_parameters", "fp16", "total_epochs",
)  # fmt: skip


@dataclass
class Job:
    """A run that can start: ``job.runner.run(job.data_loaders, job.workflow)``."""

    runner: Any
    data_loaders: list[Any]
    workflow: list[tuple[str, int]]

    def run(self) -> None:
        self.runner.run(self.data_loaders, self.workflow)


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """The config with ``options`` (dotted keys) merged in, and its ``custom_imports`` imported.

    Modules are looked for in the current folder too, as ``python -m`` does.

    Raises:
        FileNotFoundError, OSError, SyntaxError: as :meth:`Config.fromfile` says; the message names the file.
        KeyError: a key that is misspelt, or an option that nobody knows.
        ValueError: a key that a run needs is missing.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    cfg = Config.fromfile(path)
    own = set(cfg.keys())
    cfg.merge_from_dict(options or {})
    check_names(cfg, own, path)
    take_total_epochs(cfg, path)
    for key, example in (
        ("model", 'dict(type="SmallCNN")'),
        ("data", 'dict(samples_per_gpu=64, workers_per_gpu=2, train=dict(type="Digits"))'),
        ("optimizer", 'dict(type="SGD", lr=0.1)'),
        ("runner", 'dict(type="EpochBasedRunner", max_epochs=12)'),
        ("lr_config", 'dict(policy="fixed")'),
    ):
        if key not in cfg:
            raise ValueError(f"{path} has no {key!r}, e.g. {key} = {example}")
    return cfg


def take_total_epochs(cfg: Config, path: str) -> None:
    """``total_epochs`` of older configs becomes the runner; beside a runner it must say the same."""
    if "total_epochs" not in cfg:
        return
    epochs = cfg.total_epochs
    if "runner" not in cfg:
        cfg.runner = dict(type="EpochBasedRunner", max_epochs=epochs)
    elif cfg.runner.get("max_epochs", epochs) != epochs:
        raise ValueError(
            f"{path}: total_epochs is {epochs}, but runner.max_epochs is {cfg.runner.max_epochs}; keep one"
        )


def optimizer_config(cfg: Config) -> Any:
    """The config of the optimizer's hook: with ``fp16`` that of Fp16OptimizerHook, as the OpenMMLab projects do."""
    config = cfg.get("optimizer_config", {})
    if cfg.get("fp16") is None:
        return config
    if "type" in config:
        raise ValueError(f"fp16 chooses Fp16OptimizerHook, but optimizer_config says type={config['type']!r}; keep one")
    return {"type": "Fp16OptimizerHook", **config, **cfg.fp16}


def check_names(cfg: Config, own: Collection[str], path: str) -> None:
    """Raise KeyError for names that nobody would read; ``own`` are those that the file at ``path`` has."""
    check_keys([key for key in cfg if key not in own], [*KEYS, *own], "the config, to which an option is given,")
    for key in own:
        meant = misspelt(key, KEYS)
        if meant and meant not in own:
            raise KeyError(f"{path}: {key} is not read; did you mean {meant}? If not, give it another name")
    if isinstance(cfg.get("data"), dict):
        modes = dict.fromkeys(["train", "val", "test", *(str(entry[0]) for entry in cfg.get("workflow", []))])
        loaders = [f"{mode}_dataloader" for mode in modes]
        check_keys(cfg.data, ["samples_per_gpu", "workers_per_gpu", *modes, *loaders], f"{path}: data")


def build(
    cfg: Config,
    *,
    work_dir: str,
    logger: logging.Logger | None = None,
    meta: dict[str, Any] | None = None,
    validate: bool = True,
) -> Job:
    """Everything that ``cfg`` describes, in the order of the four steps. Seeds nothing, resumes nothing.

    Args:
        validate: with ``evaluation`` and ``data.val`` in the config, register an EvalHook.
    """
    model = build_model(cfg)
    workflow = [(mode, int(count)) for mode, count in cfg.get("workflow", [("train", 1)])]
    data_loaders = [build_loader(cfg, mode, shuffle=mode == "train") for mode, _ in workflow]
    optimizer = build_optimizer(model, cfg.optimizer)
    runner = build_runner(
        cfg.runner,
        default_args=dict(model=model, optimizer=optimizer, work_dir=work_dir, logger=logger, meta=meta),
    )
    runner.register_training_hooks(
        cfg.lr_config,
        optimizer_config(cfg),
        cfg.get("checkpoint_config"),
        cfg.get("log_config"),
        cfg.get("momentum_config"),
        custom_hooks_config=cfg.get("custom_hooks"),
    )
    if validate and cfg.get("evaluation") is not None and "val" in cfg.data:
        register_evaluation(cfg, runner)
    return Job(runner, data_loaders, workflow)


def build_model(cfg: Config) -> nn.Module:
    """The model on this process's device: on a GPU where there is one, wrapped for it, and for several processes."""
    model = build_from_cfg(cfg.model, MODELS)
    if callable(getattr(model, "init_weights", None)):
        model.init_weights()
    if get_dist_info()[1] > 1:
        device = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        model = model.cuda() if device else model
        unused = cfg.get("find_unused_parameters", False)
        return MMDistributedDataParallel(model, device_ids=device, find_unused_parameters=unused)
    if torch.cuda.is_available():
        return MMDataParallel(model.cuda(), device_ids=[torch.cuda.current_device()])
    return model  # type: ignore[no-any-return]


def build_loader(cfg: Config, mode: str, *, shuffle: bool) -> Any:
    """The loader of ``cfg.data[mode]``; ``cfg.data[f"{mode}_dataloader"]`` overrides what both loaders share.

    Raises:
        ValueError: the config has no such data set.
    """
    if mode not in cfg.data:
        raise ValueError(f"the workflow has {mode!r}, but data has no {mode!r} = dict(type=...)")
    dataset = build_from_cfg(cfg.data[mode], DATASETS)
    options = {
        "samples_per_gpu": cfg.data.get("samples_per_gpu", 1),
        "workers_per_gpu": cfg.data.get("workers_per_gpu", 0),
        "shuffle": shuffle,
        "seed": cfg.get("seed"),
        **cfg.data.get(f"{mode}_dataloader", {}),
    }
    return build_dataloader(dataset, **options)


def register_evaluation(cfg: Config, runner: Any) -> None:
    """EvalHook, or DistEvalHook with several processes, behind the timer and before the loggers."""
    options = {"by_epoch": "Epoch" in cfg.runner["type"], **cfg.evaluation}
    hook = DistEvalHook if get_dist_info()[1] > 1 else EvalHook
    runner.register_hook(hook(build_loader(cfg, "val", shuffle=False), **options), priority="LOW")


def choose_seed(seed: int | None) -> int:
    """``seed``, or one that is drawn; the same on all ranks."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    if get_dist_info()[1] > 1:
        shared = [seed]
        torch.distributed.broadcast_object_list(shared, src=0)
        seed = shared[0]
    return seed


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fastrunner.train", description="Train what a config file describes.")
    parser.add_argument("config", help="a .py (it is executed), .yaml or .json file")
    parser.add_argument("--work-dir", help="for logs and checkpoints; default: ./work_dirs/<name of the config>")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume-from", metavar="FILE", help="a checkpoint to continue from")
    resume.add_argument("--auto-resume", action="store_true", help="continue from the work dir's latest.pth, if any")
    parser.add_argument("--no-validate", action="store_true", help="no evaluation during training")
    parser.add_argument("--seed", type=int, help="of everything random; default: the config's, else a drawn one")
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms of cuDNN only")
    parser.add_argument("--step", choices=RECIPES, help="recipe of the step; default: the config's runner.step")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none", help="who has started the processes")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="e.g. optimizer.lr=0.01"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if args.launcher != "none":
        init_dist(args.launcher, **cfg.get("dist_params", {}))
    name = osp.splitext(osp.basename(args.config))[0]
    work_dir = args.work_dir or cfg.get("work_dir") or osp.join("work_dirs", name)
    os.makedirs(work_dir, exist_ok=True)
    timestamp = get_time_str()
    logger = get_logger(
        "fastrunner", log_file=osp.join(work_dir, f"{timestamp}.log"), log_level=cfg.get("log_level", "INFO")
    )
    if args.step:
        cfg.runner.step = asdict(make_config(cfg.runner.get("step"), args.step))
    cfg.seed = choose_seed(args.seed if args.seed is not None else cfg.get("seed"))
    set_random_seed(cfg.seed, deterministic=args.deterministic)
    environment = collect_env()
    logger.info("environment:\n" + "\n".join(f"{key}: {value}" for key, value in environment.items()))
    logger.info(f"config:\n{cfg.pretty_text}\nseed {cfg.seed}, deterministic: {args.deterministic}")
    if get_dist_info()[0] == 0:
        cfg.dump(osp.join(work_dir, osp.basename(args.config)))

    meta = dict(config=cfg.pretty_text, seed=cfg.seed, exp_name=osp.basename(args.config), env_info=str(environment))
    job = build(cfg, work_dir=work_dir, logger=logger, meta=meta, validate=not args.no_validate)
    job.runner.timestamp = timestamp  # the .log.json beside the .log, by the same name
    latest = osp.join(work_dir, "latest.pth")
    resume_from = args.resume_from or cfg.get("resume_from")
    if args.auto_resume and osp.exists(latest):
        resume_from = latest
    if resume_from:
        job.runner.resume(resume_from)
    elif cfg.get("load_from"):
        job.runner.load_checkpoint(cfg.load_from)
    job.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
