"""Statistics of an autoencoder's latents, and a linear map from latents to colours for previews."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..data import synthetic

IMAGES, SIDE = 16, 256
Encode = Callable[[Tensor], Tensor]
"""Maps pixels ``(B, 3, H, W)`` in -1..1 to unscaled latents ``(B, C, h, w)``."""


def latent_statistics(encode: Encode) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(C,)`` of each latent channel, over synthetic images."""
    latents = encode(_images()).float()
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def fit_preview(encode: Encode) -> list[list[float]]:
    """Least-squares map from latents to colours, fitted on synthetic images.

    Returns:
        ``C + 1`` rows of red, green and blue for colours in -1..1: a row for each latent channel, and the bias.
    """
    pixels = _images()
    latents = encode(pixels).float()
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, (latents.shape[2], latents.shape[3]))
    points = latents.movedim(1, -1).flatten(0, 2)
    points = torch.cat((points, torch.ones(len(points), 1)), 1)
    rows = torch.linalg.lstsq(points, colours.movedim(1, -1).flatten(0, 2)).solution
    return [[round(value, 4) for value in row] for row in rows.tolist()]


def _images() -> Tensor:
    generator = Generator().manual_seed(0)
    return torch.stack([synthetic.draw_image(SIDE, generator).float() / 255 for _ in range(IMAGES)]) * 2 - 1
