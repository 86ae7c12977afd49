"""One-step and flow-matching arithmetic of SD3 (rectified flow), on tensors of any shape.

The forward process is ``z_t = (1 - sigma) z_0 + sigma e`` with ``e ~ N(0, I)`` and the network predicts the velocity
``v = e - z_0`` (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 13).  TSD-SR (Dong et al., CVPR 2025,
sec. 3.1) replaces the noise at sigma = 1 by the latent of the low-quality image and takes a single step.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEP = 1000.0
"""Timestep of the single step; SD3 counts timesteps as ``1000 * sigma``."""
SHIFT = 3.0
SCHEDULE_STEPS = 1000


def one_step(z: Tensor, velocity: Tensor, strength: float = 1.0) -> Tensor:
    """``z_H = z_L - strength * v``: the TSD-SR update from sigma 1 to 0.

    Args:
        z: scaled latent of the low-quality image, any shape.
        velocity: network output, same shape as ``z``.
        strength: 1 is the published result, 0 leaves the latent as it is.
    """
    return z - strength * velocity


def add_noise(z0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """``z_t = (1 - sigma) z_0 + sigma e``; ``sigma`` in 0..1 broadcasts against ``z0``."""
    return (1.0 - sigma) * z0 + sigma * noise


def x0_from_velocity(z_t: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """``z_0 = z_t - sigma v``: the clean latent that a velocity implies at noise level ``sigma``."""
    return z_t - sigma * velocity


def shifted(sigma: Tensor, shift: float = SHIFT) -> Tensor:
    """``m s / (1 + (m - 1) s)``: noise levels moved toward more noise (Esser et al. 2024, eq. 23; SD3 has ``m = 3``)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps: int = SCHEDULE_STEPS, shift: float = SHIFT) -> Tensor:
    """SD3's noise levels ``(steps,)`` from 1 down to almost 0, fp32."""
    return shifted(torch.arange(steps, 0, -1) / steps, shift)
