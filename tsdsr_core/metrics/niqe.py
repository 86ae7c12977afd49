"""NIQE, the natural image quality evaluator (Mittal, Soundararajan & Bovik 2013), with the results of its authors' program.

The statistics of natural images in ``assets/niqe.safetensors`` are from its authors' release (LIVE, The University of Texas
at Austin); ``assets/niqe.LICENSE.txt`` has their terms.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..weights.reading import check_weights, read_tensors
from .fidelity import grey, normalised

PARAMETERS = Path(__file__).parents[1] / "assets" / "niqe.safetensors"
BLOCK = 96
"""Side of the blocks in pixels."""
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Offsets of the neighbours that pixels are multiplied with: along rows, columns and diagonals, wrapping around in a block."""
_AT_ONCE = 256
"""Number of blocks fitted at once, to limit memory."""
_HALVING = (-3, -9, 29, 111, 111, 29, -9, -3)
"""Antialiased bicubic filter for halving, times 256: the cubic with a = -0.5 (Keys 1981), twice as wide."""


def niqe(image: Tensor) -> Tensor:
    """Distance of the statistics of images from those of natural images, ``(B,)``; lower is better, photographs have 2 to 6.

    It is ``sqrt((m - m_0)^T ((C + C_0) / 2)^-1 (m - m_0))`` with the mean ``m`` and covariance ``C`` of 36 features over
    blocks of 96x96 pixels, and ``m_0``, ``C_0`` of natural images.  The features of a block, at full and at half size, are
    parameters of generalised Gaussians fitted to the locally normalised grey values and to products of neighbours.  Rows and
    columns beyond the last whole block are ignored.  Blocks without contrast do not count for the covariance; the result is
    NaN with fewer than two others.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, with at least two blocks, for example 192x96.

    Raises:
        InputError: for a smaller image.
    """
    height, width = (side // BLOCK for side in image.shape[2:])
    if height * width < 2:
        size = f"{image.shape[3]}x{image.shape[2]}"
        raise InputError(f"an image of {size} pixels is too small for NIQE: expected at least {2 * BLOCK}x{BLOCK}")
    values = grey(image)[:, :, : height * BLOCK, : width * BLOCK].round()
    scales = [_features(_blocks(_contrasts(x), side)) for x, side in ((values, BLOCK), (_halved(values), BLOCK // 2))]
    natural_mean, natural_covariance = (tensor.to(image.device) for tensor in _natural())
    return torch.stack([_distance(rows, natural_mean, natural_covariance) for rows in torch.cat(scales, 2)])


def _distance(features: Tensor, natural_mean: Tensor, natural_covariance: Tensor) -> Tensor:
    """Distance of one image's features ``(blocks, 36)`` from those of natural images."""
    whole = features[~features.isnan().any(1)]
    if len(whole) < 2:
        return features.new_tensor(torch.nan)
    difference = features.nanmean(0) - natural_mean
    return (difference @ torch.linalg.pinv((natural_covariance + whole.T.cov()) / 2) @ difference).sqrt()


def _features(blocks: Tensor) -> Tensor:
    """The 18 features of each of ``(B, blocks, side, side)``, ``(B, blocks, 18)``."""
    shape, left, right = _fitted(blocks)
    features = [shape, (left + right) / 2]
    for shift in _SHIFTS:
        shape, left, right = _fitted(blocks * blocks.roll(shift, (2, 3)))
        mean = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()
        features += [shape, mean, left, right]
    return torch.stack(features, 2)


def _fitted(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left width and right width of the asymmetric generalised Gaussian fitted to each block.

    Fitted by moments (Lasmar et al. 2009); a width is NaN if a block has no values on that side of 0.

    Args:
        values: ``(B, blocks, side, side)``.

    Returns:
        Three tensors ``(B, blocks)``.
    """
    squares = values.square()
    left, right = (((squares * side).sum((2, 3)) / side.sum((2, 3))).sqrt() for side in (values < 0, values > 0))
    ratio = left / right
    spread = values.abs().mean((2, 3)).square() / squares.mean((2, 3))
    wanted = spread * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1).square()
    shapes, moments = _shapes(values.device)
    nearest = [(moments - part[:, None]).abs().argmin(1) for part in wanted.flatten().split(_AT_ONCE)]
    shape = shapes[torch.cat(nearest)].view_as(wanted)
    scale = (torch.lgamma(1 / shape) - torch.lgamma(3 / shape)).exp().sqrt()
    return shape, left * scale, right * scale


def _shapes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Candidate shapes ``a`` from 0.2 to 10, and ``Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a))`` for each."""
    shapes = torch.arange(200, 10001, dtype=torch.float64, device=device) / 1000
    moments = (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()
    return shapes, moments


def _contrasts(values: Tensor) -> Tensor:
    return normalised(values, borders="replicate")[:, 0]


def _blocks(values: Tensor, side: int) -> Tensor:
    """Divide ``(B, H, W)`` into blocks ``(B, blocks, side, side)``."""
    return values.unfold(1, side, side).unfold(2, side, side).flatten(1, 2)


def _halved(values: Tensor) -> Tensor:
    """``(B, 1, H, W)`` at half the size; borders are mirrored, including the edge pixels."""
    row = torch.tensor(_HALVING, dtype=values.dtype, device=values.device) / 256
    for axis, kernel in ((2, row[None, None, :, None]), (3, row[None, None, None])):
        first, last = values.narrow(axis, 0, 3), values.narrow(axis, values.shape[axis] - 3, 3)
        values = torch.cat((first.flip(axis), values, last.flip(axis)), axis)
        values = F.conv2d(values, kernel, stride=(2, 1) if axis == 2 else (1, 2))
    return values


@cache
def _natural() -> tuple[Tensor, Tensor]:
    """Mean ``(36,)`` and covariance ``(36, 36)`` of the features of natural images."""
    tensors, _ = read_tensors(PARAMETERS)
    check_weights(PARAMETERS, tensors)
    return tensors["mean"], tensors["covariance"]
