"""The fixed evaluation set: centre crops of photographs and their degraded inputs, the same on every run."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..image_io import Picture, read_header, read_picture, write_picture
from ..jobs import collect
from .degradations import degrade

SIDE = 512
SCALE = 4


def make_evaluation_set(photos: Path, out: Path, presets: Sequence[str]) -> None:
    """Write ``out/hq/NAME.png`` (512x512) and, for each preset, ``out/lq-PRESET/NAME.png`` (128x128).

    Args:
        photos: folder of pictures of at least 512x512 pixels.

    Raises:
        ValueError: for a folder without pictures, a picture that is too small, or two of one name; nothing is written then.
    """
    paths = collect([str(photos)]).paths
    _check(paths)
    for path in paths:
        high = centre_crop(read_picture(path).rgb[0])
        write_picture(out / "hq" / f"{path.stem}.png", Picture(high[None]))
        for preset in presets:
            seed = zlib.crc32(f"{path.stem} {preset}".encode())  # by name: adding a picture leaves the others as they were
            low = degrade(high, SCALE, preset, torch.Generator().manual_seed(seed))
            write_picture(out / f"lq-{preset}" / f"{path.stem}.png", Picture(low[None]))


def _check(paths: Sequence[Path]) -> None:
    taken: dict[str, Path] = {}
    for path in paths:
        header = read_header(path)
        if min(header.height, header.width) < SIDE:
            raise ValueError(f"{path} has {header.width}x{header.height} pixels: evaluation needs at least {SIDE}x{SIDE}")
        if (other := taken.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} have the same name: leave out one of them")


def centre_crop(image: Tensor) -> Tensor:
    """The middle 512x512 of ``(3, H, W)``."""
    top, left = (image.shape[1] - SIDE) // 2, (image.shape[2] - SIDE) // 2
    return image[:, top : top + SIDE, left : left + SIDE]
