"""Gives memory that is free inside this process back to the system, so that what tiles leave behind does not add up."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import psutil

GROWTH = 128 * 2**20
"""Bytes that the process may grow by before free memory is looked for: giving back and taking again costs time."""


class Heap:
    """Watches the resident memory of this process.

    The C library keeps freed blocks for the next ones; small ones that live on between them keep large ones from fitting in
    again, and the process grows.
    """

    def __init__(self, resident: Callable[[], int], give_back: Callable[[], object] | None) -> None:
        """``give_back``: None where the system does not have it."""
        self._resident, self._give_back = resident, give_back
        self._least = resident()

    def check(self) -> None:
        """Give free memory back if the process has grown by ``GROWTH`` since it was last done."""
        if self._give_back is None:
            return
        now = self._resident()
        if now > self._least + GROWTH:
            self._give_back()
            now = self._least = self._resident()
        self._least = min(self._least, now)


@functools.cache
def own_heap() -> Heap:
    """The heap of this process."""
    process = psutil.Process()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of glibc alone
    return Heap(lambda: process.memory_info().rss, None if give_back is None else lambda: give_back(0))
