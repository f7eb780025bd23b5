"""Records the golden files from mmcv 1.7.2 itself.

It needs an environment of its own, with the torch that the tests use (numbers are compared bit for bit):

    python -m venv mmcv-env
    mmcv-env/bin/pip install torch==2.13.0 "setuptools<70" wheel pyyaml
    MMCV_WITH_OPS=0 mmcv-env/bin/pip install --no-build-isolation mmcv==1.7.2
    mmcv-env/bin/python tests/golden/record.py [scenario ...]

mmcv imports torchvision only to look models up by name; an empty stand-in is enough. Its sleeps are taken out.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pathlib
import sys
import tempfile
import time
import types
from typing import Any

HERE = pathlib.Path(__file__).parent


def import_mmcv() -> tuple[Any, Any]:
    """``mmcv`` and ``mmcv.runner``, without torchvision."""
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    mmcv = importlib.import_module("mmcv")
    if mmcv.__version__ != "1.7.2":
        raise SystemExit(f"the golden files are of mmcv 1.7.2, this is {mmcv.__version__}")
    return mmcv, importlib.import_module("mmcv.runner")


def record_config(mmcv: Any) -> dict[str, Any]:
    from golden import config_cases

    files = {}
    for name, case in config_cases.FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            files[name] = config_cases.run_file(case, mmcv.Config, folder)
    merges = {name: config_cases.run_merge(case, mmcv.Config) for name, case in config_cases.MERGES.items()}
    actions = {text: config_cases.run_action(text, mmcv.DictAction) for text in config_cases.ACTIONS}
    return dict(files=files, merges=merges, actions=actions)


def record_compat(mmcv: Any) -> dict[str, Any]:
    """What the training script of tests/compat prints."""
    from compat import train_script

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        train_script.main([folder, "--cfg-options", "optimizer.lr=0.1"])
    public = importlib.import_module("mmcv.runner").__all__
    return {"script": json.loads(printed.getvalue().splitlines()[-1]), "public names": sorted(public)}


def record_files(mmcv: Any) -> dict[str, Any]:
    """Writes mmcv's own checkpoints, and what the runs that wrote them ended with."""
    from golden import mmcv_files

    results = {}
    for kind in mmcv_files.CASES:
        with tempfile.TemporaryDirectory() as folder:
            results[kind] = mmcv_files.record(importlib.import_module("mmcv.runner"), kind, folder)
    return results


def main(wanted: list[str]) -> None:
    sys.path.insert(0, str(HERE.parent))
    from golden import scenarios

    mmcv, runner = import_mmcv()
    time.sleep = lambda seconds: None
    whole = dict(config=record_config, compat=record_compat, mmcv_files=record_files)
    for name in wanted or [*whole, *scenarios.SCENARIOS]:
        begin = time.perf_counter()
        if name in whole:
            results = whole[name](mmcv)
        else:
            results = {case: scenarios.play(name, case, runner) for case in scenarios.SCENARIOS[name].CASES}
        # One case a line: small files, and readable differences.
        lines = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in results.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (HERE / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}: {len(results)} cases, {len(text) / 1024:.0f} KiB, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
