"""Where the latent tiles lie: whole numbers only, so that a table can check it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

TILE = 64
OVERLAP = 8
STRETCH = 16
"""How many cells longer than the published tile a chosen one may be."""
_PROMPT_TOKENS = 333
"""What each tile costs besides its own tokens."""


@dataclass(frozen=True)
class TilePlan:
    """A grid of equal tiles over a latent of ``height`` x ``width`` cells."""

    height: int
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def positions(self) -> tuple[tuple[int, int], ...]:
        """(top, left) of each tile, row by row."""
        return tuple((top, left) for top in self.tops for left in self.lefts)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)


@dataclass(frozen=True)
class TileSettings:
    """What the user chooses, in latent cells."""

    tile: int = TILE
    overlap: int = OVERLAP
    multiple: int = 2
    """The transformer's patch size; tiles start and end on patches."""
    longest_side: int | None = None
    """Longest side that the transformer's position table covers; None for no limit."""
    stretch: int = 0
    """Cells by which tiles may be longer where fewer of them then cover the latent at less cost."""

    def __post_init__(self) -> None:
        if self.tile < self.multiple or self.tile % self.multiple:
            raise ValueError(f"tile {self.tile}: expected a positive multiple of the patch size {self.multiple}")
        if not 0 <= self.overlap < self.tile or self.overlap % self.multiple:
            raise ValueError(
                f"tile overlap {self.overlap}: expected a multiple of {self.multiple} from 0 to below the tile {self.tile}"
            )
        if self.longest_side is not None and self.tile > self.longest_side:
            raise ValueError(f"tile {self.tile} is above the {self.longest_side} latent cells that this model can see")

    def with_tile(self, tile: int) -> TileSettings:
        """The same for another tile, or the longest that the model can see; overlap and stretch keep their share of it."""
        tile = min(tile, self.longest_side or tile) // self.multiple * self.multiple
        overlap = min(self.overlap, self.overlap * tile // self.tile) // self.multiple * self.multiple
        return replace(self, tile=tile, overlap=overlap, stretch=min(self.stretch, self.stretch * tile // self.tile))


def needs_tiles(height: int, width: int, settings: TileSettings) -> bool:
    """Whether a latent is cut: its area is above one tile's, or a side above what the model can see."""
    limit = settings.longest_side
    return height * width > settings.tile**2 or (limit is not None and max(height, width) > limit)


def even_tiles(height: int, width: int, settings: TileSettings) -> TilePlan:
    """Tiles spread evenly, each overlap at least the wanted one; a side shorter than the tile shortens the tile.

    Where they may stretch, the tiles are those that cost the least: 128 cells are two tiles of 68, not three of 64.
    """
    if not needs_tiles(height, width, settings):
        return TilePlan(height, width, height, width, (0,), (0,))

    def cost(tile: tuple[int, int]) -> int:
        tokens = tile[0] * tile[1] // settings.multiple**2 + _PROMPT_TOKENS
        counts = (len(_even_offsets(*pair, settings)) for pair in zip((height, width), tile, strict=True))
        return math.prod(counts) * tokens

    sides = itertools.product(_possible_sides(height, settings), _possible_sides(width, settings))
    tile_height, tile_width = min(sides, key=cost)
    tops = _even_offsets(height, tile_height, settings)
    lefts = _even_offsets(width, tile_width, settings)
    return TilePlan(height, width, tile_height, tile_width, tops, lefts)


def official_tiles(height: int, width: int, settings: TileSettings) -> TilePlan:
    """The published grid: square tiles at a fixed stride, the last of each row and column moved to the edge.

    Raises:
        ValueError: where a tile would cut the transformer's patches, which the published script does not survive.
    """
    if needs_tiles(height, width, settings):
        tile_height = tile_width = min(settings.tile, height, width)
    else:
        tile_height, tile_width = height, width
    if tile_height % settings.multiple or tile_width % settings.multiple:
        raise ValueError(
            f"the official recipe cuts this image into tiles of {tile_width}x{tile_height} latent cells, which the "
            f"patch size {settings.multiple} does not divide: use the default recipe"
        )
    tops = _edge_offsets(height, tile_height, settings.overlap)
    lefts = _edge_offsets(width, tile_width, settings.overlap)
    return TilePlan(height, width, tile_height, tile_width, tops, lefts)


def _possible_sides(length: int, settings: TileSettings) -> list[int]:
    """The tile's side, and for each smaller count of tiles the shortest side with which that many cover ``length``."""
    side, unit = min(settings.tile, length), settings.multiple
    most = min(settings.tile + settings.stretch, length, settings.longest_side or length)
    sides = [side]
    for count in range(1, len(_even_offsets(length, side, settings))):
        needed = -(-(length + (count - 1) * settings.overlap) // (count * unit)) * unit
        if side < needed <= most:
            sides.append(needed)
    return sides


def _even_offsets(length: int, tile: int, settings: TileSettings) -> tuple[int, ...]:
    if tile == length:
        return (0,)
    stride = tile - settings.overlap
    gaps = -(-(length - tile) // stride)
    unit = settings.multiple
    return tuple((index * (length - tile)) // (gaps * unit) * unit for index in range(gaps + 1))


def _edge_offsets(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    stride = tile - min(overlap, tile - 1)
    return (*range(0, length - tile, stride), length - tile)
