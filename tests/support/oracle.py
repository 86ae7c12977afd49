"""The published inference procedure, written down a second time from its description, on diffusers and PEFT alone.

Adapters stay unmerged, tiles run one by one, pictures pass through Pillow: nothing of ``tsdsr_core`` is used.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .tiny import Published


def encode(models: Published, pixels: Tensor) -> Tensor:
    return models.vae.encode(pixels).latent_dist.mode() * 1.5305


def transformer(models: Published, z: Tensor) -> Tensor:
    return models.transformer(
        hidden_states=z,
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=models.tokens,
        pooled_projections=models.pooled,
        return_dict=False,
    )[0]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Fixed stride; the last tile is pushed back to end at the border."""
    count, end = 0, 0
    while end < length:
        end = count * (tile - overlap) + tile
        count += 1
    return [min(i * (tile - overlap), length - tile) for i in range(count)]


def tiled(models: Published, z: Tensor, tile: int = 64, overlap: int = 8) -> Tensor:
    height, width = z.shape[2:]
    if height * width <= tile * tile:
        return transformer(models, z)
    tile = min(tile, height, width)
    gauss = lambda i, mid: math.exp(-((i - mid) ** 2) / tile**2 / 0.02) / math.sqrt(2 * math.pi * 0.01)  # noqa: E731
    rows = [gauss(i, tile / 2) for i in range(tile)]
    columns = [gauss(i, (tile - 1) / 2) for i in range(tile)]
    window = torch.tensor(np.outer(rows, columns))
    total, weight = torch.zeros_like(z), torch.zeros_like(z)
    for left in tile_starts(width, tile, overlap):
        for top in tile_starts(height, tile, overlap):
            area = (..., slice(top, top + tile), slice(left, left + tile))
            total[area] += transformer(models, z[area]) * window
            weight[area] += window
    return total / weight


@torch.no_grad()
def restore_float(models: Published, low: Tensor, size: tuple[int, int]) -> Tensor:
    """Float pixels ``(1, 3, *size)`` in 0..1 before any colour fix."""
    enlarged = F.interpolate(low, size, mode="bicubic", align_corners=False)
    z = encode(models, (enlarged * 2 - 1).clamp(-1, 1))
    z = z - tiled(models, z)
    return models.vae.decode(z / 1.5305).sample.clamp(-1, 1) / 2 + 0.5


def work_size(width: int, height: int, scale: int) -> tuple[int, int]:
    """(height, width) in which the published script runs its model."""
    if width < 512 // scale or height < 512 // scale:
        factor = (512 // scale) / min(width, height)
        width, height = int(factor * width), int(factor * height)
    width, height = width * scale, height * scale
    return height - height % 8, width - width % 8


def restore_picture(models: Published, low: Tensor, scale: int, fix: str) -> np.ndarray:
    """The 8-bit picture ``(H, W, 3)`` that the published script would save."""
    source = Image.fromarray((low[0] * 255).round().byte().permute(1, 2, 0).numpy())
    width, height = source.size
    work = work_size(width, height, scale)
    target = (width * scale, height * scale)
    picture = to_picture(restore_float(models, low, work))
    if picture.size != target:
        picture = picture.resize(target)
    if fix == "adain":
        picture = to_picture(adain(to_tensor(picture), to_tensor(source)))
    elif fix == "wavelet":
        picture = to_picture(wavelet(to_tensor(picture), to_tensor(source.resize(target))))
    return np.array(picture)


def to_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def adain(content: Tensor, style: Tensor) -> Tensor:
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(1, 3, -1)
        return flat.mean(2)[..., None, None], (flat.var(2) + 1e-5).sqrt()[..., None, None]

    (content_mean, content_std), (style_mean, style_std) = moments(content), moments(style)
    return (content - content_mean) / content_std * style_std + style_mean


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """Detail bands of ``content`` summed one by one, and the last low band of ``style``."""

    def blur(x: Tensor, radius: int) -> Tensor:
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3) / 16
        return F.conv2d(F.pad(x, (radius,) * 4, mode="replicate"), kernel, groups=3, dilation=radius)

    details = torch.zeros_like(content)
    for level in range(5):
        low = blur(content, 2**level)
        details, content = details + content - low, low
        style = blur(style, 2**level)
    return details + style
