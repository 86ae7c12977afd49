"""What a run is judged by while it goes on: figures and pictures of a fixed evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..colour import match_colour
from ..image_io import read_picture
from ..metrics import mean, psnr_y, ssim_y
from ..restore import bicubic
from ..spectrum import LEAST_SIDE, PERIODS, grid_peaks, sharpness

Show = Callable[[str, Tensor], None]
"""Takes a name and a picture ``(3, H, W)`` in 0..1."""
PICTURES = 8
"""Of each preset; a run is not to wait for more."""
SHOWN = 2


@dataclass(frozen=True)
class Pair:
    """One picture of the evaluation set."""

    preset: str
    name: str
    low: Tensor
    """Enlarged bicubically, ``(1, 3, H, W)`` in 0..1."""
    high: Tensor


def load_pairs(folder: Path) -> list[Pair]:
    """The first pictures of each preset of an evaluation set, as ``make_evaluation_set`` wrote it.

    Raises:
        ValueError: where there is none, or one is too small for its spectrum.
    """
    presets = sorted(folder.glob("lq-*"))
    pairs = []
    for preset in presets:
        for path in sorted(preset.glob("*.png"))[:PICTURES]:
            high = read_picture(folder / "hq" / path.name).rgb
            if min(high.shape[2:]) < LEAST_SIDE:
                raise ValueError(f"--validation {folder}: {path.name} has sides below {LEAST_SIDE} pixels")
            low = bicubic(read_picture(path).rgb, (high.shape[2], high.shape[3]))
            pairs.append(Pair(preset.name.removeprefix("lq-"), path.stem, low, high))
    if not pairs:
        raise ValueError(
            f"--validation {folder}: expected hq/ and lq-PRESET/ with PNG files, as tsdsr train evalset makes them"
        )
    return pairs


def validate(
    pairs: list[Pair], restore: Callable[[Tensor], Tensor | None], wavelet_levels: int, device: torch.device, show: Show
) -> Mapping[str, float]:
    """Mean figures by preset: PSNR and SSIM of the luma, sharpness, and the strength of grids of 8 and 16 pixels.

    Args:
        restore: enlarged low quality to restored pictures; None ends it without figures.
        wavelet_levels: of the colour fix.
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
    """Mean sharpness and grids of the originals themselves: what those figures of results are to come near."""
    originals = {pair.name: pair.high for pair in pairs}  # once, however many presets show them
    figures = [_spectral(high) for high in originals.values()]
    return {name: mean([float(found[name]) for found in figures]) for name in figures[0]}


def _spectral(image: Tensor) -> dict[str, Tensor]:
    return {"sharpness": sharpness(image), **{f"grid_{period}": grid_peaks(image, period) for period in PERIODS}}
