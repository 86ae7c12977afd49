"""How much fits: batch sizes from bytes, and what running out of memory looks like."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger("tsdsr")

_LIVE_MAPS = 24
"""Token maps of the hidden width alive at once in one SD3 block (two streams, qkv, 4x feed-forward, residuals)."""
_SAFETY = 1.5
CPU_BATCH = 4
"""Tiles at once on a CPU: enough to fill the cores, no gain beyond."""
LARGEST_BATCH = 16
"""Beyond this many tiles a GPU gains nothing."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
