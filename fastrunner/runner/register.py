"""``register_*``: from config dicts to hooks at MMCV's priorities. No caller's dict is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hooks.hook import Hook
from ..registry import HOOKS, build_from_cfg
from ..spelling import check_keys

if TYPE_CHECKING:
    from ..hooks.priority import Priority

    Config = dict[str, Any] | Hook | None

TIMER = {"type": "IterTimerHook"}


class RegisterMixin:
    """The ``register_*`` methods of a runner. Each accepts a dict, a hook, or None (nothing happens)."""

    if TYPE_CHECKING:

        def register_hook(self, hook: Hook, priority: int | str | Priority = "NORMAL") -> None: ...

    def register_hook_from_cfg(self, hook_cfg: dict[str, Any]) -> None:
        """Build from HOOKS and register; ``priority`` in the dict is the hook's (default NORMAL)."""
        cfg = dict(hook_cfg)
        priority = cfg.pop("priority", "NORMAL")
        self.register_hook(build_from_cfg(cfg, HOOKS), priority=priority)

    def register_lr_hook(self, lr_config: Config) -> None:
        self._register(policy_cfg(lr_config, "LrUpdaterHook"), "VERY_HIGH")

    def register_momentum_hook(self, momentum_config: Config) -> None:
        self._register(policy_cfg(momentum_config, "MomentumUpdaterHook"), "HIGH")

    def register_optimizer_hook(self, optimizer_config: Config) -> None:
        self._register(optimizer_config, "ABOVE_NORMAL", type="OptimizerHook")

    def register_checkpoint_hook(self, checkpoint_config: Config) -> None:
        self._register(checkpoint_config, "NORMAL", type="CheckpointHook")

    def register_profiler_hook(self, profiler_config: Config) -> None:
        self._register(profiler_config, "NORMAL", type="ProfilerHook")

    def register_timer_hook(self, timer_config: Config) -> None:
        self._register(timer_config, "LOW")

    def register_logger_hooks(self, log_config: dict[str, Any] | None) -> None:
        """``log_config``: dict(interval=..., hooks=[dict(type=...) or a hook, ...]); a hook's own interval wins.

        Raises:
            KeyError: no ``interval`` or no ``hooks``, or another key.
        """
        if log_config is None:
            return
        for key in ("interval", "hooks"):
            if key not in log_config:
                raise KeyError(f'log_config needs {key!r}, e.g. dict(interval=50, hooks=[dict(type="TextLoggerHook")])')
        check_keys(log_config, ("interval", "hooks"), "log_config")
        for info in log_config["hooks"]:
            if isinstance(info, dict):
                info = build_from_cfg(info, HOOKS, default_args={"interval": log_config["interval"]})
            self.register_hook(info, priority="VERY_LOW")

    def register_custom_hooks(self, custom_config: list[dict[str, Any] | Hook] | dict[str, Any] | Hook | None) -> None:
        """One hook or config, or a list of them; configs may hold ``priority``."""
        if custom_config is None:
            return
        for item in custom_config if isinstance(custom_config, (list, tuple)) else [custom_config]:
            if isinstance(item, dict):
                self.register_hook_from_cfg(item)
            else:
                self.register_hook(item, priority="NORMAL")

    def register_training_hooks(
        self,
        lr_config: Config,
        optimizer_config: Config = None,
        checkpoint_config: Config = None,
        log_config: dict[str, Any] | None = None,
        momentum_config: Config = None,
        timer_config: Config = TIMER,
        custom_hooks_config: list[dict[str, Any] | Hook] | dict[str, Any] | Hook | None = None,
    ) -> None:
        """Register the default hooks.

        | hook       | priority          |
        |------------|-------------------|
        | lr         | VERY_HIGH (10)    |
        | momentum   | HIGH (30)         |
        | optimizer  | ABOVE_NORMAL (40) |
        | checkpoint | NORMAL (50)       |
        | timer      | LOW (70)          |
        | loggers    | VERY_LOW (90)     |
        | custom     | theirs, or NORMAL |
        """
        self.register_lr_hook(lr_config)
        self.register_momentum_hook(momentum_config)
        self.register_optimizer_hook(optimizer_config)
        self.register_checkpoint_hook(checkpoint_config)
        self.register_timer_hook(timer_config)
        self.register_logger_hooks(log_config)
        self.register_custom_hooks(custom_hooks_config)

    def _register(self, config: Any, priority: str, **defaults: Any) -> None:
        if config is None:
            return
        if isinstance(config, dict):
            config = build_from_cfg(config, HOOKS, default_args=defaults or None)
        self.register_hook(config, priority=priority)


def policy_cfg(config: Any, suffix: str) -> Any:
    """``dict(policy="step", ...)`` -> ``dict(type="StepLrUpdaterHook", ...)``; other values as they are.

    The policy may be written in any case: ``CosineAnnealing``, ``cosineannealing``.

    Raises:
        ValueError: no ``policy``.
        KeyError: one that is not registered; the known ones are listed.
    """
    if not isinstance(config, dict):
        return config
    config = dict(config)
    if "policy" not in config:
        raise ValueError(f"the config of a {suffix} needs 'policy', e.g. policy=\"step\"; got {sorted(config)}")
    policy = config.pop("policy")
    known = {name.lower(): name for name in HOOKS.module_dict if name.endswith(suffix) and name != suffix}
    name = known.get(f"{policy}{suffix}".lower(), f"{policy}{suffix}")
    if name not in HOOKS:
        policies = ", ".join(sorted(each.removesuffix(suffix) for each in known.values()))
        raise KeyError(f"unknown policy {policy!r}; known: {policies}")
    return {**config, "type": name}
