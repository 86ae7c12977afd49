"""The folder that ``tsdsr train prepare`` writes: one safetensors file for each crop, and an index.

``samples/NAME-N.safetensors`` holds crop N of image NAME and, as metadata, the settings and image it was made from:

- ``high`` uint8 ``(3, crop, crop)``;
- ``latent`` ``(C, h, w)``: the mode of the base VAE's posterior, unscaled;
- ``low_0`` ... uint8 ``(3, side, side)``: degraded versions with ``SURROUNDINGS`` pixels around the crop, so
  ``side = crop / scale + 16``;
- ``tokens`` ``(T, D)`` and ``pooled`` ``(P,)``: the caption's embeddings.

``prepared.json`` has ``version``, ``settings``, ``shapes`` (of latent, tokens and pooled) and ``files``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError
from ...system.atomic import reason, write_bytes, write_tensors
from ...weights.reading import open_tensors, parse_json
from .photos import shared_flags

INDEX = "prepared.json"
SAMPLES = "samples"
NULL_FILE, PROMPT_FILE = "null.safetensors", "prompt.safetensors"
VERSION = 1
SURROUNDINGS = 8
"""Low-quality pixels around a crop that are degraded with it, so that its border is like its inside."""
_METADATA_KEY = "tsdsr_prepared"
_MODEL_TENSORS = ("latent", "tokens", "pooled")
_AGAIN = "prepare the folder again"
_TYPES = {"str": (str,), "int": (int,), "bool": (bool,), "str | None": (str, type(None))}
"""Types allowed in JSON for each type annotation in ``Settings``."""


@dataclass(frozen=True)
class Settings:
    """The options a folder was prepared with; continuing it needs the same ones."""

    base: str
    """Path of the base model."""
    autoencoder: str
    """Fingerprint of its autoencoder (``roles.fingerprint``)."""
    crop: int
    crops: int
    """Maximum number of crops of an image."""
    seed: int
    degrade: str
    """Preset of the cached degradations; empty for none."""
    variants: int
    """Cached degradations of each crop; 0 for none."""
    scale: int
    """Scale of the cached degradations; 0 for none."""
    captions: bool
    caption_default: str | None
    dtype: str
    """Number type of latents and embeddings: "fp16" or "fp32"."""


def write_sample(path: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Path) -> None:
    """Write one crop of the image ``source``, all or nothing."""
    made_of = {"settings": asdict(settings), "source": str(source.resolve())}
    write_tensors(path, tensors, {_METADATA_KEY: json.dumps(made_of)})


def is_complete(path: Path, settings: Settings, source: Path) -> bool:
    """Whether ``path`` is a complete sample; only its header is read.

    Raises:
        InputError: if it was made with other settings or from another image, with the difference.
    """
    if not path.exists():
        return False
    try:
        with open_tensors(path) as file:
            made_of = parse_json((file.metadata() or {})[_METADATA_KEY])
        found, made_from = dict(made_of["settings"]), made_of["source"]
    except (ValueError, KeyError, TypeError):
        return False
    check_same(path, found, settings)
    if made_from != str(source.resolve()):
        raise InputError(f"{path} was prepared from {made_from}, not {source}: use another output folder")
    return True


def check_same(path: Path, found: Mapping[str, Any], settings: Settings) -> None:
    """Raise ``InputError`` unless the settings ``found`` in ``path`` equal ``settings``."""
    wanted = asdict(settings)
    other = [f"{name} = {found.get(name)!r}, now {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]]
    if other:
        raise InputError(f"{path} was prepared with {'; '.join(other)}: use the same options, or another folder")


def write_index(folder: Path, settings: Settings, files: Sequence[str]) -> None:
    """Write the index of the samples called ``files``, at least one; with it the folder is ready to use."""
    with open_tensors(folder / SAMPLES / files[0], _AGAIN) as sample:
        there = set(sample.keys())
        shapes = {name: sample.get_slice(name).get_shape() for name in _MODEL_TENSORS if name in there}
    index = {"version": VERSION, "settings": asdict(settings), "shapes": shapes, "files": list(files)}
    write_bytes(folder / INDEX, json.dumps(index, indent=1).encode())


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` is a prepared folder.

    Raises:
        InputError: if its preparation is not finished.
    """
    if (folder / INDEX).is_file():
        return True
    if any((folder / SAMPLES).glob("*.safetensors")):
        raise InputError(f"{folder} has {SAMPLES}/ but no {INDEX}: its preparation was interrupted; run it again to continue")
    return False


class Prepared:
    """Reads a prepared folder."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            InputError: if it is damaged, of a newer version or without samples.
        """
        self.folder = folder
        index = read_index(folder / INDEX)
        self.settings = Settings(**index["settings"])
        self.shapes: dict[str, list[int]] = index["shapes"]
        self.paths = [folder / SAMPLES / name for name in index["files"]]
        self.bad = shared_flags(len(self.paths))

    def read(self, position: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors called ``names`` of sample number ``position``, as stored.

        Raises:
            InputError: if the file is missing or damaged, with its name.
        """
        path = self.paths[position]
        with open_tensors(path, _AGAIN) as file:
            tensors = {name: file.get_tensor(name) for name in set(file.keys()).intersection(names)}
        wrong = [name for name in names if name not in tensors or not self._fits(name, tensors[name])]
        if wrong:
            raise InputError(f"{path}: {', '.join(wrong)} missing, or of another shape or type than in the index; {_AGAIN}")
        return tensors

    def _fits(self, name: str, tensor: Tensor) -> bool:
        return list(tensor.shape) == self._shape(name) and tensor.is_floating_point() == (name in _MODEL_TENSORS)

    def _shape(self, name: str) -> list[int]:
        if name in _MODEL_TENSORS:
            return self.shapes[name]
        settings = self.settings
        side = settings.crop if name == "high" else settings.crop // settings.scale + 2 * SURROUNDINGS
        return [3, side, side]


def read_index(path: Path) -> dict[str, Any]:
    """The index at ``path``: ``version``, ``settings``, ``shapes`` and ``files``.

    Raises:
        InputError: if it is damaged, of a newer version or without files, with its name.
    """
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {reason(error)}; {_AGAIN}") from error
    version = index.get("version") if isinstance(index, dict) else None
    if type(version) is int and version > VERSION:
        raise InputError(f"{path} is of version {version}, this program reads up to version {VERSION}: update the program")
    if version != VERSION or not (_are_settings(index.get("settings")) and _are_files(index.get("files"))):
        raise InputError(f"{path} is damaged: version, settings or files are missing or invalid; {_AGAIN}")
    wanted = _MODEL_TENSORS if index["settings"]["captions"] else _MODEL_TENSORS[:1]
    shapes = index.get("shapes")
    if not isinstance(shapes, dict) or not all(_is_shape(shapes.get(name)) for name in wanted):
        raise InputError(f"{path} is damaged: shapes of {', '.join(wanted)} are missing or invalid; {_AGAIN}")
    return index


def _are_settings(found: Any) -> bool:
    types = {field.name: _TYPES[str(field.type)] for field in fields(Settings)}
    return isinstance(found, dict) and found.keys() == types.keys() and all(type(found[n]) in types[n] for n in types)


def _are_files(found: Any) -> bool:
    return isinstance(found, list) and len(found) > 0 and all(isinstance(name, str) for name in found)


def _is_shape(found: Any) -> bool:
    return isinstance(found, list) and all(type(side) is int for side in found)
