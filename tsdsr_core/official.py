"""The published procedure, for comparison, where its pixels differ: floored sizes, rounding to 8 bits in between."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .colour import match_colour
from .errors import InputError
from .image_size import Size, SizePlan

_MULTIPLE = 8


def plan_published_size(size: Size, scale: float, multiple: int, process_size: int) -> SizePlan:
    """Sizes as the published script computes them: the working size is floored to multiples of 8.

    Args:
        size: (height, width) of the input.
        scale: a whole number.
        multiple: ignored.
        process_size: minimum of the shorter side at which the model runs.

    Raises:
        InputError: if the floored size is 0.
    """
    factor = int(scale)
    height, width = size
    least = process_size // factor
    if min(size) < least:
        enlarge = least / min(size)
        height, width = int(enlarge * height), int(enlarge * width)
    height, width = factor * height, factor * width
    work = (height - height % _MULTIPLE, width - width % _MULTIPLE)
    if not all(work):
        raise InputError(f"the official recipe rounds {width}x{height} pixels down to 0: use the default recipe")
    return SizePlan(target=(size[0] * factor, size[1] * factor), work=work, padded=work)


def enlarge(image: Tensor, size: Size) -> Tensor:
    """Bicubic resizing without antialiasing, also where the floored size is smaller than the input."""
    return F.interpolate(image, size, mode="bicubic", align_corners=False).clamp(0, 1)


def match_published(restored: Tensor, image: Tensor, target: Size, colour_fix: str, wavelet_levels: int) -> Tensor:
    """Resize to ``target`` and apply the colour fix, rounding to 8 bits; tensors ``(B, 3, H, W)`` in 0..1."""
    restored = _resized(restored, target)
    style = image if colour_fix == "adain" else _resized(image, target)
    return _floor_to_8_bit(match_colour(restored, style, colour_fix, wavelet_levels).clamp(0, 1))


def _floor_to_8_bit(image: Tensor) -> Tensor:
    return (image * 255).floor() / 255


def _resized(image: Tensor, size: Size) -> Tensor:
    """Pillow's bicubic resize of each image in 8 bits; images that have the size already are only rounded down to 8 bits."""
    if image.shape[2:] == size:
        return _floor_to_8_bit(image)
    results = []
    for array in (image * 255).byte().permute(0, 2, 3, 1).cpu().numpy():
        resized = Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        results.append(torch.from_numpy(np.array(resized)))
    return torch.stack(results).permute(0, 3, 1, 2).to(image) / 255
