"""Colour fixes: transfer the colours of the input to the restored image.

All functions take float tensors ``(B, 3, H, W)`` of any value range (RGB in 0..1 for ``lab``), process each image of the
batch separately and return a tensor like ``content``. Results are not clamped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_number
from .errors import InputError

METHODS = ("wavelet", "adain", "lab", "none")
WAVELET_LEVELS = 5
WAVELET_LEVELS_RANGE = (1, 10)


def match_colour(content: Tensor, style: Tensor, method: str, wavelet_levels: int = WAVELET_LEVELS) -> Tensor:
    """Apply the colour fix called ``method`` (one of ``METHODS``).

    Args:
        content: restored image, ``(B, 3, H, W)``.
        style: image to take the colours from; for ``wavelet`` of the same size as ``content``.
        wavelet_levels: number of wavelet levels, from 1 to 10.

    Raises:
        InputError: for an unknown method or an invalid number of levels.

    >>> grey, red = torch.full((1, 3, 4, 4), 0.5), torch.tensor([0.9, 0.2, 0.2]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    >>> match_colour(grey, red, "wavelet")[0, :, 0, 0]
    tensor([0.9000, 0.2000, 0.2000])
    """
    if method == "wavelet":
        return wavelet(content, style, wavelet_levels)
    if method == "adain":
        return adain(content, style)
    if method == "lab":
        return lab(content, style)
    if method == "none":
        return content
    raise InputError(f"unknown colour fix {method!r}: expected one of {', '.join(METHODS)}")


def check_levels(levels: int) -> None:
    """Raise ``InputError`` unless ``levels`` is a valid number of wavelet levels (0 would return the reference itself)."""
    check_number("wavelet levels", levels, *WAVELET_LEVELS_RANGE, whole=True)


def wavelet(content: Tensor, style: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """High frequencies of ``content`` with the low frequencies of ``style`` (a-trous wavelet decomposition).

    The detail bands sum to ``content - low(content)``, so the result is ``content + low(style - content)``, where low is
    ``levels`` passes of the kernel [1 2 1] x [1 2 1] / 16 with dilations 1, 2, 4, ... and replicated borders
    (StableSR, Wang et al. 2023).  Large images are processed in strips with a halo, which gives the same result.

    Raises:
        InputError: for an invalid number of levels.
    """
    check_levels(levels)
    height, halo = content.shape[2], 2**levels - 1
    strip = _CPU_STRIP if content.device.type == "cpu" else _STRIP
    rows = max(strip // content.shape[3], halo)
    if height <= rows:
        return content + wavelet_low(style - content, levels)
    result = torch.empty_like(content)
    for top in range(0, height, rows):
        first, last = max(0, top - halo), min(height, top + rows + halo)
        low = wavelet_low(style[:, :, first:last] - content[:, :, first:last], levels)[:, :, top - first :][:, :, :rows]
        result[:, :, top : top + rows] = content[:, :, top : top + rows] + low
    return result


_STRIP = 2**22
"""Pixels of a strip; filtering takes about nine times their memory."""
_CPU_STRIP = 2**19
"""The same on the CPU, where short strips cost little time beside the model."""


def wavelet_low(image: Tensor, levels: int) -> Tensor:
    """Low frequencies of ``image`` after ``levels`` a-trous passes."""
    channels = image.shape[1]
    if image.device.type != "cpu":
        image = image.contiguous()  # of channels that lie together cuDNN would take the products, in TF32
    row = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    for level in range(levels):
        dilation = 2**level
        padded = F.pad(image, (dilation,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, groups=channels, dilation=dilation)
    return image


def adain(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """``content`` with the mean and standard deviation of each channel of ``style`` (AdaIN, Huang & Belongie 2017).

    Args:
        eps: added to the variances.
    """
    content_mean, content_std = _moments(content, eps)
    style_mean, style_std = _moments(style, eps)
    return (content - content_mean) / content_std * style_std + style_mean


def lab(content: Tensor, style: Tensor) -> Tensor:
    """Lightness of ``content`` with the chroma statistics of ``style``.

    Both images, sRGB in 0..1, are converted to CIE 1976 L*a*b* (D65). The mean and standard deviation of a* and b* are
    matched (Reinhard et al. 2001, chroma only), and the mean lightness is shifted to that of ``style``.
    """
    content_lab, style_lab = rgb_to_lab(content), rgb_to_lab(style)
    shift = style_lab[:, :1].mean((2, 3), True) - content_lab[:, :1].mean((2, 3), True)
    lightness = content_lab[:, :1] + shift
    chroma = adain(content_lab[:, 1:], style_lab[:, 1:], eps=_CHROMA_EPS)
    return lab_to_rgb(torch.cat((lightness, chroma), 1))


_CHROMA_EPS = 0.25
"""Added to the variances of a* and b*, so that the noise of a nearly grey image is not amplified."""
_D65 = (0.95047, 1.0, 1.08883)
_RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_EPSILON, _KAPPA = 216 / 24389, 24389 / 27


def rgb_to_lab(image: Tensor) -> Tensor:
    """sRGB ``(B, 3, H, W)`` in 0..1 to CIE 1976 L*a*b* (D65 white; L in 0..100)."""
    linear = torch.where(image <= 0.04045, image / 12.92, ((image.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    xyz = _mix(linear, torch.tensor(_RGB_TO_XYZ, dtype=torch.float32)) / _column(image, _D65)
    f = torch.where(xyz > _EPSILON, xyz.clamp_min(_EPSILON) ** (1 / 3), (_KAPPA * xyz + 16) / 116)
    x, y, z = f.chunk(3, 1)
    return torch.cat((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def lab_to_rgb(image: Tensor) -> Tensor:
    """CIE 1976 L*a*b* (D65) to sRGB; colours outside sRGB lie outside 0..1."""
    lightness, a, b = image.chunk(3, 1)
    y = (lightness + 16) / 116
    f = torch.cat((y + a / 500, y, y - b / 200), 1)
    xyz = torch.where(f**3 > _EPSILON, f**3, (116 * f - 16) / _KAPPA) * _column(image, _D65)
    linear = _mix(xyz, torch.linalg.inv(torch.tensor(_RGB_TO_XYZ, dtype=torch.float64)))
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def _mix(image: Tensor, matrix: Tensor) -> Tensor:
    columns = matrix.to(image.dtype).to(image.device)[:, :, None, None]  # in this order: some devices have no float64
    red, green, blue = (columns[:, index] * image[:, index : index + 1] for index in range(3))
    return red + green + blue  # no matrix product, which may be in TF32


def _column(image: Tensor, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=image.dtype, device=image.device)[:, None, None]


def _moments(image: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if image.shape[2] * image.shape[3] == 1:  # the unbiased variance of one value is undefined
        return image, torch.full_like(image, eps**0.5)
    variance, mean = torch.var_mean(image, (2, 3), keepdim=True)
    return mean, (variance + eps).sqrt()
