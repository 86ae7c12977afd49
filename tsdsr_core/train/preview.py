"""How a latent looks: a linear map to colours, for previews while a picture is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from . import synthetic

PICTURES, SIDE = 16, 256


def fit_preview(encode: Callable[[Tensor], Tensor]) -> list[list[float]]:
    """Least-squares map from latents to colours, on synthetic pictures.

    Args:
        encode: pixels ``(B, 3, H, W)`` in -1..1 to unscaled latents ``(B, C, h, w)``.

    Returns:
        ``C + 1`` rows of red, green and blue in -1..1: one for each latent channel, and what is added.
    """
    generator = Generator().manual_seed(0)
    pixels = torch.stack([synthetic.picture(SIDE, generator).float() / 255 for _ in range(PICTURES)]) * 2 - 1
    latents = encode(pixels).float()
    colours = torch.nn.functional.adaptive_avg_pool2d(pixels, (latents.shape[2], latents.shape[3]))
    points = latents.movedim(1, -1).flatten(0, 2)
    points = torch.cat((points, torch.ones(len(points), 1)), 1)
    rows = torch.linalg.lstsq(points, colours.movedim(1, -1).flatten(0, 2)).solution
    return [[round(value, 4) for value in row] for row in rows.tolist()]
