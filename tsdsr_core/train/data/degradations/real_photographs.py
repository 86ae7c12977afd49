"""Degradations as in real photographs, one fault at a time: grain, sensor noise, halos, JPEG, earlier enlargement, halftone.

Each function makes a low-resolution input with one kind of fault from a good image, for training and evaluation sets.  Unlike
the Gaussian noise of Real-ESRGAN, and like the noise of old photographs, these faults are correlated over several pixels:
noise is added before a resize, or blurred afterwards.

Images are float tensors ``(3, H, W)`` in 0..1 on the CPU; all random numbers come from the given generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from . import kernels
from .operations import chance, compress_jpeg, convolve, random_mode, resize, uniform

Fault = Callable[[Tensor, tuple[int, int], Generator], Tensor]
"""Maps a good image, the (height, width) of the result and a generator to a low-resolution image."""
_SCREEN_ANGLES = (15.0, 75.0, 0.0)
"""Angles of the halftone screens of red, green and blue in degrees: the usual ones of cyan, magenta and yellow."""


def grain(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """Film grain: noise of standard deviation 10 to 30 (of 255), blurred by 0.5 to 1.6 pixels, partly coloured."""
    low = _resize(image, size, generator)
    return _maybe_jpeg(_add_grain(low, (10, 30), generator), 0.5, (70, 95), generator)


def sensor(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """Sensor noise before and after a resize: strong at 1.3 to 2.5 times the size of the result, then a little at its size."""
    factor = uniform((1.3, 2.5), generator)
    large = _resize(image, (round(size[0] * factor), round(size[1] * factor)), generator)
    noise = _white(large.shape, generator) * uniform((12, 45), generator) / 255
    shot = uniform((0.0, 1.0), generator)  # share of shot noise, which is stronger in bright areas
    noisy = (large + noise * (1 - shot + shot * 1.4 * large.clamp(0, 1).sqrt())).clamp(0, 1)
    low = _resize(noisy, size, generator)
    low = (low + _white(low.shape, generator) * uniform((0, 6), generator) / 255).clamp(0, 1)
    return _maybe_jpeg(low, 0.7, (60, 95), generator)


def halo(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """Over-sharpening: unsharp masking of amount 1 to 3.5, or the ringing of a sinc filter."""
    low = _resize(image, size, generator)
    if chance(0.7, generator):
        low = _sharpen(low, (1.0, 3.5), generator)
    else:
        low = convolve(low, kernels.sinc(21, uniform((math.pi / 3, 0.8 * math.pi), generator)))
    return _maybe_jpeg(low, 0.6, (70, 95), generator)


def jpeg(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """JPEG of quality 10 to 40 with chroma subsampling; half of the images are compressed again with shifted blocks."""
    low = _compress(_resize(image, size, generator), (10, 40), generator)
    if chance(0.5, generator):
        shift = torch.randint(1, 8, (2,), generator=generator).tolist()
        low = _compress(low.roll(shift, (1, 2)), (15, 50), generator).roll([-step for step in shift], (1, 2))
    return low


def soft(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """An image that was already enlarged, by 1.5 to 3, and so has no detail as fine as a pixel."""
    factor = uniform((1.5, 3.0), generator)
    small = _resize(image, (max(8, round(size[0] / factor)), max(8, round(size[1] / factor))), generator)
    small = _maybe_jpeg(small, 0.4, (50, 90), generator)
    return _maybe_jpeg(_resize(small, size, generator), 0.5, (60, 95), generator)


def halftone(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """A scanned print: halftone dots with a period of 2 to 4 pixels, at another angle in each channel, slightly blurred."""
    factor = 3
    large = F.interpolate(image[None], (factor * size[0], factor * size[1]), mode="bilinear", antialias=True)[0]
    period = uniform((2.0, 4.0), generator) * factor
    grey = chance(0.4, generator)
    if grey:
        large = large.mean(0, keepdim=True).expand(3, -1, -1)
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in large.shape[1:]), indexing="ij")
    dots = []
    for channel, degrees in zip(large, (45.0,) * 3 if grey else _SCREEN_ANGLES, strict=True):
        turn = math.radians(degrees)
        u, v = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
        screen = 0.5 + 0.25 * (torch.cos(math.tau / period * u) + torch.cos(math.tau / period * v))
        dots.append(torch.sigmoid(_SCREEN_EDGE * (channel - screen)))
    printed = convolve(torch.stack(dots), kernels.gaussian(13, uniform((0.25, 0.45), generator) * period))
    low = F.interpolate(printed[None], size, mode="area")[0]
    return _maybe_jpeg(low, 0.5, (70, 95), generator)


_SCREEN_EDGE = 12.0
"""Steepness of the edge of a halftone dot."""


def real(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    """Several faults combined, as in practice: blur, sensor noise or grain, earlier enlargement, sharpening, JPEG."""
    if chance(0.5, generator):
        image = convolve(image, kernels.gaussian(13, uniform((0.2, 2.2), generator)))
    noise = float(torch.rand((), generator=generator))
    factor = uniform((1.2, 2.5), generator)
    if noise < 0.35:
        large = _resize(image, (round(size[0] * factor), round(size[1] * factor)), generator)
        image = (large + _white(large.shape, generator) * uniform((5, 45), generator) / 255).clamp(0, 1)
    if chance(0.2, generator):
        smaller = uniform((1.2, 2.5), generator)
        image = _resize(image, (max(8, round(size[0] / smaller)), max(8, round(size[1] / smaller))), generator)
        image = _maybe_jpeg(image, 0.5, (30, 90), generator)
    low = _resize(image, size, generator)
    if 0.35 <= noise < 0.75:
        low = _add_grain(low, (3, 32), generator)
    if chance(0.25, generator):
        low = _sharpen(low, (0.3, 2.5), generator)
    return _maybe_jpeg(_maybe_jpeg(low, 0.7, (20, 95), generator), 0.15, (30, 95), generator)


KINDS: dict[str, Fault] = {
    "grain": grain, "sensor": sensor, "halo": halo, "jpeg": jpeg, "soft": soft, "halftone": halftone, "real": real,
}  # fmt: skip


def _add_grain(image: Tensor, sigmas: tuple[float, float], generator: Generator) -> Tensor:
    blur = kernels.gaussian(13, uniform((0.5, 1.6), generator))
    noise = F.conv2d(F.pad(_white(image.shape, generator)[:, None], (6,) * 4, mode="reflect"), blur[None, None])[:, 0]
    noise = noise / noise.std().clamp_min(1e-6) * uniform(sigmas, generator) / 255
    if chance(0.5, generator):  # stronger in mid-tones
        noise = noise * (0.5 + 2 * image.mean(0) * (1 - image.mean(0)))
    return (image + noise).clamp(0, 1)


def _white(shape: Sequence[int], generator: Generator) -> Tensor:
    """White Gaussian noise ``(3, H, W)`` of standard deviation 1, with a random correlation between the channels."""
    share = uniform((0.0, 0.8), generator) if chance(0.75, generator) else 0.0
    own = torch.randn(*shape, generator=generator)
    common = torch.randn(1, *shape[1:], generator=generator)
    return math.sqrt(share) * own + math.sqrt(1 - share) * common


def _sharpen(image: Tensor, amounts: tuple[float, float], generator: Generator) -> Tensor:
    smooth = convolve(image, kernels.gaussian(13, uniform((0.6, 2.0), generator)))
    return (image + uniform(amounts, generator) * (image - smooth)).clamp(0, 1)


def _resize(image: Tensor, size: tuple[int, int], generator: Generator) -> Tensor:
    mode = random_mode(generator)
    return resize(image, size, "bilinear" if mode == "area" and size[0] >= image.shape[1] else mode)


def _maybe_jpeg(image: Tensor, probability: float, qualities: tuple[float, float], generator: Generator) -> Tensor:
    chosen, quality = chance(probability, generator), round(uniform(qualities, generator))
    return compress_jpeg(image, quality) if chosen else image


def _compress(image: Tensor, qualities: tuple[float, float], generator: Generator) -> Tensor:
    return compress_jpeg(image, round(uniform(qualities, generator)))
