"""Positions and sizes of the transformer's tiles, in latent cells; whole numbers only.

Tiles are equal and evenly spread, so that the overlaps of a row are about the same.  A latent 160 cells wide, with tiles of
64 and a minimum overlap of 8::

    0           48  64      96  112         160   latent cells
    |---- tile 1 ---|
                |---- tile 2 ---|
                            |---- tile 3 ---|
                |<->|       |<->|
               overlap     overlap                16 each

The published grid (``official_tiles``) has a fixed stride instead and moves the last tile to the edge.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from ..errors import InputError

TILE = 64
"""Side of the published tiles, in latent cells."""
OVERLAP = 8
"""Overlap of the published tiles, in latent cells."""
STRETCH = 16
"""Cells by which an automatic tile may be longer than the published one."""
MIN_TILE = 16
"""Minimum side of a tile in latent cells; smaller tiles have too little context."""


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
class Tiling:
    """How latents are divided into tiles for a model; lengths in latent cells.  ``choose_tiling`` builds one from options."""

    tile: int = TILE
    overlap: int = OVERLAP
    multiple: int = 2
    """The transformer's patch size; tiles start and end on patches."""
    longest_side: int | None = None
    """Maximum side of a tile, given by the transformer's position table; None for no limit."""
    stretch: int = 0
    """Cells by which tiles may be longer, if that covers the latent with fewer tiles at lower cost."""
    batch: int | None = None
    """Tiles that run at once; None for as many as fit into memory."""
    official: bool = False
    """Whether to use the published grid and window."""
    context_tokens: int = 0
    """Tokens that each tile costs besides its own, such as a prompt's."""

    def __post_init__(self) -> None:
        if self.tile < self.multiple or self.tile % self.multiple:
            raise InputError(f"tile {self.tile}: expected a positive multiple of {self.multiple}, the patch size")
        if not 0 <= self.overlap < self.tile or self.overlap % self.multiple:
            raise InputError(
                f"tile overlap {self.overlap}: expected a multiple of {self.multiple} from 0 to below the tile {self.tile}"
            )
        if self.longest_side is not None and self.tile > self.longest_side:
            raise InputError(f"tile {self.tile} is above the {self.longest_side} latent cells that this model supports")

    def plan(self, height: int, width: int) -> TilePlan:
        """The tiles of a latent of ``height`` x ``width`` cells."""
        return (official_tiles if self.official else even_tiles)(height, width, self)

    def with_tile(self, tile: int) -> Tiling:
        """The same tiling with another tile size, at most the model's maximum; overlap and stretch scale with it.

        The overlap stays at least one eighth of the tile, as published, unless it was smaller before.
        """
        tile = min(tile, self.longest_side or tile) // self.multiple * self.multiple
        share = min(self.overlap, max(self.overlap * tile // self.tile, tile * OVERLAP // TILE))
        overlap = share // self.multiple * self.multiple
        return replace(self, tile=tile, overlap=overlap, stretch=min(self.stretch, self.stretch * tile // self.tile))

    def within(self, longest_side: int | None) -> Tiling:
        """The same tiling for a model whose tiles have at most ``longest_side`` cells a side."""
        return replace(self.with_tile(min(self.tile, longest_side or self.tile)), longest_side=longest_side)


def choose_tiling(
    tile: int | None, overlap: int, multiple: int, longest_side: int | None, affordable: int = TILE, batch: int | None = None,
    official: bool = False, context_tokens: int = 0,
) -> Tiling:  # fmt: skip
    """The tiling for a user's options, a model and the available memory.

    Args:
        tile: side in latent cells; None for automatic: the published side, or ``affordable`` if that is smaller. Automatic
            tiles may be up to ``STRETCH`` cells longer.
        overlap: minimum overlap in latent cells; reduced in proportion if the tile is reduced.
        multiple: the transformer's patch size.
        longest_side: maximum side of a tile for this model; None for no limit. Longer tiles are reduced to it.
        affordable: side of a tile that fits into memory; ignored with ``official``.
        batch: tiles that run at once; None for as many as fit.
        official: whether to use the published grid and window.
        context_tokens: tokens that each tile costs besides its own.

    Raises:
        InputError: for an impossible tile or overlap.

    >>> choose_tiling(None, 8, 2, 192).plan(128, 256)
    TilePlan(height=128, width=256, tile_height=68, tile_width=70, tops=(0, 60), lefts=(0, 62, 124, 186))
    """
    side = TILE if tile is None else tile
    if overlap > max_overlap(side):
        raise InputError(
            f"tile overlap {overlap}: expected at most {max_overlap(side)}, three quarters of the tile size {side}; more "
            "would take far too many tiles"
        )
    automatic = tile is None and not official
    chosen = Tiling(
        side,
        overlap,
        multiple,
        stretch=STRETCH if automatic else 0,
        batch=batch,
        official=official,
        context_tokens=context_tokens,
    )
    chosen = chosen.within(longest_side)
    return chosen.with_tile(min(chosen.tile, affordable)) if automatic else chosen


def max_overlap(tile: int) -> int:
    """Maximum overlap for a tile size, in latent cells: three quarters of the tile.

    Without a limit, an overlap of 126 with tiles of 128 would divide a latent of 512x512 cells into 37 249 tiles.
    """
    return tile * 3 // 4


def needs_tiles(height: int, width: int, settings: Tiling) -> bool:
    """Whether a latent needs tiles: its area exceeds one tile's, or a side exceeds the model's maximum."""
    limit = settings.longest_side
    return height * width > settings.tile**2 or (limit is not None and max(height, width) > limit)


def even_tiles(height: int, width: int, settings: Tiling) -> TilePlan:
    """Evenly spread tiles with at least the wanted overlap; if the latent is shorter than a tile, the tile is shortened.

    If tiles may stretch, the cheapest size is chosen: for 128 cells two tiles of 68, not three of 64.

    >>> even_tiles(160, 64, Tiling()).tops
    (0, 48, 96)
    """
    if not needs_tiles(height, width, settings):
        return TilePlan(height, width, height, width, (0,), (0,))

    def cost(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
        (tile_height, rows), (tile_width, columns) = pair
        return rows * columns * (tile_height * tile_width // settings.multiple**2 + settings.context_tokens)

    choices = itertools.product(_side_counts(height, settings), _side_counts(width, settings))
    (tile_height, _), (tile_width, _) = min(choices, key=cost)
    tops = _even_offsets(height, tile_height, settings)
    lefts = _even_offsets(width, tile_width, settings)
    return TilePlan(height, width, tile_height, tile_width, tops, lefts)


def official_tiles(height: int, width: int, settings: Tiling) -> TilePlan:
    """The published grid: square tiles with a fixed stride, the last of each row and column moved to the edge.

    Raises:
        InputError: if a tile is not a multiple of the patch size, where the published script fails.
    """
    if needs_tiles(height, width, settings):
        tile_height = tile_width = min(settings.tile, height, width)
    else:
        tile_height, tile_width = height, width
    if tile_height % settings.multiple or tile_width % settings.multiple:
        raise InputError(
            f"the official recipe divides this image into tiles of {tile_width}x{tile_height} latent cells, which are not "
            f"multiples of the patch size {settings.multiple}: use the default recipe"
        )
    tops = _edge_offsets(height, tile_height, settings.overlap)
    lefts = _edge_offsets(width, tile_width, settings.overlap)
    return TilePlan(height, width, tile_height, tile_width, tops, lefts)


def _side_counts(length: int, settings: Tiling) -> list[tuple[int, int]]:
    """(side, count) of the tiles that can cover ``length``: the given side, and longer ones that need fewer tiles."""
    wanted = min(settings.tile, length)
    most = min(settings.tile + settings.stretch, length, settings.longest_side or length)
    counts: dict[int, int] = {}  # the shortest side for each count
    for side in range(wanted, most + 1, settings.multiple):
        counts.setdefault(1 if side == length else -(-(length - side) // (side - settings.overlap)) + 1, side)
    return [(side, count) for count, side in counts.items()]


def _even_offsets(length: int, tile: int, settings: Tiling) -> tuple[int, ...]:
    if tile == length:
        return (0,)
    stride = tile - settings.overlap
    gaps = -(-(length - tile) // stride)
    unit = settings.multiple
    return tuple((index * (length - tile)) // (gaps * unit) * unit for index in range(gaps + 1))


def _edge_offsets(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    stride = tile - min(overlap, tile - 1)
    return (*range(0, length - tile, stride), length - tile)
