"""Perceptual distances as losses: LPIPS, DISTS, or image gradients, which need no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError, installation
from ...metrics.perceptual import Dists, Lpips, read_weights
from ...system.imports import import_pyiqa

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches ``(B, 3, H, W)`` in 0..1 to their mean distance."""
DISTANCES = ("gradients", "lpips", "lpips-alex", "dists")
"""``lpips`` is LPIPS with VGG, which its authors recommend for training."""
STRIDE = 16
"""Stride of the networks' last features in pixels; trained without random shifts, a model shows a grid of this period."""
_PYIQA = {"lpips": "lpips-vgg", "lpips-alex": "lpips", "dists": "dists"}
SCALES = 4
"""Levels of the pyramid of ``gradients``."""
_EPSILON = 1e-3


def gradients(image: Tensor, reference: Tensor) -> Tensor:
    """Mean difference of image gradients over a pyramid, ``sum_s |grad(x_s) - grad(y_s)|``; cf. Mathieu et al. 2016, eq. 6.

    A constant offset costs nothing; the absolute value is Charbonnier's smooth one.

    Args:
        image, reference: ``(B, 3, H, W)``, at least 8 pixels a side.

    >>> ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    >>> float(gradients(ramp, ramp + 0.2)) < 1e-6 < float(gradients(ramp, 1 - ramp))
    True
    """
    total = image.new_zeros((), dtype=torch.float32)
    difference = (image - reference).float()  # gradients and means are linear
    for scale in range(SCALES):
        for axis in (2, 3):
            total = total + (difference.diff(dim=axis).square() + _EPSILON**2).sqrt().mean() - _EPSILON
        if scale < SCALES - 1:
            difference = F.avg_pool2d(difference, 2)
    return total / (2 * SCALES)


def check_distance(name: str, weights: Path | None) -> None:
    """Raise ``InputError`` if the distance called ``name`` is not available; nothing is loaded on a device.

    Args:
        weights: a file made by ``tsdsr perceptual-weights``; None to use pyiqa's networks.
    """
    if weights is not None:
        read_weights(weights)
    elif name != "gradients" and importlib.util.find_spec("pyiqa") is None:
        raise InputError(
            f"perceptual = '{name}' needs --perceptual-weights FILE (docs/evaluation.md explains how to make one), or pyiqa: "
            f"{installation('metrics')}; or set perceptual = 'gradients'"
        )


def distance(name: str, device: torch.device, weights: Path | None = None) -> Distance:
    """Load the distance called ``name``, one of ``DISTANCES``; for networks the image is clamped to 0..1.

    Raises:
        InputError: as ``check_distance``.
    """
    check_distance(name, weights)
    if name == "gradients":
        return gradients
    network = _of_pyiqa(name, device) if weights is None else _of_file(name, weights).to(device)
    return lambda image, reference: network(image.clamp(0, 1), reference).mean()


def _of_file(name: str, path: Path) -> nn.Module:
    weights = read_weights(path)
    return Dists(weights) if name == "dists" else Lpips(weights, "vgg16" if name == "lpips" else "alexnet")


def _of_pyiqa(name: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of pyiqa, which downloads its weights if they are missing."""
    try:
        pyiqa = import_pyiqa()
    except ImportError as error:
        raise InputError(f"pyiqa: {error}; or use --perceptual-weights FILE (docs/evaluation.md)") from error
    return pyiqa.create_metric(_PYIQA[name], device=device, as_loss=True)
