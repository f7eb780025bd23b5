"""Small facts about where and when a run happens."""

from __future__ import annotations

import getpass
import os.path as osp
import time
import warnings
from socket import gethostname

_taken: set[str] = set()


def get_host_info() -> str:
    """``user@host``, or an empty string with a warning where neither can be found."""
    try:
        return f"{getpass.getuser()}@{gethostname()}"
    except (KeyError, OSError) as error:  # no such user: common in containers
        warnings.warn(f"host or user not found: {error}", stacklevel=2)
        return ""


def get_time_str() -> str:
    """Local time as ``YYYYmmdd_HHMMSS``."""
    return time.strftime("%Y%m%d_%H%M%S", time.localtime())


def new_work_dir(timestamp: str) -> str:
    """``./work_dirs/<timestamp>`` as an absolute path; with ``-2``, ``-3``, ... where that one is taken.

    Two runs that start within a second must not write into each other's folder. Nothing is created here.
    """
    first = path = osp.abspath(osp.join("work_dirs", timestamp))
    number = 2
    while path in _taken or osp.exists(path):
        path, number = f"{first}-{number}", number + 1
    _taken.add(path)
    return path
