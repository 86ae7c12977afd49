"""What the spectrum of a picture says of it without a reference: periodic grids, and sharpness."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .metrics import luma, normalised

PERIODS = (8, 16)
"""Periods in pixels of the grids that are measured: those of the autoencoder's cells and of the transformer's tokens."""
LEAST_SIDE = 64
"""Least side in pixels of a picture whose spectrum is measured."""
_BLOCKS = (256, 128, LEAST_SIDE)
_REACH = 4
_ROUNDING = 1 / 12
"""Variance of rounding to whole levels, in squared levels."""
_COARSE, _FINE = (1 / 32, 1 / 8), (1 / 8, 3 / 8)
"""Bands of ``sharpness`` in cycles per pixel."""


def grid_peaks(image: Tensor, period: int) -> Tensor:
    """Strength of a grid that repeats every ``period`` pixels, ``(B,)``: 1 means none, 2 peaks of twice the power around.

    Such a grid has its power at the frequencies ``(i, j) / period`` cycles per pixel, where a photograph has no more than
    beside them.  The figure is the mean of ``P(i, j) / P(around it)`` over the ``(i, j)`` on the axes, which grids of lines
    fill, or over all of them, which patterns of cells fill, whichever is larger.  One of ``i`` and ``j`` is odd: the others
    belong to a grid of half the period as well.  So a grid of 8 leaves the figure of 16 alone, and overtones of a grid of 16
    may count for 8.  Blocks whose steps change sign from place to place, as JPEG's do, leave no peaks and count little.

    How ``P`` is measured:

    - of the locally normalised luma (``metrics.normalised``): the edges, far stronger than a faint grid, weigh no more than
      smooth areas;
    - in half overlapping blocks of 256 pixels a side where two fit beside each other, else of 128 or 64, under a periodic
      Hann window (Harris 1978): borders do not leak, and a wave that fits the block stays, exactly, within one step of its
      frequency;
    - as the geometric mean over the blocks (Welch 1967, but in logarithms): a fence in one place weighs little;
    - with the variance of rounding to whole levels added: what 8 bits cannot hold is no grid.

    "Around" is the mean at offsets of 2 to 4 steps, at most half way to the next multiple; on the axes, which every upright
    edge feeds, at those along the axis.  Compare pictures of equal size: larger blocks see fainter grids, and the figures of
    few blocks scatter more.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, at least 64x64.
        period: 8 or 16 pixels.

    Raises:
        ValueError: for another period or a smaller picture.
    """
    if period not in PERIODS:
        raise ValueError(f"grid period {period}: expected one of {', '.join(map(str, PERIODS))} pixels")
    _check_side(image)
    side = next((side for side in _BLOCKS if 2 * side <= min(image.shape[2:])), LEAST_SIDE)
    strips = [strip.add(_ROUNDING).log().mean(2) for strip in _block_powers(normalised(luma(image))[:, 0], side)]
    power = torch.stack(strips).mean(0).exp()
    step = side // period
    away = range(-min(_REACH, step // 2), min(_REACH, step // 2) + 1)
    along = [d for d in away if abs(d) > 1]
    spots = torch.arange(0, side, step, device=image.device)
    ratio = _peaks(power, spots[:, None], spots, [(dy, dx) for dy in away for dx in away if max(abs(dy), abs(dx)) > 1])
    ratio[:, :, 0] = _peaks(power, spots, spots[:1], [(d, 0) for d in along])
    ratio[:, 0, :] = _peaks(power, spots[:1], spots, [(0, d) for d in along])
    odd = torch.arange(period, device=image.device) % 2 == 1
    lines = torch.cat((ratio[:, odd, 0], ratio[:, 0, odd]), 1).mean(1)
    return torch.maximum(lines, ratio[:, odd[:, None] | odd].mean(1))


def sharpness(image: Tensor) -> Tensor:
    """Fine detail of the luma over coarse detail in dB, ``(B,)``: ``10 log10(P(1/8..3/8) / P(1/32..1/8))``.

    The bands are of radial frequency in cycles per pixel.  Above 1/8 is what an input enlarged four times cannot hold, so
    it rises with all that a restorer adds; the corners above 3/8 are left to noise.  Power is added up over the picture
    (Welch 1967: half overlapping blocks of 64x64 under a Hann window), so that edges count for more than the noise of smooth
    areas.  Neither brightness nor contrast matters.  The scene does: compare it with the original's, and take a larger
    figure than the original's for noise or too much sharpening, not for quality.  A blank has none: NaN.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, at least 64x64.

    Raises:
        ValueError: for a smaller picture.
    """
    _check_side(image)
    power = torch.stack([strip.mean(2) for strip in _block_powers(luma(image)[:, 0], LEAST_SIDE)]).mean(0)
    frequencies = torch.fft.fftfreq(LEAST_SIDE, dtype=power.dtype, device=power.device)
    radius = torch.hypot(frequencies[:, None], frequencies)
    coarse, fine = (power[:, (radius >= low) & (radius < high)].sum(1) for low, high in (_COARSE, _FINE))
    return torch.where(coarse > _ROUNDING, 10 * torch.log10(fine / coarse), torch.nan)


def _block_powers(values: Tensor, side: int) -> Iterator[Tensor]:
    """Power spectra of the blocks of ``(B, H, W)``, by strip: ``(B, side, blocks, side)``; 1 for noise of variance 1."""
    row = torch.hann_window(side, periodic=True, dtype=values.dtype, device=values.device)
    window = torch.outer(row, row)[:, None] / row.square().sum()
    for top in range(0, values.shape[1] - side + 1, side // 2):
        blocks = values[:, top : top + side].unfold(2, side, side // 2)
        yield torch.fft.fft2(blocks * window, dim=(1, 3)).abs().square()


def _peaks(power: Tensor, down: Tensor, across: Tensor, around: list[tuple[int, int]]) -> Tensor:
    """``power`` ``(B, side, side)`` at the indices over its mean at the offsets ``around``, which wrap as frequencies do."""
    side = power.shape[1]
    beside = torch.stack([power[:, (down + dy) % side, (across + dx) % side] for dy, dx in around]).mean(0)
    return power[:, down, across] / beside


def _check_side(image: Tensor) -> None:
    height, width = image.shape[2:]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"{width}x{height} pixels are too few for a spectrum: expected at least {LEAST_SIDE}x{LEAST_SIDE}")
