"""Full-reference metrics: PSNR and SSIM as super-resolution papers report them (BT.601 luma, 16..235), and our own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

_LUMA = (65.481, 128.553, 24.966)
_BLACK = 16.0
_GREY = (0.298936, 0.587043, 0.114021)
"""BT.601's 0.299, 0.587 and 0.114 as in MATLAB, for the same NIQE as its authors' program."""
_PEAK = 255.0
SSIM_WINDOW = 11
"""Side of the SSIM window, and minimum side of an image, in pixels."""
_GRAIN_SIGMA, _FINE_SIGMA = 1.5, 6.0
"""Sigmas in pixels of the Gaussian that smooths the reference's grain, and of the one that is subtracted to get fine detail."""
_FLAT_WINDOW = 9
_FLAT_DEVIATION = 4.0
"""Standard deviation below which an area is flat, in levels of 0..255."""
_MIN_FLAT = 0.01
"""Minimum share of flat pixels in an image."""


def luma(image: Tensor) -> Tensor:
    """``Y = 16 + 65.481 R + 128.553 G + 24.966 B`` of ``(B, 3, H, W)`` in 0..1, as float64 ``(B, 1, H, W)`` in 16..235."""
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=image.device)[:, None, None]
    return _BLACK + (image.double() * weights).sum(1, keepdim=True)


def grey(image: Tensor) -> Tensor:
    """``255 (0.299 R + 0.587 G + 0.114 B)`` of ``(B, 3, H, W)`` in 0..1, as float64 ``(B, 1, H, W)`` in 0..255."""
    weights = torch.tensor(_GREY, dtype=torch.float64, device=image.device)[:, None, None]
    return 255 * (image.double() * weights).sum(1, keepdim=True)


