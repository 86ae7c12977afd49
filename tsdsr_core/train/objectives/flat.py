"""Flat-area penalty: a loss on fine texture where the photograph has none."""

from __future__ import annotations

from torch import Tensor

from ...metrics.fidelity import blurred, flat_areas

SIGMA = 1.5
"""Sigma in pixels of the Gaussian whose remainder is fine texture: most of waves up to 9 pixels long."""


def flat_error(image: Tensor, aim: Tensor, photograph: Tensor) -> Tensor:
    """Mean absolute error of the fine texture in flat areas of a photograph; 0 if it has none.

    A perceptual distance takes the grain of a photograph for texture, and a restorer that is trained with it weaves a fine
    pattern into skies and walls, where it is seen at once.  With the Gaussian ``G`` of sigma 1.5 and the flat areas ``M`` of
    ``metrics.fidelity.flat_noise``, the result is the mean of ``|(x - G*x) - (y - G*y)|`` over ``M``, for the image ``x`` and
    the aim ``y``.

    Args:
        image, aim, photograph: ``(B, C, H, W)`` in 0..1, of equal shape, sides of at least 7 pixels. The photograph says
            which areas are flat; the aim may be another restoration of it.
    """
    error = (image - aim).float()
    fine = error - blurred(error.flatten(0, 1)[:, None], SIGMA).view_as(error)
    flat = flat_areas(photograph).to(fine).expand_as(fine)
    return (fine.abs() * flat).sum() / flat.sum().clamp(min=1)
