"""Second-order degradation of Real-ESRGAN (Wang et al. 2021, sec. 3): HR image -> LR image.

Everything random comes from the generator handed in, and how much is drawn never hangs on pixel values, so a seed gives
the same picture, up to rounding, on every machine.  Images are float tensors ``(3, H, W)`` in 0..1 on the CPU.

The preset "realesrgan" has the numbers of the published option file.  What is done with them departs from the published
program, so that its models and those trained here have not seen quite the same inputs:

- the picture is degraded, and is the target, as it is; the published program sharpens both by unsharp masking first;
- bilinear and bicubic resizes average over what they shrink; the published ones read 2x2 or 4x4 pixels, so that fine
  detail aliases;
- grey Poisson noise is that of the mean of the channels; the published one is that of the luma;
- filters and resizes end in 0..1; the published ones may overshoot up to the next noise or JPEG;
- JPEG is a real encoder's, of a whole quality; the published one computes the same losses in tensors, of any quality.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from . import kernels

Range = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """One pass of blur, resize, noise and JPEG; the names follow the published option files."""

    blur_probability: float
    kernel_sizes: Range
    """Smallest and largest odd kernel size in pixels."""
    kernel_weights: tuple[float, ...]
    """Weights of: iso, aniso, generalised iso, generalised aniso, plateau iso, plateau aniso."""
    sinc_probability: float
    blur_sigma: Range
    beta_gaussian: Range
    beta_plateau: Range
    resize_weights: tuple[float, float, float]
    """Weights of: enlarge, shrink, keep."""
    resize_range: Range
    gaussian_noise_probability: float
    """Probability that the noise is Gaussian; otherwise it is Poisson."""
    noise_sigma: Range
    """Standard deviation of the Gaussian noise, of 255."""
    poisson_scale: Range
    grey_noise_probability: float
    jpeg_quality: Range


@dataclass(frozen=True)
class Preset:
    """One or two stages, then the resize to the target size with an optional sinc filter, and a JPEG before or after."""

    stages: tuple[Stage, ...]
    final_sinc_probability: float


_PUBLISHED_WEIGHTS = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
_FIRST = Stage(1.0, (7, 21), _PUBLISHED_WEIGHTS, 0.1, (0.2, 3.0), (0.5, 4.0), (1.0, 2.0), (0.2, 0.7, 0.1), (0.15, 1.5),
               0.5, (1.0, 30.0), (0.05, 3.0), 0.4, (30, 95))  # fmt: skip
_SECOND = Stage(0.8, (7, 21), _PUBLISHED_WEIGHTS, 0.1, (0.2, 1.5), (0.5, 4.0), (1.0, 2.0), (0.3, 0.4, 0.3), (0.3, 1.2),
                0.5, (1.0, 25.0), (0.05, 2.5), 0.4, (30, 95))  # fmt: skip
_LIGHT = Stage(1.0, (7, 13), (1.0, 0, 0, 0, 0, 0), 0.0, (0.4, 1.6), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0, 1.0), (1.0, 1.0),
               1.0, (1.0, 6.0), (0.05, 0.5), 0.3, (75, 95))  # fmt: skip
_MEDIUM_1 = Stage(1.0, (7, 15), _PUBLISHED_WEIGHTS, 0.05, (0.4, 2.0), (0.7, 2.0), (1.0, 1.5), (0.2, 0.5, 0.3), (0.5, 1.2),
                  0.6, (1.0, 12.0), (0.05, 1.0), 0.4, (60, 95))  # fmt: skip
_MEDIUM_2 = Stage(0.5, (7, 13), _PUBLISHED_WEIGHTS, 0.05, (0.2, 1.0), (0.7, 2.0), (1.0, 1.5), (0.2, 0.3, 0.5), (0.6, 1.2),
                  0.6, (1.0, 10.0), (0.05, 1.0), 0.4, (60, 95))  # fmt: skip
_HEAVY_1 = Stage(1.0, (7, 21), _PUBLISHED_WEIGHTS, 0.1, (0.4, 2.6), (0.5, 4.0), (1.0, 2.0), (0.2, 0.6, 0.2), (0.3, 1.3),
                 0.5, (3.0, 20.0), (0.05, 2.0), 0.4, (40, 90))  # fmt: skip
_HEAVY_2 = Stage(0.8, (7, 21), _PUBLISHED_WEIGHTS, 0.1, (0.2, 1.3), (0.5, 4.0), (1.0, 2.0), (0.3, 0.4, 0.3), (0.4, 1.2),
                 0.5, (2.0, 18.0), (0.05, 2.0), 0.4, (40, 90))  # fmt: skip

PRESETS = {
    "light": Preset((_LIGHT,), 0.0),
    "medium": Preset((_MEDIUM_1, _MEDIUM_2), 0.3),
    "heavy": Preset((_HEAVY_1, _HEAVY_2), 0.8),
    "realesrgan": Preset((_FIRST, _SECOND), 0.8),
}


def degrade(image: Tensor, scale: int, preset: str, generator: Generator) -> Tensor:
    """Make the low-resolution input that a camera and a few websites would leave of ``image``.

    Args:
        image: ``(3, H, W)`` in 0..1, H and W multiples of ``scale``.
        scale: how many times smaller the result is.
        preset: a name in ``PRESETS``.
        generator: CPU generator; the only source of randomness.

    Returns:
        ``(3, H / scale, W / scale)`` in 0..1, rounded to 8 bits.
    """
    plan = PRESETS[preset]
    height, width = image.shape[1] // scale, image.shape[2] // scale
    for index, stage in enumerate(plan.stages):
        last = index == len(plan.stages) - 1
        image = _blur(image, stage, generator)
        around = (height, width) if last else (image.shape[1], image.shape[2])
        image = _random_resize(image, around, stage, generator)
        image = _noise(image, stage, generator)
        if not last:
            image = jpeg(image, round(_uniform(stage.jpeg_quality, generator)))
    return _finish(image, (height, width), plan, generator)


def _finish(image: Tensor, size: tuple[int, int], plan: Preset, generator: Generator) -> Tensor:
    """The last resize with its sinc filter, and the last JPEG, in either order."""
    quality = round(_uniform(plan.stages[-1].jpeg_quality, generator))
    mode, jpeg_last = _mode(generator), _chance(0.5, generator)
    side, cutoff = _odd((7, 21), generator), _uniform((math.pi / 3, math.pi), generator)
    kernel = kernels.sinc(side, cutoff) if _chance(plan.final_sinc_probability, generator) else None
    image = image if jpeg_last else jpeg(image, quality)
    image = _resize(image, size, mode)
    image = image if kernel is None else _filter(image, kernel)
    return jpeg(image, quality) if jpeg_last else (image.clamp(0, 1) * 255).round() / 255


def _blur(image: Tensor, stage: Stage, generator: Generator) -> Tensor:
    if not _chance(stage.blur_probability, generator):
        return image
    size = _odd(stage.kernel_sizes, generator)
    if _chance(stage.sinc_probability, generator):
        low = math.pi / 3 if size < 13 else math.pi / 5
        return _filter(image, kernels.sinc(size, _uniform((low, math.pi), generator)))
    kind = int(torch.multinomial(torch.tensor(stage.kernel_weights), 1, generator=generator))
    sigma_x, sigma_y = _uniform(stage.blur_sigma, generator), _uniform(stage.blur_sigma, generator)
    angle = _uniform((-math.pi, math.pi), generator)
    if kind % 2 == 0:
        sigma_y, angle = sigma_x, 0.0
    if kind < 2:
        return _filter(image, kernels.gaussian(size, sigma_x, sigma_y, angle))
    low, high = stage.beta_gaussian if kind < 4 else stage.beta_plateau
    beta = _uniform((low, 1.0), generator) if _chance(0.5, generator) else _uniform((1.0, high), generator)
    shape = kernels.generalised_gaussian if kind < 4 else kernels.plateau
    return _filter(image, shape(size, beta, sigma_x, sigma_y, angle))


def _random_resize(image: Tensor, around: tuple[int, int], stage: Stage, generator: Generator) -> Tensor:
    """Resize to ``around`` (height, width) times a random factor."""
    choice = int(torch.multinomial(torch.tensor(stage.resize_weights), 1, generator=generator))
    low, high = stage.resize_range
    factor = (_uniform((1.0, high), generator), _uniform((low, 1.0), generator), 1.0)[choice]
    size = (max(1, round(around[0] * factor)), max(1, round(around[1] * factor)))
    return _resize(image, size, _mode(generator))


def _mode(generator: Generator) -> str:
    return ("area", "bilinear", "bicubic")[int(torch.randint(3, (1,), generator=generator))]


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image
    if mode == "area":
        return F.interpolate(image[None], size, mode="area")[0]
    return F.interpolate(image[None], size, mode=mode, align_corners=False, antialias=True)[0].clamp(0, 1)


def _noise(image: Tensor, stage: Stage, generator: Generator) -> Tensor:
    grey = _chance(stage.grey_noise_probability, generator)
    if _chance(stage.gaussian_noise_probability, generator):
        sigma = _uniform(stage.noise_sigma, generator) / 255
        noise = sigma * torch.randn(1 if grey else 3, *image.shape[1:], generator=generator)
        return (image + noise).clamp(0, 1)
    source = ((image.mean(0, keepdim=True) if grey else image).clamp(0, 1) * 255).round().long()
    levels = 2 ** math.ceil(math.log2(len(torch.unique(source))))  # photons per full scale, as published
    noise = poisson(source, levels, generator) / levels - source / 255
    return (image + noise * _uniform(stage.poisson_scale, generator)).clamp(0, 1)


def poisson(values: Tensor, levels: int, generator: Generator) -> Tensor:
    """Poisson counts of mean ``levels * values / 255``, by inversion of the distribution function.

    ``torch.poisson`` rejects and draws again: where a pixel differs by a rounding error, it gives all later pixels, and
    all later steps, other numbers.  Here each pixel uses one number.

    Args:
        values: whole numbers from 0 to 255, any shape, int64.
    """
    table = _poisson_table(levels)
    chance = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    counts = torch.searchsorted(table.flatten(), values + chance) - values * table.shape[1]
    return counts.clamp(0, table.shape[1] - 1).float()


@cache
def _poisson_table(levels: int) -> Tensor:
    """Row v: ``v + P(count <= k)`` at mean ``levels * v / 255``; the rows on end are one rising sequence."""
    mean = torch.arange(256, dtype=torch.float64)[:, None] * levels / 255
    count = torch.arange(levels + 12 * math.isqrt(levels) + 20, dtype=torch.float64)
    probability = torch.exp(torch.xlogy(count, mean) - mean - torch.lgamma(count + 1))
    return torch.arange(256)[:, None] + probability.cumsum(1).clamp(max=1)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """``image`` after JPEG compression (4:2:0) at ``quality`` in 1..100."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    reach = kernel.shape[0] // 2
    mode = "reflect" if reach < min(image.shape[1:]) else "replicate"
    padded = F.pad(image[:, None], (reach,) * 4, mode=mode)
    return F.conv2d(padded, kernel[None, None])[:, 0].clamp(0, 1)


def _uniform(bounds: Range, generator: Generator) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(probability: float, generator: Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _odd(bounds: Range, generator: Generator) -> int:
    low, high = int(bounds[0]) // 2, int(bounds[1]) // 2
    return 2 * int(torch.randint(low, high + 1, (1,), generator=generator)) + 1
