"""``import fastrunner.compat.mmcv`` as a script's first line: mmcv's import paths lead to fastrunner.

``mmcv.runner`` and ``mmcv.parallel`` with their submodules, and a few names of ``mmcv.utils``, are ours from then on.
Everything else (``mmcv.ops``, ``mmcv.cnn``, images) stays that of an installed mmcv; where none is installed, stand-ins
have the names of :mod:`fastrunner.compat.names`. Objects are imported when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

from .names import HOME, NOT_CARRIED, OURS, REPLACED, STAND_INS

VERSION = "1.7.2"  # of the mmcv whose names stand-ins have


class StandIn(types.ModuleType):
    """One of mmcv's modules: a table of names, each resolved when it is first asked for."""

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        super().__init__(path, f"fastrunner's objects under the path {path}.")
        self.__all__ = sorted(set(names) & HOME.keys())
        self.__file__ = __file__
        self.__path__: list[str] = []  # a package, but one whose submodules are all in sys.modules already
        self.__spec__ = ModuleSpec(path, None, origin=__file__, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__all__:
            raise AttributeError(
                f"{self.__name__} has no {name}: fastrunner.compat.mmcv stands in for it, without everything it has; "
                "install mmcv 1.x for what is missing outside mmcv.runner and mmcv.parallel"
            )
        value = resolve(name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


def resolve(name: str) -> Any:
    """The object that stands behind a name of mmcv's."""
    module, _, attribute = HOME[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found.get(name) if name in NOT_CARRIED else found


def install() -> None:
    """Put our modules under mmcv's paths. Called by the import of this module.

    Raises:
        ImportError: mmcv's own modules are imported already: what was taken from them would not fit ours.
    """
    early = [path for path in sys.modules if path in OURS or path.startswith(("mmcv.runner", "mmcv.cnn", "mmcv.ops"))]
    if early:
        raise ImportError(
            f"import fastrunner.compat.mmcv before anything imports mmcv (already imported: {', '.join(sorted(early))})"
        )
    paths = dict(OURS)
    if importlib.util.find_spec("mmcv") is None:
        paths.update(STAND_INS)
    else:
        for path, names in REPLACED.items():
            module = importlib.import_module(path)
            for name in names:
                if hasattr(module, name):  # mmcv itself has fewer names than mmcv.utils
                    setattr(module, name, resolve(name))
    for path in sorted(paths):
        sys.modules[path] = module = StandIn(path, paths[path])
        parent, _, name = path.rpartition(".")
        if parent in sys.modules and name not in paths.get(parent, ()):  # mmcv.parallel.collate is the function
            setattr(sys.modules[parent], name, module)
    top = sys.modules["mmcv"]
    if isinstance(top, StandIn):
        vars(top).update(__version__=VERSION, version_info=tuple(map(int, VERSION.split("."))))


install()
