"""Building blocks of degradations: random numbers, filters, resizing and JPEG, for images ``(3, H, W)`` in 0..1 on the CPU."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor


def uniform(bounds: tuple[float, float], generator: Generator) -> float:
    """A uniform random number between ``bounds``."""
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))


def chance(probability: float, generator: Generator) -> bool:
    """True with ``probability``."""
    return float(torch.rand((), generator=generator)) < probability


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Filter each channel with ``kernel`` ``(k, k)``, k odd; borders are reflected, or repeated if the image is too small."""
    halo = kernel.shape[0] // 2
    mode = "reflect" if halo < min(image.shape[1:]) else "replicate"
    padded = F.pad(image[:, None], (halo,) * 4, mode=mode)
    return F.conv2d(padded, kernel[None, None])[:, 0].clamp(0, 1)


def random_mode(generator: Generator) -> str:
    """A random interpolation mode: "area", "bilinear" or "bicubic"."""
    return ("area", "bilinear", "bicubic")[int(torch.randint(3, (1,), generator=generator))]


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize to ``size`` (height, width); "bilinear" and "bicubic" are antialiased."""
    if tuple(image.shape[1:]) == size:
        return image
    if mode == "area":
        return F.interpolate(image[None], size, mode="area")[0]
    return F.interpolate(image[None], size, mode=mode, align_corners=False, antialias=True)[0].clamp(0, 1)


def compress_jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress ``image`` as JPEG (4:2:0) at ``quality`` in 1..100, and decode it."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
