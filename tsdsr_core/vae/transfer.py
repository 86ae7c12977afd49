"""Takes tiles of the tiled VAE from its maps to the device and back; between host memory and CUDA while others are computed."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import torch
from torch import Tensor

from ..system.atomic import reason

log = logging.getLogger("tsdsr")

_READS, _WRITES = (0, 1), (2, 3)
"""Pinned buffers for each way."""


@functools.cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    """For what arrives on a CUDA device and what leaves it: once, since torch keeps the freed memory of each stream for it."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _staged(view: Tensor, device: torch.device) -> bool:
    return view.device.type == "cpu" and device.type == "cuda"


class Mover:
    """Takes tiles from maps to the device and back.

    Between host memory and CUDA they go through two pinned buffers each way, on streams of their own: while the device
    computes one tile, the one before it is written back and the next one is brought. Where the system gives no more pinned
    memory, the buffers are pageable: the copies then wait for each other.
    """

    def __init__(self, device: torch.device) -> None:
        """``device`` comes with its index."""
        self.device = device
        self._pending: list[tuple[Any, Tensor, Tensor]] = []
        self._buffers: dict[int, Tensor] = {}
        self._asked: dict[int, Any] = {}
        self._pinned = True
        self._reads, self._writes = itertools.cycle(_READS), itertools.cycle(_WRITES)

    def read(self, view: Tensor) -> Tensor:
        """The part ``view`` of a map on the device; not to be written to."""
        if not _staged(view, self.device):
            return view.to(self.device)
        arriving, _ = _streams(self.device)
        slot = next(self._reads)
        if slot in self._asked:
            self._asked[slot].synchronize()  # the buffer is free, and at most three tiles are on the device
        packed = self._packed(slot, view).copy_(view)
        with torch.cuda.stream(arriving):
            tile = torch.empty_like(packed, device=self.device, pin_memory=False).copy_(packed, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(arriving)
        self._asked[slot] = computing.record_event()
        tile.record_stream(computing)
        return tile

    def ready(self, view: Tensor, tile: Tensor) -> Tensor:
        """``tile`` as ``write`` takes it to ``view`` without asking for memory: in its layout, with buffers that are there."""
        if _staged(view, self.device):
            for slot in _WRITES:
                self._packed(slot, view)
        elif view.device == tile.device:
            return tile
        return tile.contiguous(memory_format=layout_of(view))

    def write(self, view: Tensor, tile: Tensor) -> None:
        """Write ``tile`` to the part ``view`` of a map, where it may arrive as late as at ``flush``."""
        if not _staged(view, self.device):
            view.copy_(tile)
            return
        _, leaving = _streams(self.device)
        packed = self._packed(next(self._writes), view)
        leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(leaving):
            packed.copy_(tile, non_blocking=True)
            left = leaving.record_event()
        tile.record_stream(leaving)
        self._pending.append((left, packed, view))
        self.flush(1)

    def flush(self, leave: int = 0) -> None:
        """Finish all writing but the last ``leave`` tiles."""
        while len(self._pending) > leave:
            left, packed, view = self._pending.pop(0)
            left.synchronize()
            view.copy_(packed)

    def _packed(self, slot: int, view: Tensor) -> Tensor:
        """A dense buffer in the shape and memory format of ``view``."""
        if slot not in self._buffers or self._buffers[slot].numel() < view.numel():
            self._buffers[slot] = self._buffer(view.numel(), view.dtype)
        flat = self._buffers[slot][: view.numel()]
        if layout_of(view) == torch.contiguous_format:
            return flat.view(view.shape)
        return flat.view(view.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)

    def _buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` values of host memory, pinned while there is such memory."""
        if self._pinned:
            try:
                return torch.empty(count, dtype=dtype, pin_memory=True)
            except RuntimeError as error:  # pinned memory has limits of its own, and what is said of it is said of devices too
                log.warning("no pinned memory, continuing with pageable: %s", reason(error))
                self._pinned = False
        return torch.empty(count, dtype=dtype)


def layout_of(view: Tensor) -> torch.memory_format:
    """Whether the pixels of a channel lie together in a part of a map, or the channels of a pixel."""
    return torch.contiguous_format if view.stride(1) > 1 else torch.channels_last
