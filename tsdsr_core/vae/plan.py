"""Where the maps of a tiled VAE live and how large its tiles are: whole numbers only, so that a table can check it.

A pass runs one convolution (or one half of the attention) over the whole picture, tile by tile. It reads one map, the
full activation before it, and writes another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError
from .forms import NVIDIA, Form, Kernels, Place, columns, scores, tile_bytes

PLACES: tuple[tuple[Place, Place], ...] = (("device", "device"), ("host", "device"), ("host", "host"))
"""Of the maps and of the attention's keys and values, the quickest first."""

LEAST_TILE = 16
"""Side in pixels of a map; below it nearly all work goes into the halo."""
_TILE_BYTES = 512 * 2**20
"""Working set of one tile on a device, where a map does not fit as one: beyond it the halo costs under 1 %."""
_SCRATCH_BYTES = 2 * 2**30
"""On a device a map is one tile wherever that fits; up to this working set where the kernels write out scores or neighbours."""
_CPU_TILE_BYTES = 64 * 2**20
"""On the CPU: tensors of such tiles come from memory that the allocator keeps, so that no pages need be made anew."""
_LEAST_SHARE = 128 * 2**20
"""Room for a tile that must be left beside the maps, or the maps go to host memory."""
HEADROOM = 0.8
"""Share of the free memory that is planned with; the rest is for the workspaces of the convolutions."""
_LARGE_MAP = 256 * 2**20
"""On the CPU a map from this size on is not kept where only the next pass reads it: that computes its tiles once more."""
_MOST_ELEMENTS = 2**31 - 1
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

    def grid(self, tile_height: int, tile_width: int) -> tuple[Region, ...]:
        """Disjoint tiles of ``tile_height`` x ``tile_width``, row by row; the last of each row and column may be smaller."""
        rows, columns = _cuts(self.top, self.bottom, tile_height), _cuts(self.left, self.right, tile_width)
        return tuple(Region(a, c, b, d) for a, b in rows for c, d in columns)


@dataclass(frozen=True)
class Reading:
    """What a tile of a pass's result needs of the map that the pass reads."""

    area: Region
    skip: tuple[int, int]
    """Rows and columns that the convolution gives before the tile, for want of neighbours there."""
    pad: tuple[int, int]
    """Rows and columns of zeros beyond the picture that a convolution of stride 2 takes."""


def reading(form: Form, tile: Region, height: int, width: int) -> Reading:
    """The part of a ``height`` x ``width`` map that ``tile`` of the result needs; nothing beyond the picture's borders.

    At a border the area ends and the convolution's own zeros follow, as they do for the whole picture.
    """
    top, bottom, skip_rows, pad_rows = _span(form, tile.top, tile.bottom, height)
    left, right, skip_columns, pad_columns = _span(form, tile.left, tile.right, width)
    return Reading(Region(top, left, bottom, right), (skip_rows, skip_columns), (pad_rows, pad_columns))


