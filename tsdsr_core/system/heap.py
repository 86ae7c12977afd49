"""Returns freed memory to the operating system, so that memory left behind by tiles does not add up."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import psutil

GROWTH = 128 * 2**20
"""Bytes that the process may grow by before freed memory is returned, since returning it and asking again takes time."""


class Heap:
    """Watches the resident memory of this process.

    The C library keeps freed blocks for later use. Small blocks that stay in use fragment them, new large blocks do not fit,
    and the process grows.
    """

    def __init__(self, resident: Callable[[], int], trim: Callable[[], object] | None) -> None:
        """``trim`` returns freed memory to the system; None if the system cannot."""
        self._resident, self._trim = resident, trim
        self._minimum = resident()

    def check(self) -> None:
        """Return freed memory if the process has grown by ``GROWTH`` since the last time."""
        if self._trim is None:
            return
        now = self._resident()
        if now > self._minimum + GROWTH:
            self._trim()
            now = self._minimum = self._resident()
        self._minimum = min(self._minimum, now)


@functools.cache
def own_heap() -> Heap:
    """The heap of this process."""
    process = psutil.Process()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of glibc alone
    return Heap(lambda: process.memory_info().rss, None if trim is None else lambda: trim(0))
