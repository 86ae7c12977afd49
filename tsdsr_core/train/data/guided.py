"""Samples with a guide: the result of another restorer, used as a second target next to the photograph.

A photograph has detail that its low-quality input does not determine, so a model trained only on photographs learns their
average, which is soft.  The result of a deterministic restorer is determined by the input and can be learned.

The folder holds ``*.safetensors`` files, each with any number of samples: uint8 ``high`` and ``guide`` ``(N, 3, crop, crop)``
and ``low`` ``(N, 3, side, side)``, with ``side = crop / scale + 2 * SURROUNDINGS`` as in ``prepared``.  The metadata entry
``tsdsr_guided`` holds JSON with ``version``, ``crop`` and ``scale``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ...errors import InputError
from ...pipeline import bicubic
from ...system.atomic import reason, write_tensors
from ...weights.reading import open_tensors, parse_json
from .photos import shared_flags
from .prepared import SURROUNDINGS

METADATA_KEY = "tsdsr_guided"
VERSION = 1
_AGAIN = "make it again"


def write_guided(path: Path, tensors: Mapping[str, Tensor], crop: int, scale: int) -> None:
    """Write a file of samples ``high``, ``low`` and ``guide``, all or nothing."""
    write_tensors(path, tensors, {METADATA_KEY: json.dumps({"version": VERSION, "crop": crop, "scale": scale})})


def is_guided(folder: Path) -> bool:
    """Whether ``folder`` holds samples with guides, according to the first file that can be read."""
    if not folder.is_dir():
        return False
    for path in sorted(folder.glob("*.safetensors")):
        try:
            return _entry(path) is not None
        except InputError:
            continue
    return False


class Guided:
    """A folder of samples with guides."""

    def __init__(self, folder: Path) -> None:
        """List the files.

        Raises:
            InputError: if none has valid metadata, for example because it is of a newer version.
        """
        self.folder = folder
        self.paths = sorted(folder.glob("*.safetensors"))
        self.bad = shared_flags(len(self.paths))
        self.crop, self.scale = _first_description(self.paths)

    def read(self, position: int, crop: int, generator: Generator) -> Tensor:
        """Read a random sample of file number ``position``, cropped at random.

        Args:
            crop: side of the crop in pixels, a multiple of ``scale`` and at most the folder's.

        Returns:
            ``low`` enlarged, ``high`` and ``guide``, stacked: ``(3, 3, crop, crop)`` in 0..1.

        Raises:
            InputError: if the file is missing or damaged, with its name.
        """
        path = self.paths[position]
        with open_tensors(path, _AGAIN) as file:
            number = int(torch.randint(self._count(path, file), (), generator=generator))
            low, high, guide = (file.get_slice(name)[number].float() / 255 for name in ("low", "high", "guide"))
        margin = SURROUNDINGS * self.scale
        side = self.crop + 2 * margin
        low = bicubic(low[None], (side, side))[0, :, margin : margin + self.crop, margin : margin + self.crop]
        room = (self.crop - crop) // self.scale + 1
        top, left = (self.scale * place for place in torch.randint(room, (2,), generator=generator).tolist())
        return torch.stack((low, high, guide))[..., top : top + crop, left : left + crop]

    def _count(self, path: Path, file: Any) -> int:
        """Number of samples in an open file; raises ``InputError`` if they do not match the folder's description."""
        low = self.crop // self.scale + 2 * SURROUNDINGS
        sides = {"high": self.crop, "low": low, "guide": self.crop}
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        shapes = {name: found[name].get_shape() for name in sides if name in found and found[name].get_dtype() == "U8"}
        count = (shapes.get("high") or [0])[0]
        if count < 1 or shapes != {name: [count, 3, side, side] for name, side in sides.items()}:
            raise InputError(
                f"{path} has uint8 tensors of {shapes}: expected high and guide of (N, 3, {self.crop}, {self.crop}) and low of "
                f"(N, 3, {low}, {low}), N at least 1; {_AGAIN}"
            )
        return count


def _first_description(paths: Sequence[Path]) -> tuple[int, int]:
    """``crop`` and ``scale`` of the first file with valid metadata."""
    errors: list[InputError] = []
    for path in paths:
        try:
            return _description(path)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _description(path: Path) -> tuple[int, int]:
    text = _entry(path) or ""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path} has damaged metadata in {METADATA_KEY}: {reason(error)}; {_AGAIN}") from error
    version = found.get("version") if isinstance(found, dict) else None
    if type(version) is int and version > VERSION:
        raise InputError(f"{path} has samples of version {version}, this program reads version {VERSION}: update the program")
    crop, scale = (found.get(name) if version == VERSION else None for name in ("crop", "scale"))
    if type(crop) is not int or type(scale) is not int or not 1 <= scale <= crop or crop % scale:
        raise InputError(
            f"{path} has {METADATA_KEY} = {text[:80]} in its metadata: expected version {VERSION}, and a crop that is a "
            f"multiple of scale; {_AGAIN}"
        )
    return crop, scale


def _entry(path: Path) -> str | None:
    """The text of the metadata entry; None if the file has none."""
    with open_tensors(path, _AGAIN) as file:
        return (file.metadata() or {}).get(METADATA_KEY)
