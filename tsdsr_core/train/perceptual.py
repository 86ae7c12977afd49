"""Perceptual distance of pictures: LPIPS where its weights are at hand, else a term that needs no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches ``(B, 3, H, W)`` in 0..1 to their mean distance."""
SCALES = 4
_EPSILON = 1e-3


def gradients(image: Tensor, reference: Tensor) -> Tensor:
    """Mean difference of gradients over a pyramid, ``sum_s |grad(x_s) - grad(y_s)|``; cf. Mathieu et al. 2016, eq. 6.

    Flat errors cost nothing and edges count as much as they rise, at each scale; Charbonnier's smooth absolute value.

    Args:
        image, reference: ``(B, 3, H, W)``, at least 8 pixels a side.
    """
    total = image.new_zeros((), dtype=torch.float32)
    difference = (image - reference).float()  # gradients and means are linear
    for scale in range(SCALES):
        for axis in (2, 3):
            total = total + (difference.diff(dim=axis).square() + _EPSILON**2).sqrt().mean() - _EPSILON
        if scale < SCALES - 1:
            difference = F.avg_pool2d(difference, 2)
    return total / (2 * SCALES)


def check_distance(name: str) -> None:
    """Raise ``ValueError`` where the distance called ``name`` cannot be had, before models are loaded for it."""
    if name == "lpips" and importlib.util.find_spec("pyiqa") is None:
        raise ValueError("perceptual = 'lpips' needs pyiqa: pip install -e '.[metrics]', or set perceptual = 'gradients'")


def lpips(device: torch.device) -> Distance:
    """LPIPS (Zhang et al. 2018) with VGG features, through pyiqa, which fetches its weights where they are not there yet."""
    check_distance("lpips")
    import pyiqa  # type: ignore[import-not-found]

    metric = pyiqa.create_metric("lpips-vgg", device=device, as_loss=True)
    return lambda image, reference: metric(image.clamp(0, 1), reference).mean()


def distance(name: str, device: torch.device) -> Distance:
    """The distance called "gradients" or "lpips"."""
    return gradients if name == "gradients" else lpips(device)
