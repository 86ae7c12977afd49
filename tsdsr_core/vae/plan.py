"""Where the feature maps of a tiled VAE are and how large its tiles are. It computes with whole numbers only.

A pass runs one convolution (or one half of the attention) over the whole image, tile by tile. It reads one map, the full
activation before it, and writes another. A tile of the result needs its own region of the input and a halo around it::

    +----------------------------+    input map, height x width
    |   +----------------+       |
    |   | halo           |       |    input region: what is read, cropped at the border of the image,
    |   |   +--------+   |       |    where the convolution's own zeros follow as in the untiled run
    |   |   |  tile  |   |       |
    |   |   +--------+   |       |    skip: rows and columns of the convolution's result that belong to the halo
    |   +----------------+       |
    +----------------------------+
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..checks import check_number
from ..errors import InputError
from .passes import NVIDIA, Kernels, PassSpec, Place, pass_bytes, score_values, unfolded_values

PLACES: tuple[tuple[Place, Place], ...] = (("device", "device"), ("host", "device"), ("host", "host"))
"""Places of the maps and of the attention's keys and values, the fastest first."""

MIN_TILE = 16
"""Minimum side of a tile in pixels of its map; in smaller ones nearly all work would be for the halo."""
_TILE_BYTES = 512 * 2**20
"""Working set of one tile on a device if a map does not fit as one tile; with larger tiles less than 1 % is gained."""
_SCRATCH_BYTES = 2 * 2**30
"""On a device a map is one tile if that fits; if kernels store scores or unfolded inputs, only up to this working set."""
_CPU_TILE_BYTES = 64 * 2**20
"""On the CPU: the allocator reuses memory of this size, so that no new pages are needed for each tile."""
_MIN_FREE = 128 * 2**20
"""Memory that must be left for a tile beside the maps; else the maps go to host memory."""
HEADROOM = 0.8
"""Share of the free memory that is used; the rest is for the workspaces of convolution kernels."""
_LARGE_MAP = 256 * 2**20
"""On the CPU, a map of at least this many bytes is not stored if only the next pass reads it: that one computes it again."""
_ADOPTING = ("conv", "residual_start", "residual_end")
"""Kinds of passes of which a tile that is the whole map becomes the map."""
_MAX_ELEMENTS = 2**31 - 1
"""Kernels count the elements of a tile in 32 bits."""


@dataclass(frozen=True)
class Region:
    """A rectangle of a map."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    def grown(self, margin: int, within: Region) -> Region:
        """The rectangle with ``margin`` more on each side, as far as that lies in ``within``."""
        return Region(
            max(within.top, self.top - margin),
            max(within.left, self.left - margin),
            min(within.bottom, self.bottom + margin),
            min(within.right, self.right + margin),
        )

    def grid(self, tile_height: int, tile_width: int) -> tuple[Region, ...]:
        """Disjoint tiles of ``tile_height`` x ``tile_width``, row by row; the last of each row and column may be smaller."""
        rows, columns = _cuts(self.top, self.bottom, tile_height), _cuts(self.left, self.right, tile_width)
        return tuple(Region(a, c, b, d) for a, b in rows for c, d in columns)


@dataclass(frozen=True)
class InputRegion:
    """What a tile of a pass's result needs of the map that the pass reads: the tile and its halo."""

    area: Region
    skip: tuple[int, int]
    """Rows and columns of the convolution's result before the tile, which are cut off."""
    pad: tuple[int, int]
    """Rows and columns of zeros beyond the image that a convolution of stride 2 needs."""


def input_region(spec: PassSpec, tile: Region, height: int, width: int) -> InputRegion:
    """The part of a ``height`` x ``width`` map that ``tile`` of the result needs, without what is beyond the image."""
    top, bottom, skip_rows, pad_rows = _span(spec, tile.top, tile.bottom, height)
    left, right, skip_columns, pad_columns = _span(spec, tile.left, tile.right, width)
    return InputRegion(Region(top, left, bottom, right), (skip_rows, skip_columns), (pad_rows, pad_columns))


