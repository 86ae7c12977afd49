"""Transparency: replaces the colours of hidden pixels before restoration, and enlarges the alpha channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_size import Size
from .pipeline import bicubic

_TRUSTED = 1 / 16
"""Alpha from which a pixel's own colour is fully used; below it, most files store the colour with few digits."""


def spread_colours(rgb: Tensor, alpha: Tensor | None) -> Tensor:
    """Replace the colours of transparent pixels by those of visible pixels nearby.

    Encoders, interpolation and colour fixes mix neighbouring pixels, so that hidden black would become a dark fringe.  The
    colours are averaged over an image pyramid, weighted by alpha, and filled in from its coarser levels ("push and pull",
    Gortler et al., "The Lumigraph", SIGGRAPH 1996).

    Args:
        rgb: ``(B, 3, H, W)``, finite.
        alpha: ``(B, 1, H, W)`` in 0..1, or None for opaque images.

    Returns:
        Same shape as ``rgb``. Pixels with alpha of at least 1/16, and images without any visible pixel, are unchanged.

    >>> rgb = torch.tensor([[[[0.8, 0.0]]]]).expand(1, 3, 1, 2)
    >>> alpha = torch.tensor([[[[1.0, 0.0]]]])
    >>> spread_colours(rgb, alpha)[0, 0]
    tensor([[0.8000, 0.8000]])
    """
    if alpha is None:
        return rgb
    weight = (alpha / _TRUSTED).clamp(0, 1).square().to(rgb)
    if (weight == 1).all():
        return rgb
    visible = (weight > 0).flatten(1).any(1)[:, None, None, None]
    return torch.where((weight == 1) | ~visible, rgb, _fill(rgb, weight))


def _fill(colour: Tensor, weight: Tensor) -> Tensor:
    """``colour`` with ``weight`` in 0..1; the remaining share comes from the next coarser level of the pyramid."""
    if max(weight.shape[2:]) == 1:
        return colour
    total = 4 * _halve(weight)
    mean = 4 * _halve(weight * colour) / total.clamp_min(torch.finfo(total.dtype).tiny)
    coarse = _fill(mean, total.clamp(max=1))
    larger = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return weight * colour + (1 - weight) * larger[:, :, : weight.shape[2], : weight.shape[3]]


def _halve(image: Tensor) -> Tensor:
    """``image`` at half the size, rounded up, with the kernel [1 3 3 1] x [1 3 3 1] / 64 and zeros beyond the border."""
    row = torch.tensor([0.125, 0.375, 0.375, 0.125], dtype=image.dtype, device=image.device)
    kernel = torch.outer(row, row).expand(image.shape[1], 1, 4, 4)
    padded = F.pad(image, (1, 1 + image.shape[3] % 2, 1, 1 + image.shape[2] % 2))
    return F.conv2d(padded, kernel, stride=2, groups=image.shape[1])


def enlarge_alpha(alpha: Tensor, size: Size) -> Tensor:
    """Resize ``alpha`` ``(B, 1, H, W)`` in 0..1 to ``size`` (height, width), without halos along edges.

    Enlarging is bicubic, limited to the range of the neighbouring values, since overshoot would show as a halo.
    """
    if alpha.shape[2:] == size:
        return alpha
    if size[0] < alpha.shape[2] or size[1] < alpha.shape[3]:
        return F.interpolate(alpha, size, mode="bilinear", align_corners=False, antialias=True)
    larger = bicubic(alpha, size)
    lowest, highest = alpha, alpha
    for dim in (2, 3):
        places = torch.arange(size[dim - 2], dtype=torch.float32, device=alpha.device)
        centre = (places + 0.5) * (alpha.shape[dim] / size[dim - 2]) - 0.5
        nearest = [(centre.floor().long() + step).clamp(0, alpha.shape[dim] - 1) for step in (0, 1)]
        lowest = torch.minimum(*(lowest.index_select(dim, index) for index in nearest))
        highest = torch.maximum(*(highest.index_select(dim, index) for index in nearest))
    return torch.minimum(torch.maximum(larger, lowest), highest)
