"""One-step and flow-matching arithmetic of SD3 (rectified flow), on tensors of any shape.

The forward process is ``z_t = (1 - sigma) z_0 + sigma e`` with ``e ~ N(0, I)``; the network predicts the velocity
``v = e - z_0`` (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 13).  TSD-SR (Dong et al., CVPR 2025,
sec. 3.1) replaces the noise at sigma = 1 by the latent of the low-quality image and takes a single step.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEP = 1000.0
"""Timestep of the single step; SD3's timesteps are ``1000 * sigma``."""
SHIFT = 3.0
"""SD3's shift of the noise schedule towards more noise."""
SCHEDULE_STEPS = 1000
"""Number of levels of SD3's noise schedule."""


def one_step(z: Tensor, velocity: Tensor, strength: float = 1.0) -> Tensor:
    """``z_H = z_L - strength * v``: the TSD-SR update from sigma 1 to 0.

    Args:
        z: scaled latent of the low-quality image, any shape.
        velocity: network output, same shape as ``z``.
        strength: 1 gives the published result, 0 returns ``z`` unchanged.

    >>> one_step(torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5]))
    tensor([0.5000, 2.5000])
    """
    return z - strength * velocity


def add_noise(z0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """``z_t = (1 - sigma) z_0 + sigma e``; ``sigma`` in 0..1 broadcasts against ``z0``."""
    return (1.0 - sigma) * z0 + sigma * noise


def shifted(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """``m s / (1 + (m - 1) s)``: noise levels shifted towards more noise (Esser et al. 2024, eq. 23; SD3 has ``m = 3``)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps: int = SCHEDULE_STEPS, shift: float = SHIFT) -> Tensor:
    """SD3's noise levels ``(steps,)`` from 1 down to almost 0, fp32.

    >>> schedule(4)
    tensor([1.0000, 0.9000, 0.7500, 0.5000])
    """
    return shifted(torch.arange(steps, 0, -1, dtype=torch.float32) / steps, shift)
