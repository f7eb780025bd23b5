"""``import fastrunner.compat.mmcv``: import lines as projects have them, an installed mmcv, a whole training script.

Each case runs in an interpreter of its own: the stand-ins would stay in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastrunner.compat import names

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE.parent / "golden" / "compat.json").read_text(encoding="utf-8"))

# As they stand in mmdet 2, mmseg 0, mmcls 0, mmdet3d 0, BEVFormer, MapTR, bevfusion and others.
IMPORTS = """
import mmcv
import mmcv.runner
import mmcv.runner.hooks.lr_updater
from mmcv import Config, ConfigDict, DictAction
from mmcv import is_list_of, is_str, mkdir_or_exist, ProgressBar, dump, load
from mmcv.cnn import MODELS, bias_init_with_prob, constant_init, initialize, kaiming_init, normal_init, xavier_init
from mmcv.cnn.utils.weight_init import constant_init, trunc_normal_, trunc_normal_init
from mmcv.parallel import DataContainer as DC
from mmcv.parallel import MMDataParallel, MMDistributedDataParallel, collate, is_module_wrapper, scatter
from mmcv.parallel.data_container import DataContainer
from mmcv.parallel.collate import collate as collate_fn
from mmcv.runner import (DistSamplerSeedHook, EpochBasedRunner, OptimizerHook, build_optimizer, build_runner,
                         get_dist_info)
from mmcv.runner import BaseModule, ModuleList, Sequential, auto_fp16, force_fp32, wrap_fp16_model
from mmcv.runner import BaseRunner, IterBasedRunner, IterLoader, LogBuffer, Runner, RUNNERS
from mmcv.runner import CheckpointLoader, _load_checkpoint, load_checkpoint, load_state_dict, save_checkpoint
from mmcv.runner import DefaultOptimizerConstructor, OPTIMIZERS, OPTIMIZER_BUILDERS
from mmcv.runner import HOOKS, Hook, LoggerHook, Priority, get_priority, get_host_info, get_time_str, obj_from_dict
from mmcv.runner import init_dist, master_only, set_random_seed, allreduce_params, allreduce_grads
from mmcv.runner.base_module import BaseModule, ModuleList
from mmcv.runner.base_runner import BaseRunner
from mmcv.runner.builder import RUNNERS, RUNNER_BUILDERS, build_runner_constructor
from mmcv.runner.checkpoint import _load_checkpoint_with_prefix, get_state_dict, save_checkpoint, weights_to_cpu
from mmcv.runner.dist_utils import get_dist_info, master_only
from mmcv.runner.epoch_based_runner import EpochBasedRunner
from mmcv.runner.fp16_utils import cast_tensor_type, auto_fp16, patch_norm_fp32
from mmcv.runner.hooks import HOOKS, Hook, LrUpdaterHook
from mmcv.runner.hooks.checkpoint import CheckpointHook
from mmcv.runner.hooks.ema import EMAHook
from mmcv.runner.hooks.hook import HOOKS, Hook
from mmcv.runner.hooks.logger import LoggerHook
from mmcv.runner.hooks.logger.base import LoggerHook
from mmcv.runner.hooks.logger.tensorboard import TensorboardLoggerHook
from mmcv.runner.hooks.logger.text import TextLoggerHook
from mmcv.runner.hooks.logger.wandb import WandbLoggerHook
from mmcv.runner.hooks.lr_updater import CosineAnnealingLrUpdaterHook, annealing_cos, format_param
from mmcv.runner.hooks.momentum_updater import MomentumUpdaterHook
from mmcv.runner.hooks.optimizer import HOOKS, OptimizerHook
from mmcv.runner.iter_based_runner import IterBasedRunner, IterLoader
from mmcv.runner.log_buffer import LogBuffer
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor
from mmcv.runner.optimizer.builder import OPTIMIZERS, TORCH_OPTIMIZERS, build_optimizer
from mmcv.runner.optimizer.default_constructor import DefaultOptimizerConstructor
from mmcv.runner.priority import Priority, get_priority
from mmcv.runner.utils import get_host_info, get_time_str
from mmcv.engine import collect_results_cpu, collect_results_gpu, multi_gpu_test, single_gpu_test
from mmcv.runner import DistEvalHook as BaseDistEvalHook
from mmcv.runner import EvalHook
from mmcv.runner.hooks.evaluation import DistEvalHook, EvalHook
from mmcv.runner import Fp16OptimizerHook, GradientCumulativeOptimizerHook
from mmcv.runner import GradientCumulativeFp16OptimizerHook
from mmcv.runner.hooks.optimizer import Fp16OptimizerHook
from mmcv.utils import Registry, build_from_cfg, collect_env, digit_version, get_logger, print_log, TORCH_VERSION
from mmcv.utils import is_seq_of, is_tuple_of, import_modules_from_strings, _BatchNorm
from mmcv.utils.config import Config
from mmcv.utils.logging import logger_initialized
from mmcv.utils.parrots_wrapper import _BatchNorm, SyncBatchNorm
from mmcv.utils.registry import Registry
"""


def run(code: str, *paths: object, expect_error: bool = False) -> str:
    """What a fresh interpreter prints; ``paths`` go before its own."""
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode != 0) == expect_error, done.stderr
    return done.stderr if expect_error else done.stdout


def test_import_lines_of_real_projects():
    code = f"""
