"""Validation during training: metrics and example images of a fixed evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..colour import match_colour
from ..errors import InputError
from ..images.files import read_picture
from ..metrics.fidelity import mean, psnr_y, ssim_y
from ..metrics.spectrum import LEAST_SIDE, PERIODS, grid_peaks, sharpness
from ..pipeline import bicubic

Show = Callable[[str, Tensor], None]
"""Takes a name and an image ``(3, H, W)`` in 0..1."""
IMAGES = 8
"""Images of each preset that are validated; more would delay the training."""
SHOWN = 2
"""Images of each preset that are logged."""


@dataclass(frozen=True)
class Pair:
    """One image of the evaluation set."""

    preset: str
    name: str
    low: Tensor
    """Low quality, enlarged bicubically, ``(1, 3, H, W)`` in 0..1."""
    high: Tensor
    """High quality, same shape."""


def load_pairs(folder: Path) -> list[Pair]:
    """Load the first images of each preset of an evaluation set that ``make_evaluation_set`` wrote.

    Raises:
        InputError: if there are no images, or one is too small for the spectrum's metrics.
    """
    presets = sorted(folder.glob("lq-*"))
    pairs = []
    for preset in presets:
        for path in sorted(preset.glob("*.png"))[:IMAGES]:
            high = read_picture(folder / "hq" / path.name).rgb
            if min(high.shape[2:]) < LEAST_SIDE:
                raise InputError(f"--validation {folder}: {path.name} has sides below {LEAST_SIDE} pixels")
            low = bicubic(read_picture(path).rgb, (high.shape[2], high.shape[3]))
            pairs.append(Pair(preset.name.removeprefix("lq-"), path.stem, low, high))
    if not pairs:
        raise InputError(
            f"--validation {folder}: expected hq/ and lq-PRESET/ with PNG files, as tsdsr train evalset makes them"
        )
    return pairs


def validate(
    pairs: list[Pair], restore: Callable[[Tensor], Tensor | None], wavelet_levels: int, device: torch.device, show: Show
) -> Mapping[str, float]:
    """Mean metrics by preset: PSNR and SSIM of the luma, sharpness, and the strength of 8- and 16-pixel grids.

    Args:
        restore: maps enlarged low-quality images to restored ones; where it returns None, there are no metrics.
        wavelet_levels: levels of the wavelet colour fix.
        show: is called with the first images of each preset: input, result and original side by side.
    """
    figures: dict[str, list[float]] = {}
    shown: dict[str, int] = {}
    for pair in pairs:
        low = pair.low.to(device)
        result = restore(low)
        if result is None:
            return {}
        result = match_colour(result, low, "wavelet", wavelet_levels).clamp(0, 1).float().cpu()
        found = {"psnr_y": psnr_y(result, pair.high), "ssim_y": ssim_y(result, pair.high), **_spectral(result)}
        for name, value in found.items():
            figures.setdefault(f"{pair.preset}/{name}", []).append(float(value))
        shown[pair.preset] = shown.get(pair.preset, 0) + 1
        if shown[pair.preset] <= SHOWN:
            show(f"{pair.preset}/{pair.name}", torch.cat((pair.low, result, pair.high), 3)[0])
    return {name: mean(values) for name, values in figures.items()}


def references(pairs: list[Pair]) -> Mapping[str, float]:
    """Mean sharpness and grid strength of the originals: the values that results should come close to."""
    originals = {pair.name: pair.high for pair in pairs}  # each once, although every preset has it
    figures = [_spectral(high) for high in originals.values()]
    return {name: mean([float(found[name]) for found in figures]) for name in figures[0]}


def _spectral(image: Tensor) -> dict[str, Tensor]:
    return {"sharpness": sharpness(image), **{f"grid_{period}": grid_peaks(image, period) for period in PERIODS}}
