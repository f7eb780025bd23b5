"""Loggers as MMCV's users know them: one console handler, a file on rank 0, one line format."""

from __future__ import annotations

import logging

from ..dist import get_dist_info

FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
logger_initialized: dict[str, bool] = {}  # names that were set up, in that order; MMCV's name for it


def get_logger(
    name: str, log_file: str | None = None, log_level: int = logging.INFO, file_mode: str = "w"
) -> logging.Logger:
    """The logger ``name``, set up on its first call: a console handler, and on rank 0 a file handler.

    A child of a logger that is already set up (``a.b`` after ``a``) gets no handlers of its own, since its records
    reach the parent's. Ranks other than 0 log errors only.

    Args:
        log_file: path of the log file; its folder must exist.
        file_mode: mode that ``log_file`` is opened with.
    """
    logger = logging.getLogger(name)
    if any(name == known or name.startswith(known + ".") for known in logger_initialized):
        return logger

    # A console handler on the root logger (absl and others put one there) would print every line a second time.
    for handler in logger.root.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)

    rank, _ = get_dist_info()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None and rank == 0:
        handlers.append(logging.FileHandler(log_file, file_mode))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        handler.setLevel(log_level)
        logger.addHandler(handler)
    logger.setLevel(log_level if rank == 0 else logging.ERROR)
    logger_initialized[name] = True
    return logger


def print_log(msg: object, logger: logging.Logger | str | None = None, level: int = logging.INFO) -> None:
    """Print ``msg`` (``logger=None``), log it (a logger or its name), or drop it (``"silent"``)."""
    if logger is None:
        print(msg)
    elif isinstance(logger, logging.Logger):
        logger.log(level, msg)
    elif isinstance(logger, str):
        if logger != "silent":
            get_logger(logger).log(level, msg)
    else:
        raise TypeError(f'logger must be a logging.Logger, a name, "silent" or None, got {type(logger).__name__}')
