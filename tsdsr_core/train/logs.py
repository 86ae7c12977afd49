"""The logs of a run, in TensorBoard's format: clear errors where they cannot be written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..system.atomic import reason

NAME = "tsdsr"
"""Name of the logs' folder in that of the run."""


@contextmanager
def writing_logs(out: Path) -> Iterator[None]:
    """Let errors of the block, which writes logs, name the folder of the logs.

    Args:
        out: folder of the run.

    Raises:
        OSError: if they cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the logs in {out / NAME} could not be written: {reason(error)}; the last checkpoint, if any, is kept"
        ) from error


@contextmanager
def without_thread_traces() -> Iterator[None]:
    """Hide tracebacks of ``OSError`` in other threads: TensorBoard's writer raises them again at the next call."""
    before = threading.excepthook

    def show(arguments: Any) -> None:
        if not issubclass(arguments.exc_type, OSError):
            before(arguments)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before
