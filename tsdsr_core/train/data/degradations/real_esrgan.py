"""Real-ESRGAN's second-order degradation (Wang et al. 2021, sec. 3): blur, resize, noise and JPEG, twice, with presets.

Images are float tensors ``(3, H, W)`` in 0..1 on the CPU.

The preset "realesrgan" has the parameters of the published option file.  The operations differ from the published program
in these points, so models trained with either have seen slightly different inputs:

- The image is degraded, and used as target, as it is; the published program first sharpens both with an unsharp mask.
- Bilinear and bicubic resizing is antialiased; the published one is not, so fine detail aliases.
- Grey Poisson noise is computed from the mean of the channels; the published one from the luma.
- Filters and resizes are clamped to 0..1; the published ones may overshoot until the next noise or JPEG step.
- JPEG uses a real encoder with integer quality; the published program simulates it in tensors, with any quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

from . import kernels
from .operations import chance, compress_jpeg, convolve, random_mode, resize, uniform

Range = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """One pass of blur, resize, noise and JPEG; names follow the published option files."""

    blur_probability: float
    kernel_sizes: Range
    """Smallest and largest kernel size in pixels, both odd."""
    kernel_weights: tuple[float, ...]
    """Relative weights of the kernels: Gaussian, generalised Gaussian and plateau, each isotropic and anisotropic."""
    sinc_probability: float
    blur_sigma: Range
    beta_gaussian: Range
    beta_plateau: Range
    resize_weights: tuple[float, float, float]
    """Relative weights of enlarging, shrinking and keeping the size."""
    resize_range: Range
    gaussian_noise_probability: float
    """Probability that the noise is Gaussian; otherwise it is Poisson."""
    noise_sigma: Range
    """Standard deviation of the Gaussian noise, in levels of 0..255."""
    poisson_scale: Range
    grey_noise_probability: float
    jpeg_quality: Range


@dataclass(frozen=True)
class Preset:
    """One or two stages, then the resize to the target size with an optional sinc filter, and JPEG before or after it."""

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


def degrade_in_stages(image: Tensor, size: tuple[int, int], plan: Preset, generator: Generator) -> Tensor:
    """Degrade ``image`` with the stages of ``plan``; the result has ``size`` (height, width) and is rounded to 8 bits."""
    for index, stage in enumerate(plan.stages):
        last = index == len(plan.stages) - 1
        image = _blur(image, stage, generator)
        base_size = size if last else (image.shape[1], image.shape[2])
        image = _random_resize(image, base_size, stage, generator)
        image = _noise(image, stage, generator)
        if not last:
            image = compress_jpeg(image, round(uniform(stage.jpeg_quality, generator)))
    return _final_resize(image, size, plan, generator)


def _final_resize(image: Tensor, size: tuple[int, int], plan: Preset, generator: Generator) -> Tensor:
    """Resize to ``size`` with an optional sinc filter, and compress as JPEG, in random order."""
    quality = round(uniform(plan.stages[-1].jpeg_quality, generator))
    mode, jpeg_last = random_mode(generator), chance(0.5, generator)
    side, cutoff = _odd((7, 21), generator), uniform((math.pi / 3, math.pi), generator)
    kernel = kernels.sinc(side, cutoff) if chance(plan.final_sinc_probability, generator) else None
    image = image if jpeg_last else compress_jpeg(image, quality)
    image = resize(image, size, mode)
    image = image if kernel is None else convolve(image, kernel)
    return compress_jpeg(image, quality) if jpeg_last else (image.clamp(0, 1) * 255).round() / 255


def _blur(image: Tensor, stage: Stage, generator: Generator) -> Tensor:
    if not chance(stage.blur_probability, generator):
        return image
    size = _odd(stage.kernel_sizes, generator)
    if chance(stage.sinc_probability, generator):
        low = math.pi / 3 if size < 13 else math.pi / 5
        return convolve(image, kernels.sinc(size, uniform((low, math.pi), generator)))
    kind = int(torch.multinomial(torch.tensor(stage.kernel_weights), 1, generator=generator))
    sigma_x, sigma_y = uniform(stage.blur_sigma, generator), uniform(stage.blur_sigma, generator)
    angle = uniform((-math.pi, math.pi), generator)
    if kind % 2 == 0:
        sigma_y, angle = sigma_x, 0.0
    if kind < 2:
        return convolve(image, kernels.gaussian(size, sigma_x, sigma_y, angle))
    low, high = stage.beta_gaussian if kind < 4 else stage.beta_plateau
    beta = uniform((low, 1.0), generator) if chance(0.5, generator) else uniform((1.0, high), generator)
    shape = kernels.generalised_gaussian if kind < 4 else kernels.plateau
    return convolve(image, shape(size, beta, sigma_x, sigma_y, angle))


def _random_resize(image: Tensor, base_size: tuple[int, int], stage: Stage, generator: Generator) -> Tensor:
    """Resize to ``base_size`` (height, width) times a random factor."""
    choice = int(torch.multinomial(torch.tensor(stage.resize_weights), 1, generator=generator))
    low, high = stage.resize_range
    factor = (uniform((1.0, high), generator), uniform((low, 1.0), generator), 1.0)[choice]
    size = (max(1, round(base_size[0] * factor)), max(1, round(base_size[1] * factor)))
    return resize(image, size, random_mode(generator))


def _noise(image: Tensor, stage: Stage, generator: Generator) -> Tensor:
    grey = chance(stage.grey_noise_probability, generator)
    if chance(stage.gaussian_noise_probability, generator):
        sigma = uniform(stage.noise_sigma, generator) / 255
        noise = sigma * torch.randn(1 if grey else 3, *image.shape[1:], generator=generator)
        return (image + noise).clamp(0, 1)
    source = ((image.mean(0, keepdim=True) if grey else image).clamp(0, 1) * 255).round().long()
    levels = 2 ** math.ceil(math.log2(len(torch.unique(source))))  # photons at full scale, as published
    noise = poisson(source, levels, generator) / levels - source / 255
    return (image + noise * uniform(stage.poisson_scale, generator)).clamp(0, 1)


def poisson(values: Tensor, levels: int, generator: Generator) -> Tensor:
    """Poisson counts of mean ``levels * values / 255``, by inversion of the distribution function.

    ``torch.poisson`` uses rejection sampling: a rounding error in one pixel changes the random numbers of all pixels after
    it.  Here each pixel uses exactly one random number.

    Args:
        values: whole numbers from 0 to 255, any shape, int64.
        levels: mean count at value 255.
    """
    table = _poisson_table(levels)
    chance = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    counts = torch.searchsorted(table.flatten(), values + chance) - values * table.shape[1]
    return counts.clamp(0, table.shape[1] - 1).float()


@cache
def _poisson_table(levels: int) -> Tensor:
    """Row v holds ``v + P(count <= k)`` for mean ``levels * v / 255``; the rows joined are one increasing sequence."""
    mean = torch.arange(256, dtype=torch.float64)[:, None] * levels / 255
    count = torch.arange(levels + 12 * math.isqrt(levels) + 20, dtype=torch.float64)
    probability = torch.exp(torch.xlogy(count, mean) - mean - torch.lgamma(count + 1))
    return torch.arange(256)[:, None] + probability.cumsum(1).clamp(max=1)


def _odd(bounds: Range, generator: Generator) -> int:
    low, high = int(bounds[0]) // 2, int(bounds[1]) // 2
    return 2 * int(torch.randint(low, high + 1, (1,), generator=generator)) + 1
