"""Registries: the tables that turn ``dict(type="EMAHook", momentum=1e-4)`` into an object.

A registry maps names to classes or functions. Registries form a tree: a downstream package makes a child of one of
ours, and ``"scope.Name"`` reaches a name anywhere in that tree. Every registry of the package lives in this module,
which imports nothing heavy; a registry with a ``location`` imports that module when it is first asked for something,
so that ``import fastrunner`` starts nothing and no name is ever missing.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar, overload

from .spelling import nearest, parameters, unknown_keys

__all__ = [
    "DATASETS",
    "HOOKS",
    "INITIALIZERS",
    "MODELS",
    "MODULE_WRAPPERS",
    "OPERATIONS",
    "OPTIMIZERS",
    "OPTIMIZER_BUILDERS",
    "PIPELINES",
    "RUNNERS",
    "RUNNER_BUILDERS",
    "Registry",
    "build_from_cfg",
]

_T = TypeVar("_T", bound=Callable[..., Any])

# Configs written for MMCV say type="mmcv.EMAHook"; ours may say type="fastrunner.EMAHook". Both mean the root registry.
_ROOT_SCOPES = frozenset({"mmcv", "fastrunner"})


def build_from_cfg(cfg: dict[str, Any], registry: Registry, default_args: dict[str, Any] | None = None) -> Any:
    """Call what ``cfg["type"]`` names with the other items of ``cfg`` as keyword arguments.

    Args:
        cfg: any dict (``ConfigDict`` included); not changed. ``type`` is a registered name, ``"scope.name"``, a class
            or a function.
        registry: where a name is looked up.
        default_args: arguments, ``type`` included, for the keys that ``cfg`` lacks.
    Returns:
        Whatever the class or function returns.
    Raises:
        TypeError: ``cfg``, ``registry``, ``default_args`` or ``type`` is of the wrong type.
        KeyError: no ``type``, or a name or scope that the registry does not know (the nearest names are given).
        Exception: what the constructor raised: the same type, the class name in front of the message, chained from the
            original; the original itself where its type cannot be made from one message.
    """
    if not isinstance(cfg, dict):
        raise TypeError(f"cfg must be a dict, got {type(cfg).__name__}: {cfg!r}")
    if not isinstance(registry, Registry):
        raise TypeError(f"registry must be a Registry, got {type(registry).__name__}: {registry!r}")
    if default_args is not None and not isinstance(default_args, dict):
        raise TypeError(f"default_args must be a dict or None, got {type(default_args).__name__}: {default_args!r}")
    args: dict[str, Any] = {**cfg, **{k: v for k, v in (default_args or {}).items() if k not in cfg}}
    if "type" not in args:
        raise KeyError(f'`cfg` or `default_args` must contain the key "type", got {cfg} and {default_args}')
    kind = args.pop("type")
    if isinstance(kind, str):
        target = registry._lookup(kind)
    elif inspect.isclass(kind) or inspect.isfunction(kind):
        target = kind
    else:
        raise TypeError(f"type must be a registered name, a class or a function, got {type(kind).__name__}: {kind!r}")
    try:
        return target(**args)
    except Exception as error:
        _raise_named(error, target.__name__, _nearest_argument(error, target, args))


def _nearest_argument(error: Exception, target: Callable[..., Any], args: dict[str, Any]) -> str:
    """The end of a message about arguments that ``target`` misses or does not know: what may have been meant."""
    if not isinstance(error, TypeError) or not re.search(r"(unexpected keyword|required \S+) argument", str(error)):
        return ""
    return unknown_keys(args, parameters(target))


def _raise_named(error: Exception, name: str, more: str = "") -> NoReturn:
    """Raise ``error`` again as the same type with ``name`` in front of its message, and ``more`` behind it."""
    try:
        named = type(error)(f"{name}: {error}{more}")
    except Exception:  # the type wants other arguments (UnicodeDecodeError, many users' own)
        named = None
    if type(named) is type(error):
        raise named from error
    if hasattr(error, "add_note"):  # Python >= 3.11
        error.add_note(f"raised while building {name}")
    elif error.__cause__ is None:
        raise error from RuntimeError(f"raised while building {name}")
    raise error


class Registry:
    """A table of classes and functions by name.

    Args:
        name: what error messages call it.
        build_func: ``build_func(cfg, ..., registry=self)``; by default the parent's, else ``build_from_cfg``.
        parent: makes this a child, reached from the whole tree as ``"scope.name"``.
        scope: by default the top package of the module that calls.
        location: module that fills the registry; imported when something is looked up or registered from outside.
    Raises:
        TypeError: ``parent`` is not a Registry.
        ValueError: ``parent`` already has a child of this scope.
    """

    def __init__(
        self,
        name: str,
        build_func: Callable[..., Any] | None = None,
        parent: Registry | None = None,
        scope: str | None = None,
        *,
        location: str | None = None,
    ) -> None:
        self._name = name
        self._module_dict: dict[str, Callable[..., Any]] = {}
        self._children: dict[str, Registry] = {}
        self._scope = self.infer_scope() if scope is None else scope
        self._location = location
        if parent is not None:
            if not isinstance(parent, Registry):
                raise TypeError(f"parent of registry {name!r} must be a Registry, got {type(parent).__name__}")
            parent._add_children(self)
        self.parent = parent
        if build_func is None:
            build_func = build_from_cfg if parent is None else parent.build_func
        self.build_func: Callable[..., Any] = build_func

    @property
    def name(self) -> str:
        return self._name

    @property
    def scope(self) -> str:
        return self._scope

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        self._load()
        return self._module_dict

    @property
    def children(self) -> dict[str, Registry]:
        return self._children

    def __len__(self) -> int:
        return len(self.module_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.module_dict)

    def __contains__(self, key: str) -> bool:
        try:
            return self.get(key) is not None
        except KeyError:  # of an unknown scope
            return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self._name}, items={self.module_dict})"

    @staticmethod
    def infer_scope() -> str:
        """Top package of the module that called the caller: of the module in which a registry is made."""
        return str(sys._getframe(2).f_globals["__name__"]).partition(".")[0]

    @staticmethod
    def split_scope_key(key: str) -> tuple[str | None, str]:
        """``"mmdet.ResNet"`` -> ``("mmdet", "ResNet")``; ``"ResNet"`` -> ``(None, "ResNet")``. First dot only."""
        scope, dot, rest = key.partition(".")
        return (scope, rest) if dot else (None, key)

    def get(self, key: str) -> Callable[..., Any] | None:
        """What is registered as ``key``, or None.

        A name without a scope is looked up here only. ``"scope.name"`` is looked up here if the scope is ours, else in
        the child of that scope, else from the root of the tree; ``mmcv.`` and ``fastrunner.`` mean the root.

        Raises:
            KeyError: nothing in the tree has that scope.
        """
        registry, name = self._resolve(key)
        return registry.module_dict.get(name)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """``build_func(*args, **kwargs, registry=self)``; for the default, see ``build_from_cfg``."""
        return self.build_func(*args, **kwargs, registry=self)

    @overload
    def register_module(
        self, name: str | Sequence[str] | None = None, force: bool = False, module: None = None
    ) -> Callable[[_T], _T]: ...
    @overload
    def register_module(self, name: type[_T], force: bool = False, module: None = None) -> type[_T]: ...
    @overload
    def register_module(self, name: str | Sequence[str] | None = None, force: bool = False, *, module: _T) -> _T: ...

    def register_module(self, name: Any = None, force: bool = False, module: Any = None) -> Any:
        """Register a class or function, as ``@R.register_module()`` or ``R.register_module(module=Thing)``.

        Args:
            name: one name or several; by default ``__name__``. A class here is MMCV's old form (it warns).
            force: replace what is registered under the name.
            module: register this at once rather than return a decorator.
        Returns:
            The thing itself, or a decorator that returns it.
        Raises:
            TypeError: wrong types; only classes and functions can be registered.
            KeyError: the name is taken and ``force`` is False.
        """
        if not isinstance(force, bool):
            raise TypeError(f"force must be a bool, got {type(force).__name__}: {force!r}")
        if isinstance(name, type):
            return self.deprecated_register_module(name, force=force)
        several = isinstance(name, Sequence) and all(isinstance(n, str) for n in name)
        if not (name is None or several):  # a str is a sequence of str
            raise TypeError(
                f"name must be None, a str or a sequence of str, got {type(name).__name__}: {name!r}; "
                "as a decorator write @registry.register_module(), with parentheses"
            )
        if module is not None:
            self._register_module(module, name, force)
            return module

        def decorator(module: _T) -> _T:
            self._register_module(module, name, force)
            return module

        return decorator

    def deprecated_register_module(self, cls: Any = None, force: bool = False) -> Any:
        """MMCV's old form, ``@R.register_module`` without parentheses. Warns, then registers."""
        warnings.warn(
            "register_module(cls, force=False) is deprecated: write register_module(name, force, module=cls)",
            DeprecationWarning,
            stacklevel=3,
        )
        if cls is None:
            return partial(self.deprecated_register_module, force=force)
        self._register_module(cls, force=force)
        return cls

    def _register_module(
        self, module: Callable[..., Any], module_name: str | Sequence[str] | None = None, force: bool = False
    ) -> None:
        if not inspect.isclass(module) and not inspect.isfunction(module):
            raise TypeError(f"only a class or a function can be registered, got {type(module).__name__}: {module!r}")
        self._load()  # otherwise a user's class would take the name of a built-in one that is not there yet
        names = [module_name] if isinstance(module_name, str) else module_name or [module.__name__]
        taken = [name for name in names if name in self._module_dict]
        if taken and not force:
            raise KeyError(f"{taken[0]} is already registered in {self._name}; force=True replaces it")
        self._module_dict.update(dict.fromkeys(names, module))

    def _add_children(self, registry: Registry) -> None:
        if registry.scope in self._children:
            raise ValueError(f"scope {registry.scope!r} exists in {self._name} registry; give the child another scope")
        self._children[registry.scope] = registry

    def _load(self) -> None:
        """Import the location. While that import runs, and ever after, this costs one look into ``sys.modules``."""
        if self._location is not None:
            importlib.import_module(self._location)

    def _resolve(self, key: str) -> tuple[Registry, str]:
        """The registry that ``key`` belongs to, and its name there."""
        scope, rest = self.split_scope_key(key)
        if scope is None or scope == self._scope:
            return self, rest
        if scope in self._children:
            return self._children[scope]._resolve(rest)
        if self.parent is not None:
            return self.parent._root()._resolve(key)
        if scope in _ROOT_SCOPES:
            return self, rest
        known = sorted({self._scope, *self._children, *_ROOT_SCOPES})
        raise KeyError(f"unknown scope {scope!r} in {key!r}: the {self._name} registry has the scopes {known}")

    def _root(self) -> Registry:
        return self if self.parent is None else self.parent._root()

    def _lookup(self, key: str) -> Callable[..., Any]:
        """As ``get``, but an unknown name is a KeyError that suggests the nearest names."""
        registry, name = self._resolve(key)
        found = registry.module_dict.get(name)
        if found is None:
            known = registry.module_dict
            hint = f"it has {len(known)} names, none of them alike: import the module that registers {name} first"
            if close := nearest(name, known, count=3):
                hint = f"did you mean {' or '.join(close)}?"
            raise KeyError(f"{key} is not in the {self._name} registry; {hint}")
        return found


HOOKS = Registry("hook", location="fastrunner.hooks")
RUNNERS = Registry("runner", location="fastrunner.runner")
RUNNER_BUILDERS = Registry("runner builder", location="fastrunner.runner")
OPTIMIZERS = Registry("optimizer", location="fastrunner.optim")
OPTIMIZER_BUILDERS = Registry("optimizer builder", location="fastrunner.optim")
MODELS = Registry("model", location="fastrunner.model")
DATASETS = Registry("dataset", location="fastrunner.data")
PIPELINES = Registry("pipeline", location="fastrunner.data")
OPERATIONS = Registry("array operation", location="fastrunner.data")
MODULE_WRAPPERS = Registry("module wrapper", location="fastrunner.model")
INITIALIZERS = Registry("initializer", location="fastrunner.model")
