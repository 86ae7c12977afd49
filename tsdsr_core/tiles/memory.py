"""How many latent tiles of which side fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..system.memory import RanOut, is_out_of_memory
from .plan import MIN_TILE, TILE

_SAFETY = 1.5
CPU_BATCH = 4
"""Tiles at once on a CPU: enough to fill the cores, no gain beyond."""
LARGEST_BATCH = 16
"""Beyond this many tiles a GPU gains nothing."""
TILE_SIDES = (TILE, 48, 32, MIN_TILE)
"""Latent cells."""


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
    ran_out: RanOut = is_out_of_memory
    """Whether an error says that memory ran out."""

    def side(self) -> int:
        """Side of the tiles in latent cells: the published one, or less where that does not fit."""
        free = self.free()
        return TILE_SIDES[0] if free is None else tile_side(free, self.tile_bytes)

    def batch(self, tile_height: int, tile_width: int) -> int:
        """Number of tiles of a size in latent cells to run at once."""
        free = self.free()
        return CPU_BATCH if free is None else tile_batch(free, self.tile_bytes(tile_height, tile_width))
