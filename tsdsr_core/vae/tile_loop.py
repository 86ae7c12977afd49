"""Goes over the tiles of the tiled VAE's passes, with smaller ones after memory ran out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ..system.memory import RanOut, is_unclear
from .plan import LEAST_TILE, Region

log = logging.getLogger("tsdsr")

Tick = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) after each tile; may raise to end the run."""


class TileLoop:
    """Goes over the tiles of all passes: counts them, and makes those of a pass smaller after memory ran out in it."""

    def __init__(
        self, total: int, tick: Tick, release: Callable[[], None], ran_out: RanOut, most_cuts: int | None,
        after: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """
        Args:
            most_cuts: how often tiles are cut in half before the error is raised; None down to the least tile.
            after: called when the memory of a tile is free again.
        """
        self.total, self.tick, self.release, self.ran_out, self.most_cuts = total, tick, release, ran_out, most_cuts
        self.after = after
        self.done, self.cuts, self.reported = 0, 0, 0

    def each(self, regions: Iterable[Region], work: Callable[[Region], Callable[[], None]]) -> None:
        """Call ``work`` on each region of a pass, and then what it returns, which writes the result and takes no memory."""
        self.cuts = 0
        for region in regions:
            self._one(region, work, 0)
            self.after()
            self.done += 1
            self.tick(self.done, self.total)

    def _one(self, region: Region, work: Callable[[Region], Callable[[], None]], depth: int) -> None:
        side = max(region.height, region.width)
        if depth < self.cuts and side > LEAST_TILE:
            for part in region.grid(-(-region.height // 2), -(-region.width // 2)):
                self._one(part, work, depth + 1)
            return
        try:
            write = work(region)
        except RuntimeError as error:
            if depth == self.most_cuts or not self.ran_out(error):
                raise
            if side <= LEAST_TILE:
                if is_unclear(error):
                    raise
                advice = "close other programs, or run on the CPU"
                raise RuntimeError(f"out of memory with one VAE tile of {side} pixels, the least there is: {advice}") from error
            self.cuts = depth + 1
            if self.cuts > self.reported:  # each pass may run out again
                log.warning("out of memory with one VAE tile of %d pixels; going on with half of that in this pass", side)
                self.reported = self.cuts
        else:
            write()
            return
        self.release()
        self._one(region, work, depth)
