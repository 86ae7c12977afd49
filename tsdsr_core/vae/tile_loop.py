"""Goes over the tiles of the tiled VAE's passes, with smaller tiles after an out-of-memory error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ..system.memory import RanOut, is_unclear
from .plan import MIN_TILE, Region

log = logging.getLogger("tsdsr")

Tick = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) after each tile; may raise to end the run."""
Process = Callable[[Region], Callable[[], None]]
"""Computes a region; what it returns writes the result and takes no memory."""


class TileLoop:
    """Goes over the tiles of all passes, counts them, and halves those of a pass after an out-of-memory error in it."""

    def __init__(
        self, total: int, tick: Tick, release: Callable[[], None], ran_out: RanOut, max_halvings: int | None,
        after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """
        Args:
            max_halvings: how often tiles are halved before the error is raised; None: down to the smallest tile.
            after: called when the memory of a tile is free again.
        """
        self.total, self.tick, self.release, self.ran_out, self.max_halvings = total, tick, release, ran_out, max_halvings
        self.after = after
        self.done, self.halvings, self.reported = 0, 0, 0

    def each(self, regions: Iterable[Region], process: Process) -> None:
        """Process each region of a pass and write its result."""
        self.halvings = 0
        for region in regions:
            self._process(region, process, 0)
            self.after()
            self.done += 1
            self.tick(self.done, self.total)

    def _process(self, region: Region, process: Process, depth: int) -> None:
        side = max(region.height, region.width)
        if depth < self.halvings and side > MIN_TILE:
            for part in region.grid(-(-region.height // 2), -(-region.width // 2)):
                self._process(part, process, depth + 1)
            return
        try:
            write = process(region)
        except RuntimeError as error:
            if depth == self.max_halvings or not self.ran_out(error):
                raise
            if side <= MIN_TILE:
                if is_unclear(error):
                    raise
                advice = "close other programs, or run on the CPU"
                raise RuntimeError(f"out of memory with one VAE tile of {side} pixels, the smallest size: {advice}") from error
            self.halvings = depth + 1
            if self.halvings > self.reported:  # each pass may run out again
                log.warning("out of memory with one VAE tile of %d pixels; continuing with half of that in this pass", side)
                self.reported = self.halvings
        else:
            write()
            return
        self.release()
        self._process(region, process, depth)
