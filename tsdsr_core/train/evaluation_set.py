"""The fixed evaluation set: centre crops of photographs and their degraded inputs, the same on every run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..images.files import Picture, read_header, read_picture, write_pictures
from ..images.jobs import collect
from ..system.atomic import check_target
from .data.degradations import degrade

SIDE = 512
SCALE = 4


def make_evaluation_set(photos: Path, out: Path, presets: Sequence[str]) -> list[str]:
    """Write ``out/hq/NAME.png`` (512x512) and, for each preset, ``out/lq-PRESET/NAME.png`` (128x128).

    Args:
        photos: folder of images of at least 512x512 pixels.
        presets: names of degradations (``degradations.PRESET_NAMES``).

    Returns:
        The errors of files that are not images or are damaged; all others are written, each with all of its inputs.

    Raises:
        InputError: for a folder without usable images, an image that is too small or would be overwritten, or two images of
            the same name; nothing is written then.
        OSError: if a file cannot be written, before any work where that is clear.
    """
    paths = collect([str(photos)]).paths
    failed: list[str] = []
    taken = _checked(paths, failed)
    _check_outputs(paths, [out / folder / f"{path.stem}.png" for path in taken for folder in ("hq", *map(_folder, presets))])
    for path in taken:
        try:
            high = centre_crop(read_picture(path).rgb[0])
        except InputError as error:
            failed.append(str(error))
            continue
        made = {out / "hq" / f"{path.stem}.png": Picture(high[None])}
        for preset in presets:
            name = f"{path.stem} {preset}"  # so that adding an image does not change the others
            seed = zlib.crc32(name.encode("utf-8", "surrogatepass"))
            low = degrade(high, SCALE, preset, torch.Generator().manual_seed(seed))
            made[out / _folder(preset) / f"{path.stem}.png"] = Picture(low[None])
        write_pictures(made)
    if len(failed) == len(paths):
        raise InputError(f"none of the {len(paths)} images can be read: {failed[0]}")
    return failed


def _folder(preset: str) -> str:
    return f"lq-{preset}"


def _check_outputs(photos: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise an error if an output cannot be written, or is one of the photographs, as if they are in ``out/hq`` already."""
    sources = {os.path.realpath(path) for path in photos}
    for path in outputs:
        check_target(path)
        if os.path.realpath(path) in sources:
            raise InputError(f"{path} would overwrite a photograph: choose another --out")


def _checked(paths: Sequence[Path], failed: list[str]) -> list[Path]:
    """The images among ``paths``, by their headers; adds the errors of the others to ``failed``."""
    taken: dict[str, Path] = {}
    for path in paths:
        try:
            header = read_header(path)
        except InputError as error:
            failed.append(str(error))
            continue
        if min(header.height, header.width) < SIDE:
            raise InputError(
                f"{path} has {header.width}x{header.height} pixels: an evaluation set needs at least {SIDE}x{SIDE}"
            )
        if (other := taken.setdefault(path.stem, path)) != path:
            raise InputError(f"{other} and {path} have the same name: rename or remove one of them")
    return list(taken.values())


def centre_crop(image: Tensor) -> Tensor:
    """The centre ``(3, 512, 512)`` of an image ``(3, H, W)``."""
    top, left = (image.shape[1] - SIDE) // 2, (image.shape[2] - SIDE) // 2
    return image[:, top : top + SIDE, left : left + SIDE]
