"""Measures the peak memory of a piece of work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch


class Peak:
    """Peak memory since the measurement began, and the memory in use then; in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampler: _ResidentMemory | None = None
        self.before: int | None = None
        if device.type == "cpu":
            self._sampler = _ResidentMemory()
            self.before = self._sampler.peak
            self._sampler.start()
        elif hasattr(getattr(torch, device.type, None), "max_memory_allocated"):
            with suppress(RuntimeError):  # some drivers keep no such statistics
                getattr(torch, device.type).reset_peak_memory_stats(device)
                self.before = getattr(torch, device.type).memory_allocated(device)

    @property
    def peak(self) -> int | None:
        """Resident memory of the process for the CPU, allocated memory for CUDA and XPU; None if torch cannot tell."""
        if self._sampler is not None:
            return self._sampler.peak
        return None if self.before is None else getattr(torch, self._device.type).max_memory_allocated(self._device)

    @property
    def growth(self) -> int | None:
        """The peak beyond what was in use when the measurement began."""
        return None if self.peak is None or self.before is None else self.peak - self.before

    def end(self) -> None:
        """Stop sampling."""
        if self._sampler is not None:
            self._sampler.ended.set()
            self._sampler.join()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block on ``device``.

    On the CPU, memory that earlier work left in the allocator is resident already, so it counts as in use.

    >>> with peak_memory(torch.device("cpu")) as memory:
    ...     total = torch.ones(1000).sum()
    >>> memory.peak > 0
    True
    """
    memory = Peak(device)
    try:
        yield memory
    finally:
        memory.end()


class _ResidentMemory(threading.Thread):
    """Samples the process's resident memory a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.ended = threading.Event()
        self.peak = self.process.memory_info().rss

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)