def psnr_y(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the luma in dB, ``(B,)``; infinite for equal images.

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape.

    Raises:
        InputError: for different shapes.

    >>> grey = torch.full((1, 3, 16, 16), 0.5)
    >>> psnr_y(grey, grey + 0.1)
    tensor([21.3219], dtype=torch.float64)
    """
    _check_shapes(image, reference)
    error = (luma(image) - luma(reference)).square().mean((1, 2, 3))
    return 10 * torch.log10(_PEAK**2 / error)


def ssim_y(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of the luma, ``(B,)`` (Wang et al. 2004: 11x11 Gaussian of sigma 1.5, without borders).

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 11x11.

    Raises:
        InputError: for different shapes.
    """
    _check_shapes(image, reference)
    x, y = luma(image), luma(reference)
    mean_x, mean_y, xx, yy, xy = (_smooth(values, SSIM_WINDOW, 1.5) for values in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x**2 + yy - mean_y**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.mean((1, 2, 3))


def naturalness(image: Tensor, reference: Tensor) -> Tensor:
    """Difference between the distributions of local contrast in an image and its reference, in nats, ``(B,)``; 0 if equal.

    It is the Kullback-Leibler divergence of the normalised luma of ``image`` from that of ``reference``, from histograms of
    80 bins over -4..4 with one count added to each bin.  Natural images share a typical distribution, which blur makes
    narrower and noise, ringing and halos wider (Mittal et al. 2012, "No-reference image quality assessment in the spatial
    domain"; 2013, "Making a completely blind image quality analyzer").  Positions do not matter: invented texture costs
    nothing if it is as strong as the real one, and blur can cancel out noise.

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 4x4.

    Raises:
        InputError: for different shapes.
    """
    _check_shapes(image, reference)
    p, q = (_histogram(normalised(luma(values))) for values in (image, reference))
    return (p * (p / q).log()).sum(1)


def normalised(values: Tensor, borders: str = "reflect") -> Tensor:
    """Local contrast of luma ``(B, 1, H, W)`` in levels: ``(Y - mean) / (deviation + 1)``, about -4..4.

    Mean and standard deviation are local, over a 7x7 Gaussian of sigma 7/6 (the MSCN coefficients of Mittal et al. 2012).
    Adding one level prevents that rounding in flat areas looks like texture.

    Args:
        borders: padding mode of ``F.pad``.
    """
    mean, deviation = local_statistics(values, borders)
    return (values - mean) / (deviation + 1)


def local_statistics(values: Tensor, borders: str = "reflect") -> tuple[Tensor, Tensor]:
    """Local mean and standard deviation of ``(B, 1, H, W)``, same shape, over a 7x7 Gaussian of sigma 7/6.

    Args:
        borders: padding mode of ``F.pad``.
    """
    padded = F.pad(values, (3, 3, 3, 3), mode=borders)
    mean, square = _smooth(padded, 7, 7 / 6), _smooth(padded**2, 7, 7 / 6)
    return mean, (square - mean**2).clamp(min=0).sqrt()


def flat_noise(image: Tensor, reference: Tensor) -> Tensor:
    """Noise in areas where the reference is flat, in levels of 0..255, ``(B,)``: grain, or invented worm-like texture.

    With the luma ``Y`` in 0..255 (``grey``) and Gaussian filters ``G_s`` of sigma ``s`` pixels, borders reflected:

    - A pixel is flat if the standard deviation of ``G_1.5 * Y_reference`` in the 9x9 window around it is below 4.  This
      includes areas whose fine texture or grain is removed by the filter.
    - Fine detail is ``Y_image - G_6 * Y_image``: all of waves up to 17 pixels long, half of those of 32, because grain that was
      enlarged four times with its image is four times as coarse.
    - The result is the RMS of the fine detail over all flat pixels.

    Compare it with ``flat_noise(reference, reference)``: a result far below is too smooth, one above is noisy.  NaN if less
    than 1 % of the image is flat.

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 25x25.

    Raises:
        InputError: for different shapes.
    """
    _check_shapes(image, reference)
    values, flat = grey(image), flat_areas(reference)
    counts = flat.sum((1, 2, 3))
    power = ((values - blurred(values, _FINE_SIGMA)).square() * flat).sum((1, 2, 3)) / counts
    return torch.where(counts >= _MIN_FLAT * flat[0].numel(), power.sqrt(), torch.nan)


def flat_areas(reference: Tensor) -> Tensor:
    """Where an image ``(B, 3, H, W)`` in 0..1 is flat, as ``flat_noise`` defines it: booleans ``(B, 1, H, W)``."""
    padded = F.pad(blurred(grey(reference), _GRAIN_SIGMA), (_FLAT_WINDOW // 2,) * 4, mode="reflect")
    mean, square = (F.avg_pool2d(x, _FLAT_WINDOW, stride=1) for x in (padded, padded**2))
    return (square - mean**2).clamp(min=0).sqrt() < _FLAT_DEVIATION


def blurred(values: Tensor, sigma: float) -> Tensor:
    """``(B, 1, H, W)`` filtered by a Gaussian with a radius of four sigma; borders are reflected."""
    radius = round(4 * sigma)
    return _smooth(F.pad(values, (radius,) * 4, mode="reflect"), 2 * radius + 1, sigma)


def _histogram(values: Tensor) -> Tensor:
    """Histogram of 80 bins over -4..4, ``(B, 80)``, with sum 1; values outside count for the outermost bins."""
    bins = ((values.flatten(1) + 4) * 10).long().clamp(0, 79)
    counts = torch.ones(len(bins), 80, dtype=values.dtype, device=values.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=values.dtype))
    return counts / counts.sum(1, keepdim=True)


def _smooth(values: Tensor, side: int, sigma: float) -> Tensor:
    """Filter ``(B, 1, H, W)`` with a ``side`` x ``side`` Gaussian, without padding; rows and columns separately."""
    offsets = torch.arange(side, dtype=values.dtype, device=values.device) - side // 2
    row = torch.exp(-(offsets**2) / (2 * sigma**2))
    row = row / row.sum()
    return F.conv2d(F.conv2d(values, row[None, None, None]), row[None, None, :, None])


def _check_shapes(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape:
        raise InputError(f"images of {tuple(image.shape)} and {tuple(reference.shape)} cannot be compared: sizes differ")


def mean(values: list[float]) -> float:
    """Arithmetic mean; NaN for an empty list."""
    return sum(values) / len(values) if values else math.nan
