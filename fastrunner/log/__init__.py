"""What is logged: running averages (``buffer``) and the loggers that carry them (``setup``)."""

from .buffer import LogBuffer
from .setup import get_logger, print_log

__all__ = ["LogBuffer", "get_logger", "print_log"]
