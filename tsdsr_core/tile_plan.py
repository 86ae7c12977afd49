"""Where the latent tiles lie: whole numbers only, so that a table can check it."""

from __future__ import annotations

import itertools
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

    def cost(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
        (tile_height, rows), (tile_width, columns) = pair
        return rows * columns * (tile_height * tile_width // settings.multiple**2 + _PROMPT_TOKENS)

    choices = itertools.product(_side_counts(height, settings), _side_counts(width, settings))
    (tile_height, _), (tile_width, _) = min(choices, key=cost)
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


def _side_counts(length: int, settings: TileSettings) -> list[tuple[int, int]]:
    """(side, count) of the tiles that can cover ``length``: the wanted side, and the longer ones that need fewer."""
    wanted = min(settings.tile, length)
    most = min(settings.tile + settings.stretch, length, settings.longest_side or length)
    counts: dict[int, int] = {}  # by count; the shortest side that does
    for side in range(wanted, most + 1, settings.multiple):
        counts.setdefault(1 if side == length else -(-(length - side) // (side - settings.overlap)) + 1, side)
    return [(side, count) for count, side in counts.items()]


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