def _span(spec: PassSpec, start: int, end: int, length: int) -> tuple[int, int, int, int]:
    if spec.rescale == "down":  # kernel 3, stride 2, one zero after the last pixel
        return 2 * start, min(length, 2 * end + 1), 0, max(0, 2 * end + 1 - length)
    if spec.rescale == "up":
        first = max(0, start // 2 - 1)
        return first, min(length, -(-end // 2) + 1), start - 2 * first, 0
    first = max(0, start - spec.halo)
    return first, min(length, end + spec.halo), start - first, 0


def _cuts(start: int, end: int, tile: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([*range(start, end, tile), end]))


@dataclass(frozen=True)
class Step:
    """One pass: the size of its result and of its tiles, in pixels of the result."""

    spec: PassSpec
    height: int
    width: int
    tile_height: int
    tile_width: int
    stored: bool = True
    """Whether the result is stored as a map; else the next pass computes what it reads of it, tile by tile."""

    @property
    def runs(self) -> bool:
        """Whether the pass has tiles of its own: without a stored map, only to measure its result."""
        return self.stored or self.spec.measured

    @property
    def whole(self) -> bool:
        """Whether one tile is the whole map."""
        return (self.tile_height, self.tile_width) == (self.height, self.width)

    @property
    def regions(self) -> tuple[Region, ...]:
        return Region(0, 0, self.height, self.width).grid(self.tile_height, self.tile_width)


@dataclass(frozen=True)
class Plan:
    """How one image goes through a program."""

    height: int
    width: int
    maps: Place
    keys: Place
    """Where keys and values of the attention are."""
    steps: tuple[Step, ...]
    device_bytes: int
    """Maximum memory of maps and tiles on the device, without weights and workspaces of kernels."""
    host_bytes: int
    """Maximum memory of maps in host memory; 0 if they are on the device."""
    fits: bool
    """Whether that is within the free memory."""
    kernels: Kernels

    @property
    def streamed(self) -> bool:
        """Whether attention reads keys and values in tiles."""
        return self.keys == "host" or self.kernels.attention == "streamed"

    @property
    def tiles(self) -> int:
        """Number of tiles over all passes."""
        return sum(len(step.regions) for step in self.steps if step.runs)


def plan_tiles(
    specs: Sequence[PassSpec], height: int, width: int, itemsize: int, free: int | None = None, tile: int | None = None,
    places: Sequence[tuple[Place, Place]] = PLACES, kernels: Kernels = NVIDIA,
) -> Plan:  # fmt: skip
    """Choose the place of the maps and the tiles of each pass for one image.

    Args:
        height, width: of the input: latent cells for a decoder, pixels for an encoder.
        itemsize: bytes of one value.
        free: bytes that maps and tiles may take on the device; None if the device sets no limit, as on the CPU.
        tile: maximum side of a tile in pixels of its map; tiles are smaller if memory is limited. None for automatic.
        places: the first of them that fits is chosen, or the last.
        kernels: of the device.

    Raises:
        InputError: for an impossible tile size, or an image that is too small for the program.
    """
    check_tile(tile)
    for maps, keys in places[:-1]:
        plan = plan_places(specs, height, width, itemsize, free, tile, maps, keys, kernels)
        if plan.fits:
            return plan
    return plan_places(specs, height, width, itemsize, free, tile, *places[-1], kernels)


def check_tile(tile: int | None) -> None:
    """Raise ``InputError`` for a tile size that is too small; None is automatic."""
    if tile is not None and tile < MIN_TILE:
        raise InputError(f"VAE tile {tile}: expected at least {MIN_TILE} pixels")


def check_window(window: int | None) -> None:
    """Raise ``InputError`` for a window of the attention that is too small; None is all cells."""
    if window is not None:
        check_number("VAE attention window", window, MIN_TILE, whole=True)


def plan_places(
    specs: Sequence[PassSpec], height: int, width: int, itemsize: int, free: int | None, tile: int | None, maps: Place,
    keys: Place, kernels: Kernels = NVIDIA,
) -> Plan:  # fmt: skip
    """``plan_tiles`` for given places; counts the maps that exist during each pass, as ``execute`` allocates and frees them."""
    usable = None if free is None else int(free * HEADROOM)
    sizes = list(itertools.accumulate(specs, lambda size, spec: spec.size(*size), initial=(height, width)))
    if min(min(size) for size in sizes) < 1:
        raise InputError(f"an image of {width}x{height} is too small for this VAE")
    ends = specs[0].in_channels * height * width + specs[-1].out_channels * sizes[-1][0] * sizes[-1][1]  # input and result
    x, hidden, pair = specs[0].in_channels, 0, 0  # channels of the two maps; bytes of keys and values
    steps: list[Step] = []
    source: Step | None = None  # the pass before, if its result is not stored
    source_input = 0  # bytes of the map that it reads
    peaks, fits = {"device": 0, "host": 0}, True
    for spec, following, before, size in zip(specs, (*specs[1:], None), sizes, sizes[1:], strict=False):
        if spec.kind == "keys":
            pair = 2 * spec.out_channels * size[0] * size[1] * itemsize
        in_place = spec.kind in ("keys", "attention") or (spec.kind == "residual_end" and spec.out_channels <= x)
        target = 0 if in_place else spec.out_channels * size[0] * size[1] * itemsize
        only_next = spec.kind == "conv" and following is not None and following.kind == "conv" and source is None
        stored = not (only_next and free is None and maps == "device" and target >= _LARGE_MAP)
        target *= stored
        held = {"device": 0, "host": 0}
        held[maps] += (ends + (x + hidden) * before[0] * before[1]) * itemsize + target + source_input
        held[keys] += pair
        bytes_of = functools.partial(_working_set, spec, source, itemsize, maps, keys, kernels, size[0] * size[1])
        left = None if usable is None else usable - held["device"]
        step = Step(spec, *size, *_tile_size(spec, size, left, maps, bytes_of, tile, kernels), stored)
        steps.append(step)
        adopted = stored and step.whole and maps == "device" and spec.kind in _ADOPTING
        working_set = bytes_of(step.tile_height, step.tile_width) - target * adopted
        if left is not None:
            cramped = maps == "device" and not step.whole and left < _MIN_FREE
            fits = fits and working_set <= left and not cramped
        peaks = {place: max(peaks[place], held[place] + working_set * (place == "device")) for place in peaks}
        source, source_input = (None, 0) if stored else (step, x * before[0] * before[1] * itemsize)
        if not stored:
            x = 0
        elif spec.kind == "residual_start":
            hidden = spec.out_channels
        elif spec.kind in ("conv", "residual_end"):
            x, hidden = x if in_place and not adopted else spec.out_channels, 0
        elif spec.kind == "attention":
            pair = 0
    return Plan(height, width, maps, keys, tuple(steps), peaks["device"], peaks["host"], fits, kernels)


def _working_set(
    spec: PassSpec, source: Step | None, itemsize: int, maps: Place, keys: Place, kernels: Kernels, tokens: int,
    tile_height: int, tile_width: int,
) -> int:  # fmt: skip
    """Bytes of a tile, and of what it computes of the result of ``source``, if that is not stored."""
    own = pass_bytes(spec, tile_height, tile_width, itemsize, maps, keys, kernels, tokens)
    if source is None:
        return own
    needed = _input_side(spec, tile_height), _input_side(spec, tile_width)
    return own + pass_bytes(source.spec, *needed, itemsize, maps, keys, kernels, tokens)


def _input_side(spec: PassSpec, side: int) -> int:
    """Side of what a tile of ``side`` reads, away from the borders of the image."""
    if spec.rescale == "same":
        return side + 2 * spec.halo
    return 2 * side + 1 if spec.rescale == "down" else side // 2 + 3


def _tile_size(
    spec: PassSpec, size: tuple[int, int], left: int | None, maps: Place, bytes_of: Callable[[int, int], int], tile: int | None,
    kernels: Kernels,
) -> tuple[int, int]:  # fmt: skip
    """Height and width of the largest tiles that fit into ``left`` bytes and have no side above ``tile``, if given."""
    longest = min(side for side in (max(size), tile, spec.window) if side is not None)

    def possible(tile_height: int, tile_width: int, budget: int) -> bool:
        scale = 2 if spec.rescale == "down" else 1
        wide = max(
            spec.in_channels * scale**2,
            spec.out_channels,
            unfolded_values(spec, kernels),
            score_values(spec, kernels, size[0] * size[1]),
        )
        elements = wide * (tile_height + 4) * (tile_width + 4)
        return bytes_of(tile_height, tile_width) <= budget and elements <= _MAX_ELEMENTS

    if left is not None and maps == "device" and longest == max(size):
        scratch = kernels.unfolded or score_values(spec, kernels, size[0] * size[1])
        if possible(*size, min(left, _SCRATCH_BYTES) if scratch else left):
            return size
    budget = _CPU_TILE_BYTES if left is None else min(left, _TILE_BYTES)
    side = MIN_TILE
    while side < longest:
        wider = min(side + 16, longest)
        if not possible(min(wider, size[0]), min(wider, size[1]), budget):
            break
        side = wider
    height, width = (_even_side(length, side) for length in size)
    return height, width


def _even_side(length: int, side: int) -> int:
    """At most ``side``, for as many tiles of about equal size; a multiple of 8, since kernels are set up for each size."""
    count = -(-length // side)
    return length if count == 1 else min(side, -(-length // count // 8) * 8)
