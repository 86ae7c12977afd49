"""One pass of an autoencoder as numbers, and the memory that a tile of it takes: whole numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host"]
"""Where maps, keys and values are: on the device that computes, or in host memory."""

KEY_TILE = 64
"""Side of the tiles in which attention reads keys and values if it does not see them all at once."""
_KERNEL_SIZE = 9
"""Weights of a 3x3 kernel."""


@dataclass(frozen=True)
class Kernels:
    """How the kernels of a device work, as far as memory goes."""

    attention: Literal["fused", "scored", "streamed"] = "fused"
    """fused: torch's kernel, which stores no scores. scored: torch's, which stores those of a tile's queries with all keys.
    streamed: our own, which stores those of a tile's queries with a tile of keys."""
    unfolded: bool = False
    """Whether convolutions first write out the neighbours of each pixel (im2col)."""


NVIDIA = Kernels()


@dataclass(frozen=True)
class PassSpec:
    """One pass as numbers."""

    kind: Literal["conv", "residual_start", "residual_end", "keys", "attention"]
    """conv: x becomes the result. residual_start: the result becomes the hidden map, beside x. residual_end: the hidden map
    becomes the result, added to x. keys: keys and values of x. attention: its output, added to x."""
    in_channels: int
    out_channels: int
    rescale: Literal["same", "up", "down"] = "same"
    """up: the input is doubled before the convolution. down: the convolution has stride 2."""
    halo: int = 1
    """Pixels around a tile that the convolution needs: 1 for 3x3, 0 for 1x1."""
    normalised: bool = False
    """Whether the input is normalised while it is read."""
    measured: bool = False
    """Whether the result will be normalised: its mean and variance are taken while it is written."""
    window: int | None = None
    """attention: cells beyond its tile, on each side, whose keys a query sees. None for all keys, which alone is exact."""
    residual_channels: int = 0
    """residual_end: channels of x. If they differ from those of the result, x goes through a convolution of its own."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for those of the input."""
        if self.rescale == "up":
            return 2 * height, 2 * width
        return (height // 2, width // 2) if self.rescale == "down" else (height, width)


def unfolded_values(spec: PassSpec, kernels: Kernels) -> int:
    """Values that a convolution by im2col writes out for each pixel of its result; 0 for other convolutions."""
    return _KERNEL_SIZE * spec.in_channels * (kernels.unfolded and spec.halo > 0)


def score_values(spec: PassSpec, kernels: Kernels, tokens: int) -> int:
    """Attention scores of each query that are in memory at once."""
    if spec.kind != "attention" or kernels.attention == "fused":
        return 0
    return tokens if kernels.attention == "scored" else min(tokens, KEY_TILE**2)


def pass_bytes(
    spec: PassSpec, tile_height: int, tile_width: int, itemsize: int, maps: Place, keys: Place, kernels: Kernels, tokens: int
) -> int:
    """The most that one tile of a pass takes on the device beside the maps that live there.

    Args:
        tokens: pixels of the whole map, for which there are keys.
    """
    area = tile_height * tile_width
    wide = max(4, itemsize)  # statistics and normalisation are in fp32
    if spec.rescale == "up":
        read, seen = (tile_height // 2 + 3) * (tile_width // 2 + 3), (tile_height + 6) * (tile_width + 6)
    elif spec.rescale == "down":
        read = seen = (2 * tile_height + 1) * (2 * tile_width + 1)
    else:
        read = seen = (tile_height + 2 * spec.halo) * (tile_width + 2 * spec.halo)
    given = area if spec.rescale == "down" else seen
    moved = spec.in_channels * read * itemsize if maps == "host" else 0
    ready = spec.in_channels * seen * itemsize
    normal = spec.in_channels * read * wide if spec.normalised and wide > itemsize else 0
    added = spec.residual_channels * area * itemsize
    own = spec.out_channels * area * itemsize * (spec.residual_channels not in (0, spec.out_channels))
    if spec.kind in ("keys", "attention"):
        return _attention_bytes(spec, area, itemsize, maps, keys, kernels, tokens)
    result, returned = spec.out_channels * given * itemsize, spec.out_channels * area * itemsize
    convolved = ready + unfolded_values(spec, kernels) * given * itemsize + result
    peak = max(
        moved + normal + ready, convolved, result + added + own, result + spec.out_channels * area * wide * spec.measured
    )
    if maps == "host":  # beside them lie two inputs of other tiles, and a result on its way back
        peak = max(peak, result + returned) + 2 * max(moved, added) + returned
    return peak


def _attention_bytes(spec: PassSpec, area: int, itemsize: int, maps: Place, keys: Place, kernels: Kernels, tokens: int) -> int:
    wide = max(4, itemsize)
    one = spec.in_channels * area  # every tensor here has as many channels
    normal = wide if wide > itemsize else 0
    moved = itemsize * (maps == "host")
    if spec.kind == "keys":
        return one * (max(moved + normal + itemsize, 3 * itemsize) + (2 + 2) * moved)
    if keys == "host" or kernels.attention == "streamed":
        seen = min(tokens, KEY_TILE**2)
        pair = 2 * spec.in_channels * seen * (2 * itemsize + wide)  # as they come, and in fp32
        peak = one * (itemsize + 3 * wide) + 2 * area * seen * wide + pair
    else:
        peak = one * max(itemsize + normal, 3 * itemsize, 2 * itemsize + spec.measured * wide)
        if kernels.attention == "scored":  # in fp32, before and after the softmax
            peak += 2 * area * tokens * wide + (one + 2 * spec.in_channels * tokens) * normal
    return peak + one * (1 + 2 + 1) * moved
