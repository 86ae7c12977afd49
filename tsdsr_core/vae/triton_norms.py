"""The norms of the tiled VAE as Triton kernels, for 16-bit maps on CUDA whose channels lie together.

A map is read once for its statistics, while the residual is added where there is one, and once more to be normalised and
activated. Nothing else of its size is read or written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

_PIXELS, _CHANNELS = 32, 64
"""Of what a program holds at once."""
_PARTS = 512
"""About as many programs share the pixels of a map: enough for every processor, few enough to merge in no time."""


class TritonNorms:
    """``norms.Norms``; statistics of a tile are a tensor ``(programs, 3, C)``: pixels, mean and summed squared deviation."""

    adds_late = True

    def add(self, tile: Tensor, x: Tensor | None, eps: float | None) -> tuple[Tensor, list[Tensor]]:
        if eps is None and x is None:
            return tile, []
        _, channels, height, width = tile.shape
        pixels = _PIXELS * triton.cdiv(height * width, _PIXELS * _PARTS)
        grid = triton.cdiv(height * width, pixels), triton.cdiv(channels, _CHANNELS)
        parts = tile.new_empty(grid[0], 3, channels, dtype=torch.float32)
        given = tile if x is None else x
        launch(
            _add, grid, (tile, x, parts), height * width, width,
            channels, *_strides(tile), *_strides(given), pixels, MEASURED=eps is not None, PIXELS=_PIXELS, CHANNELS=_CHANNELS,
        )  # fmt: skip
        return tile, [] if eps is None else [parts]

    def scale_shift(self, parts: list[Tensor], norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        merged = parts[0] if len(parts) == 1 else torch.cat(parts)
        channels = merged.shape[2]
        each = channels // norm.num_groups
        scale, shift = (merged.new_empty(1, channels, 1, 1) for _ in range(2))
        launch(
            _merge, (norm.num_groups,), (merged, weight, bias, scale, shift), len(merged), channels, each, norm.eps,
            ROWS=max(1, 1024 // triton.next_power_of_2(each)), EACH=triton.next_power_of_2(each),
        )  # fmt: skip
        return scale, shift

    def apply(self, tile: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
        _, channels, height, width = tile.shape
        result = torch.empty(tile.shape, dtype=tile.dtype, device=tile.device, memory_format=torch.channels_last)
        grid = triton.cdiv(height * width, _PIXELS), triton.cdiv(channels, _CHANNELS)
        launch(
            _apply, grid, (tile, scale, shift, result), height * width, width, channels, *_strides(tile),
            ACTIVATE=activate, PIXELS=_PIXELS, CHANNELS=_CHANNELS,
        )  # fmt: skip
        return result

    def double(self, tile: Tensor, x: Tensor | None) -> Tensor:
        _, channels, height, width = tile.shape
        shape, given = (1, channels, 2 * height, 2 * width), tile if x is None else x
        result = torch.empty(shape, dtype=tile.dtype, device=tile.device, memory_format=torch.channels_last)
        grid = triton.cdiv(height * width, _PIXELS), triton.cdiv(channels, _CHANNELS)
        launch(
            _double, grid, (tile, x, result), height * width, width, channels, *_strides(tile), *_strides(given),
            PIXELS=_PIXELS, CHANNELS=_CHANNELS,
        )  # fmt: skip
        return result


def launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], *numbers: float, **constants: int) -> None:
    """Run ``kernel``, which reads or writes each of ``tensors`` once."""
    kernel[grid](*tensors, *numbers, **constants)


def _strides(tile: Tensor) -> tuple[int, int]:
    """Elements from one row, and from one pixel, to the next; the channels of a pixel lie together."""
    assert tile.stride(1) == 1 or tile.shape[1] == 1, f"channels {tile.stride(1)} elements apart"
    return tile.stride(2), tile.stride(3)


@triton.jit
def _add(
    tile, x, parts, area, width, channels, tile_row, tile_pixel, x_row, x_pixel, pixels,
    MEASURED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``tile + x`` for a run of pixels and, lane by lane, its mean and squared deviation (Welford 1962)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mean = tl.zeros((PIXELS, CHANNELS), tl.float32)
    square = tl.zeros((PIXELS, CHANNELS), tl.float32)
    count = tl.zeros((PIXELS, 1), tl.float32)
    start = tl.program_id(0) * pixels
    for step in range(0, pixels, PIXELS):
        pixel = start + step + tl.arange(0, PIXELS)[:, None]
        inside = pixel < area
        known = inside & (channel < channels)
        row, column = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
        at = row * tile_row + column * tile_pixel + channel
        value = tl.load(tile + at, mask=known, other=0.0)
        if x is not None:
            value = (value.to(tl.float32) + tl.load(x + row * x_row + column * x_pixel + channel, mask=known, other=0.0)).to(
                tile.dtype.element_ty
            )
            tl.store(tile + at, value, mask=known)
        if MEASURED:
            count += inside.to(tl.float32)
            off = tl.where(inside, value.to(tl.float32) - mean, 0.0)
            mean += off / tl.maximum(count, 1.0)
            square += off * tl.where(inside, value.to(tl.float32) - mean, 0.0)
    if MEASURED:
        total = tl.sum(count, 0)[None, :]
        whole = tl.sum(count * mean, 0)[None, :] / total
        square += count * (mean - whole) * (mean - whole)
        out = parts + tl.program_id(0) * 3 * channels + channel
        tl.store(out, tl.zeros((1, CHANNELS), tl.float32) + total, mask=channel < channels)
        tl.store(out + channels, whole, mask=channel < channels)
        tl.store(out + 2 * channels, tl.sum(square, 0)[None, :], mask=channel < channels)


@triton.jit
def _merge(parts, weight, bias, scale, shift, rows, channels, each, eps, ROWS: tl.constexpr, EACH: tl.constexpr):
    """Scale and shift of the channels of one group (Chan, Golub, LeVeque 1979)."""
    channel = tl.arange(0, EACH)[None, :]
    own = channel < each
    first = tl.program_id(0) * each
    near = tl.load(parts + channels + first)  # sums of differences from it are exact where a map is constant
    count = tl.zeros((ROWS, EACH), tl.float32)
    off = tl.zeros((ROWS, EACH), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at, known = parts + row * 3 * channels + first + channel, own & (row < rows)
        pixels = tl.load(at, mask=known, other=0.0)
        count += pixels
        off += pixels * (tl.load(at + channels, mask=known, other=0.0) - near)
    total = tl.sum(count)
    mean = near + tl.sum(off) / total
    square = tl.zeros((ROWS, EACH), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at, known = parts + row * 3 * channels + first + channel, own & (row < rows)
        away = tl.load(at + channels, mask=known, other=0.0) - mean
        square += tl.load(at + 2 * channels, mask=known, other=0.0) + tl.load(at, mask=known, other=0.0) * away * away
    inverse = 1.0 / tl.sqrt(tl.sum(square) / total + eps)
    factor = tl.load(weight + first + channel, mask=own, other=0.0).to(tl.float32) * inverse
    tl.store(scale + first + channel, factor, mask=own)
    offset = tl.load(bias + first + channel, mask=own, other=0.0).to(tl.float32) - mean * factor
    tl.store(shift + first + channel, offset, mask=own)


@triton.jit
def _apply(
    tile, scale, shift, result, area, width, channels, tile_row, tile_pixel,
    ACTIVATE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``tile * scale + shift``, then SiLU, in fp32."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    own = channel < channels
    known = (pixel < area) & own
    at = (pixel // width).to(tl.int64) * tile_row + (pixel % width).to(tl.int64) * tile_pixel + channel
    value = tl.load(tile + at, mask=known, other=0.0).to(tl.float32)
    value = value * tl.load(scale + channel, mask=own, other=0.0) + tl.load(shift + channel, mask=own, other=0.0)
    if ACTIVATE:
        value = value * tl.sigmoid(value)
    tl.store(result + pixel.to(tl.int64) * channels + channel, value.to(result.dtype.element_ty), mask=known)


@triton.jit
def _double(
    tile, x, result, area, width, channels, tile_row, tile_pixel, x_row, x_pixel, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """``tile + x``, each pixel four times."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = (pixel < area) & (channel < channels)
    row, column = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
    value = tl.load(tile + row * tile_row + column * tile_pixel + channel, mask=known, other=0.0)
    if x is not None:
        value = value.to(tl.float32) + tl.load(x + row * x_row + column * x_pixel + channel, mask=known, other=0.0)
    value = value.to(result.dtype.element_ty)
    out = result + (4 * row * width + 2 * column) * channels + channel
    tl.store(out, value, mask=known)
    tl.store(out + channels, value, mask=known)
    tl.store(out + 2 * width * channels, value, mask=known)
    tl.store(out + (2 * width + 1) * channels, value, mask=known)
