"""The published procedure where it differs in pixels, for comparisons: floored sizes, 8-bit pictures in between."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .colour import match_colour
from .geometry import Size, SizePlan

_MULTIPLE = 8


def plan_size(size: Size, scale: float, multiple: int, process_size: int) -> SizePlan:
    """Sizes as the published script computes them: work sizes are floored to multiples of 8, ``multiple`` is ignored.

    Args:
        scale: a whole number.

    Raises:
        ValueError: where the floored size is 0.
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
        raise ValueError(f"the official recipe floors {width}x{height} pixels to nothing: use the default recipe")
    return SizePlan(target=(size[0] * factor, size[1] * factor), work=work, padded=work)


def enlarge(image: Tensor, size: Size) -> Tensor:
    """Bicubic without anti-aliasing, also where floored sizes are below those of the input."""
    return F.interpolate(image, size, mode="bicubic", align_corners=False).clamp(0, 1)


def finish(restored: Tensor, image: Tensor, target: Size, colour_fix: str, wavelet_levels: int) -> Tensor:
    """Resize and colour fix on 8-bit pictures; tensors ``(B, 3, H, W)`` in 0..1 in and out."""
    restored = _resized(restored, target)
    style = image if colour_fix == "adain" else _resized(image, target)
    return _floor_to_8_bit(match_colour(restored, style, colour_fix, wavelet_levels).clamp(0, 1))


def _floor_to_8_bit(image: Tensor) -> Tensor:
    return (image * 255).floor() / 255


def _resized(image: Tensor, size: Size) -> Tensor:
    """Pillow's bicubic resize of each 8-bit picture; pictures of the right size only lose their fractions."""
    if image.shape[2:] == size:
        return _floor_to_8_bit(image)
    pictures = []
    for picture in (image * 255).byte().permute(0, 2, 3, 1).cpu().numpy():
        resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        pictures.append(torch.from_numpy(np.array(resized)))
    return torch.stack(pictures).permute(0, 3, 1, 2).to(image) / 255
