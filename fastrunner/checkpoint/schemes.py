"""Where checkpoints come from: a loader for each prefix of a path, more of which can be registered.

Built in are local files, ``http://`` and ``https://``. Services and model tables of OpenMMLab (``torchvision://``,
``open-mmlab://``, ``s3://``, ...) are known by name, so that their error says what to do instead.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from ..dist import get_dist_info
from ..log.setup import print_log
from . import file

Loader = Callable[..., Any]

# torchvision and OpenMMLab end the names of their files with -<first digits of sha256>.pth
_HASH = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
_DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])$")


class CheckpointLoader:
    """The table of schemes. Prefixes are regular expressions; a longer one goes before a shorter one it begins with."""

    _schemes: dict[str, Loader] = {}  # noqa: RUF012  # one table for all, as in MMCV

    @classmethod
    def register_scheme(cls, prefixes: str | Sequence[str], loader: Loader | None = None, force: bool = False) -> Any:
        """Let ``loader(filename, map_location)`` read paths with these prefixes; without ``loader`` a decorator.

        A loader with a parameter ``trusted`` is told whether the file may hold any object.

        Raises:
            KeyError: a prefix is taken and ``force`` is False.
            TypeError: ``loader`` is not callable.
        """

        def register(loader: Loader) -> Loader:
            if not callable(loader):
                raise TypeError(f"a loader is called with (filename, map_location), got {loader!r}")
            names = [prefixes] if isinstance(prefixes, str) else list(prefixes)
            taken = [name for name in names if name in cls._schemes]
            if taken and not force:
                raise KeyError(f"{taken[0]} is already registered as a loader backend, add force=True to replace it")
            cls._schemes.update(dict.fromkeys(names, loader))
            ordered = sorted(cls._schemes.items(), reverse=True)
            cls._schemes.clear()
            cls._schemes.update(ordered)
            return loader

        return register if loader is None else register(loader)

    @classmethod
    def _get_checkpoint_loader(cls, path: str) -> Loader:
        return next(loader for prefix, loader in cls._schemes.items() if re.match(prefix, path) is not None)

    @classmethod
    def load_checkpoint(
        cls, filename: str, map_location: Any = None, logger: logging.Logger | None = None, *, trusted: bool = False
    ) -> Any:
        """What the file holds. The first line of the log names scheme and file (rank 0).

        Raises:
            FileNotFoundError, RuntimeError: see :func:`fastrunner.checkpoint.file.read`.
            ValueError: a scheme that is not available here.
        """
        loader = cls._get_checkpoint_loader(os.fspath(filename))
        scheme = getattr(loader, "__name__", "").removeprefix("load_from_")
        if get_dist_info()[0] == 0:
            print_log(f"load checkpoint from {scheme} path: {filename}", logger)
        knows = "trusted" in inspect.signature(loader).parameters
        return loader(filename, map_location, **({"trusted": trusted} if knows else {}))


def load_from_local(filename: str, map_location: Any = None, *, trusted: bool = False) -> Any:
    """A file on disk; ``~`` is expanded."""
    return file.read(filename, map_location, trusted=trusted)


def load_from_http(
    filename: str, map_location: Any = None, model_dir: str | None = None, *, trusted: bool = False
) -> Any:
    """A file from the web, kept in ``model_dir`` (torch hub's folder by default). Rank 0 downloads, then all read.

    Raises:
        RuntimeError: the file is not the one whose sha256 its name ends with (``-<digits>.pth``); a download that
            fails this is not kept.
        OSError: the download failed.
    """
    rank, world_size = get_dist_info()
    if world_size == 1:
        path = download(filename, model_dir)
    else:
        try:
            if rank == 0:
                path = download(filename, model_dir)
        finally:
            dist.barrier()  # also when the download fails: the others must not wait for it
        if rank > 0:
            path = download(filename, model_dir)  # of another machine, or an error for this rank to raise too
    return file.read(path, map_location, trusted=trusted)


def download(url: str, folder: str | None = None) -> str:
    """Path of the file behind ``url``, from ``folder`` if it is there; checked against the hash in its name."""
    folder = folder or os.path.join(torch.hub.get_dir(), "checkpoints")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    if not os.path.exists(path):
        partial = f"{path}.{os.getpid()}.tmp"
        try:
            torch.hub.download_url_to_file(url, partial, progress=False)
            _check_hash(partial, path, url)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
    else:
        _check_hash(path, path, url)
    return path


def _check_hash(path: str, name: str, url: str) -> None:
    found = _HASH.search(os.path.basename(name))
    if found is None or _DATE.match(found[1]):  # model-20200130.pth: a day
        return
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    if not digest.hexdigest().startswith(found[1]):
        raise RuntimeError(
            f"{name} is not what {url} names: its sha256 begins with {digest.hexdigest()[: len(found[1])]}, not "
            f"{found[1]}; delete the file if it is there, and download it again"
        )


def _unavailable(name: str, prefixes: str | tuple[str, ...], what: str) -> Loader:
    """A loader that says what to do instead, registered."""

    def loader(filename: str, map_location: Any = None) -> Any:
        raise ValueError(
            f"{filename}: fastrunner does not load from {what}; download the file and give its path or its https "
            f"address, or register a loader: CheckpointLoader.register_scheme({prefixes!r}, loader, force=True)"
        )

    loader.__name__ = f"load_from_{name}"
    CheckpointLoader.register_scheme(prefixes, loader)
    return loader


CheckpointLoader.register_scheme("", load_from_local)
CheckpointLoader.register_scheme(("http://", "https://"), load_from_http)
load_from_pavi = _unavailable("pavi", "pavi://", "Pavi, a service that is not public")
load_from_ceph = _unavailable("ceph", r"(\S+\:)?s3://", "s3 (petrel, ceph)")
load_from_torchvision = _unavailable("torchvision", ("modelzoo://", "torchvision://"), "torchvision's table of models")
load_from_openmmlab = _unavailable("openmmlab", ("open-mmlab://", "openmmlab://"), "OpenMMLab's table of models")
load_from_mmcls = _unavailable("mmcls", "mmcls://", "MMClassification's table of models")

__all__ = [
    "CheckpointLoader",
    "load_from_ceph",
    "load_from_http",
    "load_from_local",
    "load_from_mmcls",
    "load_from_openmmlab",
    "load_from_pavi",
    "load_from_torchvision",
]
