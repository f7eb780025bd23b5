"""python -m fastrunner.train: from a config file to a run, and on from its checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrunner import HOOKS, MODELS, Config, OptimizerHook
from fastrunner.model.parallel import MMDataParallel
from fastrunner.train import build, build_model, choose_seed, load_config, main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def at_root(monkeypatch, tmp_path):
    """The examples import each other from the repository's root."""
    monkeypatch.syspath_prepend(str(ROOT))
    return str(tmp_path / "out")


def digits(work_dir, *options, epochs=2):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    changes = [
        "--cfg-options",
        f"runner.max_epochs={epochs}",
        "data.samples_per_gpu=512",
        "checkpoint_config.interval=1",
    ]
    return main([str(EXAMPLES / "digits_epoch.py"), "--work-dir", work_dir, *options, *changes])


def records(work_dir):
    return [json.loads(line) for file in sorted(Path(work_dir).glob("*.log.json")) for line in file.open()]


def test_the_digits_example_trains_evaluates_and_goes_on(at_root, capfd):
    assert digits(at_root) == 0
    names = set(os.listdir(at_root))
    assert {"digits_epoch.py", "epoch_1.pth", "epoch_2.pth", "latest.pth"} <= names
    assert any(name.startswith("best_acc_epoch_") for name in names)
    content = torch.load(os.path.join(at_root, "latest.pth"), weights_only=True)
    assert content["meta"]["seed"] == 0
    assert content["meta"]["exp_name"] == "digits_epoch.py"
    assert "custom_imports" in content["meta"]["config"]
    assert [r["epoch"] for r in records(at_root) if r.get("mode") == "val"] == [1, 2]
    again = load_config(os.path.join(at_root, "digits_epoch.py"))  # what was dumped is a config
    assert again.runner.max_epochs == 2

    assert digits(at_root, "--auto-resume", "--no-validate", epochs=3) == 0
    assert {"epoch_2.pth", "epoch_3.pth"} <= set(os.listdir(at_root))  # max_keep_ckpts=2
    whole = at_root + "_whole"
    assert digits(whole, epochs=3) == 0
    one, other = (torch.load(f"{each}/epoch_3.pth", weights_only=True)["state_dict"] for each in (at_root, whole))
    # The lr of 2 epochs is not that of 3: only what does not follow from it is equal.
    assert one.keys() == other.keys()
    assert digits(at_root, "--resume-from", f"{whole}/epoch_2.pth", epochs=3) == 0
    one = torch.load(f"{at_root}/epoch_3.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_auto_resume_without_a_checkpoint_starts_anew(at_root):
    assert digits(at_root, "--auto-resume", "--seed", "5", epochs=1) == 0
    assert torch.load(os.path.join(at_root, "latest.pth"), weights_only=True)["meta"]["seed"] == 5


@pytest.mark.slow
def test_the_photos_example(at_root):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    options = ["--cfg-options", "runner.max_iters=60", "evaluation.interval=50", "checkpoint_config.interval=50"]
    assert main([str(EXAMPLES / "photos_iter.py"), "--work-dir", at_root, *options]) == 0
    assert "iter_50.pth" in os.listdir(at_root)
    assert any(r.get("mode") == "val" for r in records(at_root))


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    command += [
        "-m",
        "fastrunner.train",
        "examples/digits_epoch.py",
        "--launcher",
        "pytorch",
        "--work-dir",
        str(tmp_path),
    ]
    command += ["--cfg-options", "runner.max_epochs=2", "dist_params.backend=gloo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [r["epoch"] for r in records(tmp_path) if r.get("mode") == "val"] == [1, 2]
    assert os.path.exists(tmp_path / "epoch_2.pth")
    (text,), (as_json,) = (list(tmp_path.glob(f"*{end}")) for end in (".log", ".log.json"))
    assert as_json.name == f"{text.name}.json"  # one run, one name


CONFIG = dict(
    model=dict(type="TrainTestModel"),
    data=dict(
        samples_per_gpu=2,
        workers_per_gpu=0,
        train=dict(type="ArrayDataset", arrays=dict(img="x.npy")),
        val=dict(type="ArrayDataset", arrays=dict(img="x.npy")),
        train_dataloader=dict(samples_per_gpu=3, drop_last=True),
    ),
    optimizer=dict(type="SGD", lr=0.1),
    lr_config=dict(policy="fixed"),
    runner=dict(type="IterBasedRunner", max_iters=3),
)


@MODELS.register_module(force=True)
class TrainTestModel(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
        self.ready = False

    def init_weights(self):
        self.ready = True

    def train_step(self, data_batch, optimizer=None, **kwargs):
        loss = self(data_batch["img"]).square().mean()
        return dict(loss=loss, log_vars=dict(loss=loss.detach()), num_samples=len(data_batch["img"]))

    val_step = train_step


def write(config, name="config.yaml"):
    import numpy as np

    np.save("x.npy", np.ones((10, 2), np.float32))
    Path(name).write_text(json.dumps(config))  # JSON is YAML
    return name


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_yaml_and_json(name):
    cfg = load_config(write(CONFIG, name), {"runner.max_iters": 4})
    cfg.seed = 0
    job = build(cfg, work_dir="out")
    assert job.runner.model.ready
    assert [loader.batch_size for loader in job.data_loaders] == [3]
    job.run()
    assert job.runner.iter == 4
    cfg.workflow = [["train", 1], ["val", 1]]
    loaders = build(cfg, work_dir="out").data_loaders
    assert [loader.batch_size for loader in loaders] == [3, 2]
    assert [loader.order.shuffle for loader in loaders] == [True, False]


def test_evaluation_and_hooks_of_the_config(monkeypatch):
    @HOOKS.register_module(force=True)
    class TrainTestHook(HOOKS.get("ClosureHook")):
        def __init__(self):
            super().__init__("before_run", lambda runner: seen.append(runner.meta))

    seen = []
    config = {**CONFIG, "custom_hooks": [dict(type="TrainTestHook")], "evaluation": dict(interval=2)}
    job = build(load_config(write(config)), work_dir="out", meta=dict(a=1))
    (hook,) = (hook for hook in job.runner.hooks if type(hook).__name__ == "EvalHook")
    assert not hook.by_epoch  # as the runner counts
    assert not hook.dataloader.order.shuffle
    names = [type(hook).__name__ for hook in job.runner.hooks]
    assert names.index("IterTimerHook") < names.index("EvalHook")
    with pytest.raises(TypeError, match="no evaluate"):
        job.run()
    assert build(load_config(write(config)), work_dir="out", validate=False).runner.hooks[-1].priority < 90


def test_fp16_and_total_epochs_of_older_configs():
    """What mmdet's and mmcls' configs say at top level is not silently left out."""
    config = {key: value for key, value in CONFIG.items() if key != "runner"}
    config |= dict(total_epochs=2, fp16=dict(loss_scale=8.0), optimizer_config=dict(grad_clip=dict(max_norm=1.0)))
    job = build(load_config(write(config)), work_dir="out")
    (hook,) = (hook for hook in job.runner.hooks if isinstance(hook, OptimizerHook))
    assert type(hook).__name__ == "Fp16OptimizerHook"
    assert hook.grad_clip == dict(max_norm=1.0)
    job.run()
    assert (job.runner.epoch, type(job.runner).__name__) == (2, "EpochBasedRunner")

    both = {**CONFIG, "total_epochs": 2, "runner": dict(type="EpochBasedRunner", max_epochs=3)}
    with pytest.raises(ValueError, match=r"total_epochs is 2, but runner\.max_epochs is 3"):
        load_config(write(both))
    twice = {**config, "optimizer_config": dict(type="OptimizerHook")}
    with pytest.raises(ValueError, match="fp16 chooses Fp16OptimizerHook"):
        build(load_config(write(twice)), work_dir="out")


@pytest.mark.cuda
def test_on_a_gpu_the_model_is_wrapped():
    model = build_model(Config(CONFIG))
    assert isinstance(model, MMDataParallel)
    assert next(model.parameters()).is_cuda


def test_seeds():
    assert choose_seed(3) == 3
    assert choose_seed(0) == 0
    assert choose_seed(None) != choose_seed(None)  # once in 2**31 this fails


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(model=None), ValueError, "config.yaml has no 'model', e.g. model = "),
        (dict(runner=None), ValueError, "config.yaml has no 'runner'"),
        (dict(model=dict(type="TrainTestModle")), KeyError, "TrainTestModel"),
        (dict(model=dict(type="TrainTestModel", depth=3)), TypeError, "TrainTestModel: .*depth"),
        (dict(data=dict(train=dict(type="Digit"))), KeyError, "Digits"),
        (dict(workflow=[["val", 1]], data=dict(train=dict(type="Digits"))), ValueError, "data has no 'val'"),
        (dict(custom_imports=dict(imports=["no_such_module"])), ImportError, "no_such_module"),
    ],
)
def test_bad_configs(change, error, says):
    config = {**CONFIG, **change}
    path = write({key: value for key, value in config.items() if value is not None})
    with pytest.raises(error, match=says):
        main([path, "--work-dir", "out"])


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (dict(evalution=dict(interval=1)), {}, r"config\.yaml: evalution is not read; did you mean evaluation\?"),
        (dict(optimizer_confg={}), {}, r"did you mean optimizer_config\?"),
        ({}, {"optimzer.lr": 1.0}, "no optimzer; did you mean optimizer instead of optimzer"),
        ({}, {"banana": 1}, "no banana"),
        ({}, {"data.samples_per_gpus": 8}, "data has no samples_per_gpus; did you mean samples_per_gpu"),
        (dict(data={**CONFIG["data"], "vall": {}}), {}, "data has no vall; did you mean val"),
    ],
)
def test_names_that_nobody_would_read(change, options, says):
    with pytest.raises(KeyError, match=says):
        load_config(write({**CONFIG, **change}), options)


def test_variables_of_a_config_are_left_alone():
    own = dict(data_root="x", dataset_type="y", img_norm_cfg={}, optimizers=[1], fp16=None, total_epochs=3)
    options = {"dataset_type": "z", "evaluation.interval": 3, "data.test.type": "Digits"}
    cfg = load_config(write({**CONFIG, **own}), options)
    assert cfg.dataset_type == "z"
    assert cfg.evaluation.interval == 3


def test_bad_commands(capsys):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        main(["nowhere.py"])
    with pytest.raises(SystemExit):
        main([write(CONFIG), "--resume-from", "a.pth", "--auto-resume"])
    with pytest.raises(SystemExit):
        main([write(CONFIG), "--launcher", "hope"])
    assert "invalid choice: 'hope'" in capsys.readouterr().err
