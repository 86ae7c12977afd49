"""How much fits: tile sides and batches from bytes, and what running out of memory looks like."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .tile_plan import TILE

log = logging.getLogger("tsdsr")

_LIVE_MAPS = 24
"""Token maps of the hidden width alive at once in one SD3 block (two streams, qkv, 4x feed-forward, residuals)."""
_SAFETY = 1.5
CPU_BATCH = 4
"""Tiles at once on a CPU: enough to fill the cores, no gain beyond."""
LARGEST_BATCH = 16
"""Beyond this many tiles a GPU gains nothing."""
_PICTURES = 6 * 3 * 4
"""Bytes for each pixel of the result: input, reference, result and what the colour fix makes of them, three floats each."""
TILE_SIDES = (TILE, 48, 32, 16)
"""Latent cells; below the least, tiles see too little to be worth a run."""

_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "not enough gpu video memory", "alloc_failed",
    "invalid buffer size", "unable to find an engine to execute this computation",
)  # fmt: skip
"""What CUDA, Linux, Windows, DirectML, cuBLAS, Metal and cuDNN (without room for any algorithm's workspace) say."""


def tile_bytes(tile_height: int, tile_width: int, patch: int, context_tokens: int, width: int, itemsize: int) -> int:
    """Activation bytes of one latent tile in the transformer.

    Args:
        tile_height, tile_width: in latent cells.
        patch: patch size; context_tokens: prompt length; width: hidden width; itemsize: bytes of one value.
    """
    tokens = (tile_height // patch) * (tile_width // patch) + context_tokens
    return tokens * width * itemsize * _LIVE_MAPS


def tile_batch(free: int, one_tile: int) -> int:
    """Number of tiles of ``one_tile`` bytes to run at once in ``free`` bytes, from 1 to ``LARGEST_BATCH``."""
    return max(1, min(LARGEST_BATCH, int(free / (one_tile * _SAFETY))))


def tile_side(free: int, tile_bytes: Callable[[int, int], int]) -> int:
    """The greatest of ``TILE_SIDES`` of which one tile fits into ``free`` bytes, or the least of them."""
    return next((side for side in TILE_SIDES if tile_bytes(side, side) * _SAFETY <= free), TILE_SIDES[-1])


@dataclass(frozen=True)
class TileMemory:
    """What the sides and batches of tiles are chosen by; the default is a CPU."""

    tile_bytes: Callable[[int, int], int] = lambda tile_height, tile_width: 0
    """Activation bytes of one tile of a size in latent cells."""
    free: Callable[[], int | None] = lambda: None
    """Bytes that activations may take now; None where there is no limit of a device."""
    release: Callable[[], None] = lambda: None
    """Gives cached memory back, after running out."""

    def side(self) -> int:
        """Side of the tiles in latent cells: the published one, or less where that does not fit."""
        free = self.free()
        return TILE_SIDES[0] if free is None else tile_side(free, self.tile_bytes)

    def batch(self, tile_height: int, tile_width: int) -> int:
        """Number of tiles of a size in latent cells to run at once."""
        free = self.free()
        return CPU_BATCH if free is None else tile_batch(free, self.tile_bytes(tile_height, tile_width))


def check_ram(needed: int, free: int) -> None:
    """Raise ``MemoryError`` where ``needed`` bytes are more than are free, before the system ends the program for it."""
    if needed > free:
        raise MemoryError(
            f"the VAE needs {needed / 1e9:.1f} GB of memory for a picture of this size, {free / 1e9:.1f} GB are free: choose a "
            "smaller size, or close other programs"
        )


def fits_beside(height: int, width: int, free: int | None) -> bool:
    """Whether pictures of a size may lie on a device with ``free`` bytes and leave most of them to the model."""
    return free is None or height * width * _PICTURES <= free // 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
