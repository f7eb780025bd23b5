"""Two checkpoints that mmcv 1.7.2 wrote, ``mmcv_iter/iter_6.pth`` and ``mmcv_epoch/epoch_2.pth``, and how the runs that
wrote them ended (``mmcv_files.json``). Their meta holds what OpenMMLab's scripts and EvalHook put there.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import numpy as np

from .parts import Loader, Toy, make_runner, sgd, weights

BATCHES = 3
SAVED_AT = dict(iter=6, epoch=2)  # both at the end of an epoch: mmcv starts the data over when it resumes
LENGTH = dict(iter=9, epoch=3)
CASES = dict(iter={}, epoch={})
FOLDER = pathlib.Path(__file__).parent

META: dict[str, Any] = dict(
    seed=3,
    exp_name="toy.py",
    env_info="sys.platform: linux\nPython: 3.11",
    config="gpu_ids = range(0, 1)\nmodel = dict(type='Toy')\n",
    CLASSES=("cat", "dog"),
    hook_msgs=dict(best_score=np.float64(0.75), best_ckpt="work/best_acc.pth", scores=np.arange(3.0)),
)


def path_of(kind: str) -> str:
    return str(FOLDER / f"mmcv_{kind}" / f"{kind}_{SAVED_AT[kind]}.pth")


def prepare(api: Any, kind: str, folder: str) -> Any:
    model = Toy()
    runner = make_runner(api, kind, LENGTH[kind], model=model, optimizer=sgd(model), work_dir=folder, meta=dict(META))
    steps = dict(
        policy="step", step=[4, 7], by_epoch=False, gamma=0.5, warmup="linear", warmup_iters=2, warmup_ratio=0.1
    )
    checkpoint = dict(interval=SAVED_AT[kind], max_keep_ckpts=5)
    runner.register_training_hooks(steps, dict(grad_clip=dict(max_norm=0.5)), checkpoint, None)
    return runner


def finish(runner: Any) -> dict[str, Any]:
    runner.run([Loader(BATCHES)], [("train", 1)])
    return dict(
        weights=weights(runner.model),
        momentum=[state["momentum_buffer"].tolist() for state in runner.optimizer.state.values()],
        lr=runner.current_lr(),
        epoch=runner.epoch,
        iter=runner.iter,
    )


def record(api: Any, kind: str, folder: str) -> dict[str, Any]:
    """Only mmcv writes these files; the name of the case is the runner's kind."""
    runner = prepare(api, kind, folder)
    result = finish(runner)
    os.makedirs(os.path.dirname(path_of(kind)), exist_ok=True)
    shutil.copy(os.path.join(folder, os.path.basename(path_of(kind))), path_of(kind))
    return result