import fastrunner, fastrunner.compat.mmcv
{IMPORTS}
same = dict(EpochBasedRunner=EpochBasedRunner, Hook=Hook, HOOKS=HOOKS, BaseModule=BaseModule, DataContainer=DC,
            collate=collate_fn, Config=Config, Registry=Registry, get_logger=get_logger, scatter=scatter,
            DefaultOptimizerConstructor=DefaultOptimizerConstructor, CheckpointHook=CheckpointHook)
print(all(value is getattr(fastrunner, name) for name, value in same.items()))
print(mmcv.runner.hooks.lr_updater.annealing_cos is annealing_cos, mmcv.__version__, mmcv.version_info[:2])

from fastrunner.compat import names
for path in (*names.OURS, *names.STAND_INS):
    exec(f"from {{path}} import *", {{}})  # every name of every module leads somewhere
try:
    mmcv.runner.PaviLoggerHook()
except ImportError as error:
    print(error)
"""
    *same, refused = run(code).splitlines()
    assert same == ["True", "True 1.7.2 (1, 7)"]
    assert refused.startswith("fastrunner does not carry MMCV's PaviLoggerHook")


def test_all_of_mmcv_runners_public_names_are_there():
    assert set(GOLDEN["public names"]) <= set(names.OURS["mmcv.runner"]) & names.HOME.keys()


def test_what_is_missing_says_so():
    said = run("import fastrunner.compat.mmcv\nfrom mmcv import imread", expect_error=True)
    assert "cannot import name 'imread' from 'mmcv'" in said
    said = run("import fastrunner.compat.mmcv, mmcv.utils\nmmcv.utils.Timer", expect_error=True)
    assert "mmcv.utils has no Timer: fastrunner.compat.mmcv stands in for it" in said


def test_it_imports_little_before_names_are_used():
    code = """
import sys
import fastrunner.compat.mmcv
import mmcv.runner
print(sorted(m for m in sys.modules if m.startswith(("fastrunner.hooks", "fastrunner.runner", "fastrunner.model"))))
"""
    assert run(code) == "[]\n"


# ---------------------------------------------------------------- an installed mmcv

INSTALLED = {
    "__init__.py": "from .utils import *\n__version__ = '1.6.0'\nimread = 'theirs'\n",
    "utils/__init__.py": """
from .config import Config, ConfigDict, DictAction
from .logging import get_logger, logger_initialized, print_log
from .registry import Registry, build_from_cfg
from .env import collect_env
Timer = "theirs"
""",
    "utils/config.py": "class Config: pass\nclass ConfigDict: pass\nclass DictAction: pass\n",
    "utils/env.py": "def collect_env(): pass\n",
    "utils/logging.py": "logger_initialized = {}\ndef get_logger(): pass\ndef print_log(): pass\n",
    "utils/registry.py": "class Registry: pass\ndef build_from_cfg(): pass\n",
    "runner/__init__.py": "raise ImportError('mmcv.runner needs torchvision')\n",
    "cnn/__init__.py": """
from mmcv.runner import BaseModule
from mmcv.utils import Registry
from .utils.weight_init import initialize
MODELS = Registry("model")
class ConvModule(BaseModule): pass
""",
    "cnn/utils/__init__.py": "",
    "cnn/utils/weight_init.py": "initialize = 'theirs'\n",
}


@pytest.fixture
def installed(tmp_path):
    """A folder with a package ``mmcv`` that has the shape of the real one; its runner does not import."""
    for name, text in INSTALLED.items():
        path = tmp_path / "site" / "mmcv" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "site"


def test_an_installed_mmcv_keeps_the_rest(installed):
    code = """
import fastrunner, fastrunner.compat.mmcv
import mmcv, mmcv.cnn
from mmcv.runner import EpochBasedRunner
from mmcv.utils import Registry, Timer, Config
from mmcv.utils.registry import Registry as Same
print(mmcv.__version__, mmcv.imread, Timer)
print([Registry is fastrunner.Registry, Same is Registry, Config is fastrunner.Config, mmcv.Config is Config,
       EpochBasedRunner is fastrunner.EpochBasedRunner, mmcv.runner.EpochBasedRunner is EpochBasedRunner,
       issubclass(mmcv.cnn.ConvModule, fastrunner.BaseModule), type(mmcv.cnn.MODELS) is Registry,
       mmcv.cnn.initialize is fastrunner.initialize, mmcv.utils.get_logger is fastrunner.get_logger])
child = Registry("mine", parent=mmcv.cnn.MODELS, scope="mine")
"""
    assert run(code, installed) == f"1.6.0 theirs theirs\n{[True] * 10}\n"


def test_too_late_is_an_error(installed):
    (installed / "mmcv" / "runner" / "__init__.py").write_text("")
    said = run("import mmcv.runner\nimport fastrunner.compat.mmcv", installed, expect_error=True)
    assert "import fastrunner.compat.mmcv before anything imports mmcv (already imported: mmcv.runner)" in said


# ---------------------------------------------------------------- a training script


def test_a_script_of_mmcv_names_trains_as_with_mmcv(tmp_path):
    code = f"""
import fastrunner.compat.mmcv, runpy, sys
sys.argv = ["train_script.py", {str(tmp_path / "work")!r}, "--cfg-options", "optimizer.lr=0.1"]
runpy.run_path({str(HERE / "train_script.py")!r}, run_name="__main__")
"""
    assert json.loads(run(code).splitlines()[-1]) == GOLDEN["script"]