def _span(form: Form, start: int, end: int, length: int) -> tuple[int, int, int, int]:
    if form.rescale == "down":  # kernel 3, stride 2, one zero after the last pixel
        return 2 * start, min(length, 2 * end + 1), 0, max(0, 2 * end + 1 - length)
    if form.rescale == "up":
        first = max(0, start // 2 - 1)
        return first, min(length, -(-end // 2) + 1), start - 2 * first, 0
    first = max(0, start - form.reach)
    return first, min(length, end + form.reach), start - first, 0


def _cuts(start: int, end: int, tile: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([*range(start, end, tile), end]))


@dataclass(frozen=True)
class Step:
    """One pass: the size of its result and of its tiles, in pixels of the result."""

    form: Form
    height: int
    width: int
    tile_height: int
    tile_width: int
    kept: bool = True
    """Whether the result is kept as a map; else the next pass computes what it reads of it, tile by tile."""

    @property
    def runs(self) -> bool:
        """Whether the pass has tiles of its own: without a map only where the result must be measured."""
        return self.kept or self.form.measured

    @property
    def whole(self) -> bool:
        """Whether one tile is the whole map."""
        return (self.tile_height, self.tile_width) == (self.height, self.width)

    @property
    def regions(self) -> tuple[Region, ...]:
        return Region(0, 0, self.height, self.width).grid(self.tile_height, self.tile_width)


@dataclass(frozen=True)
class Plan:
    """How one picture goes through a program."""

    height: int
    width: int
    maps: Place
    keys: Place
    """Where keys and values of the attention lie."""
    steps: tuple[Step, ...]
    device_bytes: int
    """The most that maps and tiles take on the device, without weights and the workspaces of single kernels."""
    host_bytes: int
    """The most that maps take in host memory; 0 where they live on the device."""
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
    forms: Sequence[Form], height: int, width: int, itemsize: int, free: int | None = None, tile: int | None = None,
    places: Sequence[tuple[Place, Place]] = PLACES, kernels: Kernels = NVIDIA,
) -> Plan:  # fmt: skip
    """Choose the place of the maps and the tiles of each pass for one picture.

    Args:
        height, width: of what goes in: latent cells for a decoder, pixels for an encoder.
        itemsize: bytes of one value.
        free: bytes that maps and tiles may take on the device; None where there is no limit of a device, as on the CPU.
        tile: greatest side of any tile, in pixels of the map that it is part of; where memory is short they are smaller still.
            None for what suits the memory.
        places: the first of them that fits is taken, or the last.
        kernels: of the device.

    Raises:
        InputError: for an impossible tile, or a picture of which the program leaves nothing.
    """
    check_tile(tile)
    for maps, keys in places[:-1]:
        plan = plan_places(forms, height, width, itemsize, free, tile, maps, keys, kernels)
        if plan.fits:
            return plan
    return plan_places(forms, height, width, itemsize, free, tile, *places[-1], kernels)


def check_tile(tile: int | None) -> None:
    """Raise ``InputError`` for a wanted side of tiles that is too small."""
    if tile is not None and tile < LEAST_TILE:
        raise InputError(f"VAE tile {tile}: expected at least {LEAST_TILE} pixels")


def plan_places(
    forms: Sequence[Form], height: int, width: int, itemsize: int, free: int | None, tile: int | None, maps: Place, keys: Place,
    kernels: Kernels = NVIDIA,
) -> Plan:  # fmt: skip
    """``plan_tiles`` for given places; counts the maps that live during each pass, as ``vae_tiled`` makes and drops them."""
    usable = None if free is None else int(free * HEADROOM)
    sizes = list(itertools.accumulate(forms, lambda size, form: form.size(*size), initial=(height, width)))
    if min(min(size) for size in sizes) < 1:
        raise InputError(f"a picture of {width}x{height} is too small for this VAE")
    ends = forms[0].reads * height * width + forms[-1].writes * sizes[-1][0] * sizes[-1][1]  # values of input and result
    x, h, pair = forms[0].reads, 0, 0  # x, h: channels of the maps; pair: bytes of keys and values
    steps: list[Step] = []
    source: Step | None = None  # the pass before, where its result is not kept
    below = 0  # bytes of the map that it reads
    peaks, fits = {"device": 0, "host": 0}, True
    for form, following, before, size in zip(forms, (*forms[1:], None), sizes, sizes[1:], strict=False):
        if form.kind == "keys":
            pair = 2 * form.writes * size[0] * size[1] * itemsize
        in_place = form.kind in ("keys", "queries") or (form.kind == "close" and form.writes <= x)
        target = 0 if in_place else form.writes * size[0] * size[1] * itemsize
        chained = form.kind == "map" and following is not None and following.kind == "map" and source is None
        kept = not (chained and free is None and maps == "device" and target >= _LARGE_MAP)
        target *= kept
        held = {"device": 0, "host": 0}
        held[maps] += (ends + (x + h) * before[0] * before[1]) * itemsize + target + below
        held[keys] += pair

        def bytes_of(
            tile_height: int, tile_width: int, form: Form = form, tokens: int = size[0] * size[1], source: Step | None = source
        ) -> int:  # fmt: skip
            own = tile_bytes(form, tile_height, tile_width, itemsize, maps, keys, kernels, tokens)
            if source is None:
                return own
            needed = (_needed(form, tile_height), _needed(form, tile_width))
            return own + tile_bytes(source.form, *needed, itemsize, maps, keys, kernels, tokens)

        left = None if usable is None else usable - held["device"]
        step = Step(form, *size, *_tile_size(form, size, left, maps, bytes_of, tile, kernels), kept)
        steps.append(step)
        adopted = kept and step.whole and maps == "device" and form.kind in ("map", "open", "close")  # the tile becomes the map
        working_set = bytes_of(step.tile_height, step.tile_width) - target * adopted
        if left is not None:
            cramped = maps == "device" and not step.whole and left < _LEAST_SHARE
            fits = fits and working_set <= left and not cramped
        peaks = {place: max(peaks[place], held[place] + working_set * (place == "device")) for place in peaks}
        source, below = (None, 0) if kept else (step, x * before[0] * before[1] * itemsize)
        if not kept:
            x = 0
        elif form.kind == "open":
            h = form.writes
        elif form.kind in ("map", "close"):
            x, h = x if in_place and not adopted else form.writes, 0
        elif form.kind == "queries":
            pair = 0
    return Plan(height, width, maps, keys, tuple(steps), peaks["device"], peaks["host"], fits, kernels)


def _needed(form: Form, side: int) -> int:
    """Side of what a tile of ``side`` reads, away from the borders."""
    if form.rescale == "same":
        return side + 2 * form.reach
    return 2 * side + 1 if form.rescale == "down" else side // 2 + 3


def _tile_size(
    form: Form, size: tuple[int, int], left: int | None, maps: Place, bytes_of: Callable[[int, int], int], tile: int | None,
    kernels: Kernels,
) -> tuple[int, int]:  # fmt: skip
    """Height and width of the largest tiles that keep within ``left`` bytes and, where given, have no side above ``tile``."""
    longest = max(size) if tile is None else min(tile, max(size))

    def possible(tile_height: int, tile_width: int, budget: int) -> bool:
        scale = 2 if form.rescale == "down" else 1
        wide = max(form.reads * scale**2, form.writes, columns(form, kernels), scores(form, kernels, size[0] * size[1]))
        elements = wide * (tile_height + 4) * (tile_width + 4)
        return bytes_of(tile_height, tile_width) <= budget and elements <= _MOST_ELEMENTS

    if left is not None and maps == "device" and longest == max(size):
        scratch = kernels.unfolded or scores(form, kernels, size[0] * size[1])
        if possible(*size, min(left, _SCRATCH_BYTES) if scratch else left):
            return size
    budget = _CPU_TILE_BYTES if left is None else min(left, _TILE_BYTES)
    side = LEAST_TILE
    while side < longest:
        wider = min(side + 16, longest)
        if not possible(min(wider, size[0]), min(wider, size[1]), budget):
            break
        side = wider
    height, width = (_even_side(length, side) for length in size)
    return height, width


def _even_side(length: int, side: int) -> int:
    """At most ``side``, for as many tiles, but about equal ones; few sizes, since kernels are set up for each."""
    count = -(-length // side)
    return length if count == 1 else min(side, -(-length // count // 8) * 8)
