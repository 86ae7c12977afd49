"""No-reference metrics from the spectrum of an image: periodic grids, and sharpness."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from .fidelity import luma, normalised

PERIODS = (8, 16)
"""Periods in pixels of the measured grids: a latent cell and a transformer token."""
LEAST_SIDE = 64
"""Minimum side of an image in pixels."""
_BLOCKS = (256, 128, LEAST_SIDE)
"""Possible sides of the blocks in pixels."""
_NEIGHBOURHOOD = 4
"""Maximum distance of the frequencies that a peak is compared with, in frequency steps."""
_ROUNDING = 1 / 12
"""Variance of rounding to whole levels, in squared levels."""
_COARSE, _FINE = (1 / 32, 1 / 8), (1 / 8, 3 / 8)
"""Frequency bands of ``sharpness`` in cycles per pixel."""


def grid_peaks(image: Tensor, period: int) -> Tensor:
    """Strength of a grid that repeats every ``period`` pixels, ``(B,)``: 1 = none, 2 = twice the power of nearby frequencies.

    A grid has peaks at the frequencies ``(i, j) / period`` cycles per pixel, where the power ``P`` of a photograph does not
    differ from its surroundings.  The result is the mean of ``P(i, j)`` divided by the power around it, over the ``(i, j)``
    on the axes (grids of lines) or over all ``(i, j)`` (patterns of cells), whichever is larger.  At least one of ``i`` and
    ``j`` is odd; other frequencies also belong to half the period.  So a grid of 8 does not count for 16, but harmonics of a
    grid of 16 may count for 8.  Blocks whose steps change sign from place to place, as in JPEG, make no peaks.

    ``P`` is measured as follows:

    - on the locally normalised luma (``fidelity.normalised``), so that strong edges do not outweigh smooth areas;
    - in half overlapping blocks of 256 pixels a side if two of them fit next to each other, otherwise of 128 or 64, with a
      periodic Hann window (Harris 1978): no leakage from borders, and a wave that fits the block stays within one frequency
      step;
    - as the geometric mean over the blocks (Welch 1967, with logarithms), so that a fence in one place has little weight;
    - with the variance of rounding to whole levels added, so that grids below the resolution of 8 bits do not count.

    The power around a frequency is the mean at distances of 2 to 4 steps, at most half way to the next multiple; for
    frequencies on an axis only along that axis, where upright edges of the image add power.  Compare images of the same
    size: larger blocks detect fainter grids, and few blocks give more scatter.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, at least 64x64.
        period: 8 or 16 pixels.

    Raises:
        InputError: for another period or a smaller image.
    """
    if period not in PERIODS:
        raise InputError(f"grid period {period}: expected one of {', '.join(map(str, PERIODS))} pixels")
    _check_side(image)
    side = next((side for side in _BLOCKS if 2 * side <= min(image.shape[2:])), LEAST_SIDE)
    strips = [strip.add(_ROUNDING).log().mean(2) for strip in _block_powers(normalised(luma(image))[:, 0], side)]
    power = torch.stack(strips).mean(0).exp()
    step = side // period
    away = range(-min(_NEIGHBOURHOOD, step // 2), min(_NEIGHBOURHOOD, step // 2) + 1)
    along = [d for d in away if abs(d) > 1]
    spots = torch.arange(0, side, step, dtype=torch.int64, device=image.device)
    ratio = _peaks(power, spots[:, None], spots, [(dy, dx) for dy in away for dx in away if max(abs(dy), abs(dx)) > 1])
    ratio[:, :, 0] = _peaks(power, spots, spots[:1], [(d, 0) for d in along])
    ratio[:, 0, :] = _peaks(power, spots[:1], spots, [(0, d) for d in along])
    odd = torch.arange(period, dtype=torch.int64, device=image.device) % 2 == 1
    lines = torch.cat((ratio[:, odd, 0], ratio[:, 0, odd]), 1).mean(1)
    return torch.maximum(lines, ratio[:, odd[:, None] | odd].mean(1))


def sharpness(image: Tensor) -> Tensor:
    """Power of fine detail relative to coarse detail in dB, ``(B,)``: ``10 log10(P(1/8..3/8) / P(1/32..1/8))``.

    The bands are radial frequencies of the luma in cycles per pixel.  An input enlarged four times has nothing above 1/8, so
    the value rises with everything that a restorer adds; frequencies above 3/8 are ignored as noise.  Power is summed over
    the image (Welch 1967: half overlapping blocks of 64x64 with a Hann window), so that edges count more than noise in smooth
    areas.  It does not depend on brightness and contrast, but on the scene: compare it with that of the original.  A higher
    value than the original's means noise or too much sharpening, not quality.  NaN for a uniform image.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, at least 64x64.

    Raises:
        InputError: for a smaller image.
    """
    _check_side(image)
    power = torch.stack([strip.mean(2) for strip in _block_powers(luma(image)[:, 0], LEAST_SIDE)]).mean(0)
    frequencies = torch.fft.fftfreq(LEAST_SIDE, dtype=power.dtype, device=power.device)
    radius = torch.hypot(frequencies[:, None], frequencies)
    coarse, fine = (power[:, (radius >= low) & (radius < high)].sum(1) for low, high in (_COARSE, _FINE))
    return torch.where(coarse > _ROUNDING, 10 * torch.log10(fine / coarse), torch.nan)


def _block_powers(values: Tensor, side: int) -> Iterator[Tensor]:
    """Power spectra of the blocks of ``(B, H, W)``, row of blocks by row: ``(B, side, blocks, side)``; white noise of variance
    1 has power 1."""
    row = torch.hann_window(side, periodic=True, dtype=values.dtype, device=values.device)
    window = torch.outer(row, row)[:, None] / row.square().sum()
    for top in range(0, values.shape[1] - side + 1, side // 2):
        blocks = values[:, top : top + side].unfold(2, side, side // 2)
        yield torch.fft.fft2(blocks * window, dim=(1, 3)).abs().square()


def _peaks(power: Tensor, down: Tensor, across: Tensor, around: list[tuple[int, int]]) -> Tensor:
    """``power`` ``(B, side, side)`` at the given indices, divided by its mean at the offsets ``around`` (periodic)."""
    side = power.shape[1]
    beside = torch.stack([power[:, (down + dy) % side, (across + dx) % side] for dy, dx in around]).mean(0)
    return power[:, down, across] / beside


def _check_side(image: Tensor) -> None:
    height, width = image.shape[2:]
    if min(height, width) < LEAST_SIDE:
        raise InputError(
            f"an image of {width}x{height} pixels is too small for its spectrum: expected at least {LEAST_SIDE}x{LEAST_SIDE}"
        )
