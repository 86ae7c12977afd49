"""Blur kernels of the Real-ESRGAN degradation (Wang et al. 2021, sec. 3.2), as normalised float tensors (size, size)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _squared_radius(size: int, sigma_x: float, sigma_y: float, angle: float) -> Tensor:
    """``p^T Sigma^-1 p`` on the grid of a ``size`` x ``size`` kernel; sigmas in pixels, angle in radians."""
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = -math.sin(angle) * x + math.cos(angle) * y
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def _normalised(kernel: Tensor) -> Tensor:
    return (kernel / kernel.sum()).float()


def gaussian(size: int, sigma_x: float, sigma_y: float | None = None, angle: float = 0.0) -> Tensor:
    """Gaussian kernel, isotropic unless ``sigma_y`` is given."""
    return _normalised(torch.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y or sigma_x, angle)))


def generalised_gaussian(size: int, beta: float, sigma_x: float, sigma_y: float | None = None, angle: float = 0.0) -> Tensor:
    """``exp(-0.5 r^(2 beta))``: a flatter top than a Gaussian for ``beta`` above 1, more peaked below."""
    return _normalised(torch.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y or sigma_x, angle) ** beta))


def plateau(size: int, beta: float, sigma_x: float, sigma_y: float | None = None, angle: float = 0.0) -> Tensor:
    """``1 / (1 + r^(2 beta))``: a flat top with tails."""
    return _normalised(1 / (1 + _squared_radius(size, sigma_x, sigma_y or sigma_x, angle) ** beta))


def sinc(size: int, cutoff: float) -> Tensor:
    """Ideal circular low-pass ``c J1(c r) / (2 pi r)``, which rings like over-sharpening; ``cutoff`` ``c`` in 0..pi."""
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    radius = torch.hypot(axis[:, None], axis[None, :])
    safe = radius.clamp_min(1e-9)
    kernel = cutoff * torch.special.bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    return _normalised(torch.where(radius == 0, cutoff**2 / (4 * math.pi), kernel))
