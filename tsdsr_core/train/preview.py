"""What an autoencoder's latents are like: their mean and spread, and a linear map to colours for previews."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from . import synthetic

PICTURES, SIDE = 16, 256
Encode = Callable[[Tensor], Tensor]
"""Pixels ``(B, 3, H, W)`` in -1..1 to unscaled latents ``(B, C, h, w)``."""


def measure(encode: Encode) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(C,)`` of each channel, on synthetic pictures."""
    latents = encode(_pictures()).float()
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def fit_preview(encode: Encode) -> list[list[float]]:
    """Least-squares map from latents to colours, on synthetic pictures.

    Returns:
        ``C + 1`` rows of red, green and blue in -1..1: one for each latent channel, and what is added.
    """
    pixels = _pictures()
    latents = encode(pixels).float()
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, (latents.shape[2], latents.shape[3]))
    points = latents.movedim(1, -1).flatten(0, 2)
    points = torch.cat((points, torch.ones(len(points), 1)), 1)
    rows = torch.linalg.lstsq(points, colours.movedim(1, -1).flatten(0, 2)).solution
    return [[round(value, 4) for value in row] for row in rows.tolist()]


def _pictures() -> Tensor:
    generator = Generator().manual_seed(0)
    return torch.stack([synthetic.picture(SIDE, generator).float() / 255 for _ in range(PICTURES)]) * 2 - 1
