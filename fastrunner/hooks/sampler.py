"""The order of samples, told to samplers that want to know the epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.foreign import set_epoch
from ..registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner.base import BaseRunner


@HOOKS.register_module()
class DistSamplerSeedHook(Hook):
    """Calls ``set_epoch`` of the loader's sampler, or of its batch sampler's sampler, before each epoch.

    For loaders of your own with a DistributedSampler. Those of ``build_dataloader`` follow the epoch by themselves.
    """

    def before_epoch(self, runner: BaseRunner) -> None:
        set_epoch(runner.data_loader, runner.epoch)
