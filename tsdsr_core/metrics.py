"""Full-reference metrics as super-resolution papers report them, on the luma of BT.601 in studio range (16..235)."""

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
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    row = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(row, row) / row.sum() ** 2
    mean_x, mean_y, xx, yy, xy = F.conv2d(torch.cat((x, y, x * x, y * y, x * y)), window[None, None]).chunk(5)
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x**2 + yy - mean_y**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.mean((1, 2, 3))


def _check_shapes(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"images of {tuple(image.shape)} and {tuple(reference.shape)} cannot be compared: sizes differ")


def mean(values: list[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
