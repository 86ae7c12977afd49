"""One pass of an autoencoder as numbers, and the memory that a tile of it takes: whole numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host"]
"""Of maps, keys and values: the device that computes, or host memory."""

KEY_TILE = 64
"""Side of the tiles in which attention reads keys and values where it does not see them all at once."""
_UNFOLDED = 9
"""Elements of the kernel of a convolution that is not pointwise."""


@dataclass(frozen=True)
class Kernels:
    """How the kernels of a device work, as far as memory goes."""

    attention: Literal["fused", "scored", "streamed"] = "fused"
    """fused: torch's, which keeps no scores. scored: torch's, which keeps the scores of a tile's queries with all keys.
    streamed: ours, which keeps the scores of a tile's queries with a tile of keys."""
    unfolded: bool = False
    """Whether convolutions first write out the neighbours of each pixel (im2col)."""


NVIDIA = Kernels()


@dataclass(frozen=True)
class Form:
    """One pass as numbers."""

    kind: Literal["map", "open", "close", "keys", "queries"]
    """map: x becomes the result. open: the result becomes h, beside x. close: h becomes the result, added to x.
    keys: keys and values of x. queries: what those say to each pixel, added to x."""
    reads: int
    """Channels of the input."""
    writes: int
    """Channels of the result."""
    rescale: Literal["same", "up", "down"] = "same"
    """up: the input is doubled before the convolution. down: the convolution has stride 2."""
    reach: int = 1
    """Pixels that the convolution sees around its own: 1 for 3x3, 0 for 1x1."""
    normed: bool = False
    """The input is normalised while it is read."""
    measured: bool = False
    """The result will be normalised: mean and variance are taken while it is written."""
    adds: int = 0
    """close: channels of x; where they are not those of the result, x goes through a convolution of its own."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for those of the input."""
        if self.rescale == "up":
            return 2 * height, 2 * width
        return (height // 2, width // 2) if self.rescale == "down" else (height, width)


def columns(form: Form, kernels: Kernels) -> int:
    """Values that a convolution writes out for each pixel of its result."""
    return _UNFOLDED * form.reads * (kernels.unfolded and form.reach > 0)


def scores(form: Form, kernels: Kernels, tokens: int) -> int:
    """Scores of each query that live at once."""
    if form.kind != "queries" or kernels.attention == "fused":
        return 0
    return tokens if kernels.attention == "scored" else min(tokens, KEY_TILE**2)


def tile_bytes(
    form: Form, tile_height: int, tile_width: int, itemsize: int, maps: Place, keys: Place, kernels: Kernels, tokens: int
) -> int:
    """The most that one tile of a pass takes on the device beside the maps that live there.

    Args:
        tokens: pixels of the whole map, for which there are keys.
    """
    area = tile_height * tile_width
    wide = max(4, itemsize)  # statistics and normalisation are in fp32
    if form.rescale == "up":
        read, seen = (tile_height // 2 + 3) * (tile_width // 2 + 3), (tile_height + 6) * (tile_width + 6)
    elif form.rescale == "down":
        read = seen = (2 * tile_height + 1) * (2 * tile_width + 1)
    else:
        read = seen = (tile_height + 2 * form.reach) * (tile_width + 2 * form.reach)
    given = area if form.rescale == "down" else seen
    moved = form.reads * read * itemsize if maps == "host" else 0
    ready = form.reads * seen * itemsize
    normal = form.reads * read * wide if form.normed and wide > itemsize else 0
    added = form.adds * area * itemsize
    own = form.writes * area * itemsize * (form.adds not in (0, form.writes))
    if form.kind in ("keys", "queries"):
        return _attention_bytes(form, area, itemsize, maps, keys, kernels, tokens)
    result, returned = form.writes * given * itemsize, form.writes * area * itemsize
    convolved = ready + columns(form, kernels) * given * itemsize + result
    peak = max(moved + normal + ready, convolved, result + added + own, result + form.writes * area * wide * form.measured)
    if maps == "host":  # beside them lie two inputs of other tiles, and a result on its way back
        peak = max(peak, result + returned) + 2 * max(moved, added) + returned
    return peak


def _attention_bytes(form: Form, area: int, itemsize: int, maps: Place, keys: Place, kernels: Kernels, tokens: int) -> int:
    wide = max(4, itemsize)
    one = form.reads * area  # every tensor here has as many channels
    normal = wide if wide > itemsize else 0
    moved = itemsize * (maps == "host")
    if form.kind == "keys":
        return one * (max(moved + normal + itemsize, 3 * itemsize) + (2 + 2) * moved)
    if keys == "host" or kernels.attention == "streamed":
        seen = min(tokens, KEY_TILE**2)
        pair = 2 * form.reads * seen * (2 * itemsize + wide)  # as they come, and in fp32
        peak = one * (itemsize + 3 * wide) + 2 * area * seen * wide + pair
    else:
        peak = one * max(itemsize + normal, 3 * itemsize, 2 * itemsize + form.measured * wide)
        if kernels.attention == "scored":  # in fp32, before and after the softmax
            peak += 2 * area * tokens * wide + (one + 2 * form.reads * tokens) * normal
    return peak + one * (1 + 2 + 1) * moved
