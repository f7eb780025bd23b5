"""From a config to a runner."""

from __future__ import annotations

import copy
from typing import Any

from ..registry import RUNNER_BUILDERS, RUNNERS, build_from_cfg


@RUNNER_BUILDERS.register_module()
class DefaultRunnerConstructor:
    """Builds ``runner_cfg`` from RUNNERS. Register another one to change how runners are made.

    Raises:
        TypeError: ``runner_cfg`` is not a dict.
    """

    def __init__(self, runner_cfg: dict[str, Any], default_args: dict[str, Any] | None = None) -> None:
        if not isinstance(runner_cfg, dict):
            raise TypeError(f"runner_cfg should be a dict, got {type(runner_cfg).__name__}")
        self.runner_cfg = runner_cfg
        self.default_args = default_args

    def __call__(self) -> Any:
        return build_from_cfg(self.runner_cfg, RUNNERS, default_args=self.default_args)


def build_runner_constructor(cfg: dict[str, Any]) -> Any:
    return build_from_cfg(cfg, RUNNER_BUILDERS)


def build_runner(cfg: dict[str, Any], default_args: dict[str, Any] | None = None) -> Any:
    """``dict(type="EpochBasedRunner", max_epochs=12)`` and the objects in ``default_args`` as a runner.

    ``constructor`` in ``cfg`` names another builder of RUNNER_BUILDERS. ``cfg`` is not changed.
    """
    if not isinstance(cfg, dict):
        raise TypeError(f"the runner's config must be a dict, got {type(cfg).__name__}")
    runner_cfg = copy.deepcopy(cfg)
    constructor = runner_cfg.pop("constructor", "DefaultRunnerConstructor")
    build = build_runner_constructor({"type": constructor, "runner_cfg": runner_cfg, "default_args": default_args})
    return build()
