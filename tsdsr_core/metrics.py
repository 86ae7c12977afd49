"""Metrics against a reference, on the luma of BT.601 in studio range (16..235): as super-resolution papers report, and ours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (65.481, 128.553, 24.966)
_BLACK = 16.0
_PEAK = 255.0
SSIM_WINDOW = 11
"""Side of the SSIM window and least side of a picture, in pixels."""


def luma(image: Tensor) -> Tensor:
    """``Y = 16 + 65.481 R + 128.553 G + 24.966 B`` of ``(B, 3, H, W)`` in 0..1, as float64 ``(B, 1, H, W)``."""
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=image.device)[:, None, None]
    return _BLACK + (image.double() * weights).sum(1, keepdim=True)


def psnr_y(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the luma in dB, one per image; infinite for equal images.

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape.
    """
    _check_shapes(image, reference)
    error = (luma(image) - luma(reference)).square().mean((1, 2, 3))
    return 10 * torch.log10(_PEAK**2 / error)


def ssim_y(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of the luma, one per image (Wang et al. 2004: 11x11 Gaussian of sigma 1.5, no borders).

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 11x11.
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
    """How far the local contrasts of a picture are from those of its reference, in nats, ``(B,)``; 0 for equal ones.

    The Kullback-Leibler distance from the distribution of the normalised luma of ``image`` to that of ``reference``, as
    histograms of 80 bins over -4..4 in which each bin counts one more than it has.  In natural pictures that distribution
    has one typical shape, which blur narrows and noise, rings and halos widen (Mittal et al. 2012, "No-reference image
    quality assessment in the spatial domain"; 2013, "Making a completely blind image quality analyzer").  Places do not
    matter, so invented texture costs nothing where it is as strong as the real one; blur and noise together can cancel out.

    Args:
        image, reference: ``(B, 3, H, W)`` in 0..1, of equal shape, at least 4x4.
    """
    _check_shapes(image, reference)
    p, q = (_histogram(normalised(luma(values))) for values in (image, reference))
    return (p * (p / q).log()).sum(1)


def normalised(values: Tensor) -> Tensor:
    """Luma ``(B, 1, H, W)`` in levels as local contrasts of about -4..4: ``(Y - mean) / (deviation + 1)``.

    Mean and deviation are local, under a 7x7 Gaussian of sigma 7/6 with reflected borders (the MSCN coefficients of Mittal
    et al. 2012); the one level keeps rounding in flat areas from looking like texture.
    """
    padded = F.pad(values, (3, 3, 3, 3), mode="reflect")
    mean, square = _smooth(padded, 7, 7 / 6), _smooth(padded**2, 7, 7 / 6)
    return (values - mean) / ((square - mean**2).clamp(min=0).sqrt() + 1)


def _histogram(values: Tensor) -> Tensor:
    """Shares of 80 bins over -4..4, ``(B, 80)``; what lies beyond counts for the outermost."""
    bins = ((values.flatten(1) + 4) * 10).long().clamp(0, 79)
    counts = torch.ones(len(bins), 80, dtype=values.dtype, device=values.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=values.dtype))
    return counts / counts.sum(1, keepdim=True)


def _smooth(values: Tensor, side: int, sigma: float) -> Tensor:
    """Gaussian mean of ``(B, 1, H, W)`` without borders; rows and columns apart, which saves memory on large pictures."""
    offsets = torch.arange(side, dtype=values.dtype, device=values.device) - side // 2
    row = torch.exp(-(offsets**2) / (2 * sigma**2))
    row = row / row.sum()
    return F.conv2d(F.conv2d(values, row[None, None, None]), row[None, None, :, None])


def _check_shapes(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"images of {tuple(image.shape)} and {tuple(reference.shape)} cannot be compared: sizes differ")


def mean(values: list[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
