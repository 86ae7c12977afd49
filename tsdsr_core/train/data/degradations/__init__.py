"""Degradation of good images to low-quality inputs, as Real-ESRGAN does it and as found in real photographs.

All random numbers come from the given generator, and how many are drawn never depends on pixel values, so a seed gives the
same image on every machine, up to rounding.
"""

from __future__ import annotations

from torch import Generator, Tensor

from .real_esrgan import PRESETS, degrade_in_stages
from .real_photographs import KINDS

PRESET_NAMES = (*PRESETS, *KINDS)
"""Names of all presets: those that follow Real-ESRGAN, then the faults of real photographs."""


def degrade(image: Tensor, scale: int, preset: str, generator: Generator) -> Tensor:
    """Make a low-resolution, degraded version of ``image``, as a camera and a few websites would.

    Args:
        image: ``(3, H, W)`` in 0..1 on the CPU, H and W multiples of ``scale``.
        scale: reduction factor of the size.
        preset: a name in ``PRESET_NAMES``.
        generator: CPU generator; the only source of randomness.

    Returns:
        ``(3, H / scale, W / scale)`` in 0..1, rounded to 8 bits.

    >>> import torch
    >>> photo = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    >>> degrade(photo, 4, "medium", torch.Generator().manual_seed(1)).shape
    torch.Size([3, 16, 24])
    """
    size = image.shape[1] // scale, image.shape[2] // scale
    if preset in KINDS:
        return (KINDS[preset](image, size, generator).clamp(0, 1) * 255).round() / 255
    return degrade_in_stages(image, size, PRESETS[preset], generator)
