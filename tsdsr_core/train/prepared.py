"""The folder that ``prepare`` writes: one safetensors file for each crop, and an index.

``samples/NAME-N.safetensors`` holds crop N of picture NAME and, as metadata, the settings and picture it was made from:

- ``high`` uint8 ``(3, crop, crop)``;
- ``latent`` ``(C, h, w)``, the mode of the base VAE's posterior, unscaled;
- ``low_0`` ... uint8 ``(3, side, side)``: degraded versions, ``side = crop / scale + 16``, for they reach
  ``SURROUNDINGS`` pixels beyond the crop;
- ``tokens`` ``(T, D)`` and ``pooled`` ``(P,)``: the caption's embeddings.

``prepared.json`` has ``version``, ``settings``, ``shapes`` (of latent, tokens and pooled) and ``files``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import atomic_path, write_tensors
from .sources import shared_flags

INDEX = "prepared.json"
SAMPLES = "samples"
NULL_FILE, PROMPT_FILE = "null.safetensors", "prompt.safetensors"
VERSION = 1
SURROUNDINGS = 8
"""Low-quality pixels beyond each border of a crop that its degradation sees, or each crop would have false borders."""
_METADATA_KEY = "tsdsr_prepared"
_MODEL_TENSORS = ("latent", "tokens", "pooled")


@dataclass(frozen=True)
class Settings:
    """What a folder is prepared with; it is gone on with only by the same."""

    base: str
    """The base model's path."""
    autoencoder: str
    """Fingerprint of its autoencoder (``networks.fingerprint``)."""
    crop: int
    crops: int
    """Greatest number of crops of a picture."""
    seed: int
    degrade: str
    """Preset of the cached degradations; empty for none."""
    variants: int
    """Cached degradations of a crop; 0 for none."""
    scale: int
    """Of the cached degradations; 0 for none."""
    captions: bool
    caption_default: str | None
    dtype: str
    """Number type of latents and embeddings: "fp16" or "fp32"."""


def write_sample(path: Path, tensors: Mapping[str, Tensor], settings: Settings, source: Path) -> None:
    """Write one crop of the picture ``source``, all or nothing."""
    made_of = {"settings": asdict(settings), "source": str(source.resolve())}
    write_tensors(path, tensors, {_METADATA_KEY: json.dumps(made_of)})


def is_complete(path: Path, settings: Settings, source: Path) -> bool:
    """Whether ``path`` is a whole sample; only its header is read.

    Raises:
        ValueError: where it was made with other settings or of another picture, saying which.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            made_of = json.loads((file.metadata() or {})[_METADATA_KEY])
    except (SafetensorError, KeyError):
        return False
    check_same(path, made_of["settings"], settings)
    if made_of["source"] != str(source.resolve()):
        raise ValueError(f"{path} was prepared from {made_of['source']}, not {source}: prepare into another folder")
    return True


def check_same(path: Path, found: Mapping[str, Any], settings: Settings) -> None:
    """Raise ``ValueError`` unless the settings ``found`` in ``path`` are ``settings``."""
    wanted = asdict(settings)
    other = [f"{name} = {found.get(name)!r}, now {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]]
    if other:
        raise ValueError(f"{path} was prepared with {'; '.join(other)}: use the same options, or another folder")


def write_index(folder: Path, settings: Settings, files: Sequence[str]) -> None:
    """Write the index of the samples called ``files``, at least one; it makes the folder usable."""
    with safe_open(folder / SAMPLES / files[0], framework="pt") as sample:
        there = set(sample.keys())
        shapes = {name: sample.get_slice(name).get_shape() for name in _MODEL_TENSORS if name in there}
    index = {"version": VERSION, "settings": asdict(settings), "shapes": shapes, "files": list(files)}
    with atomic_path(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` is a prepared one.

    Raises:
        ValueError: where its preparation has not come to its end.
    """
    if (folder / INDEX).is_file():
        return True
    if any((folder / SAMPLES).glob("*.safetensors")):
        raise ValueError(f"{folder} has {SAMPLES}/ but no {INDEX}: its preparation was interrupted; run it again to go on")
    return False


class Prepared:
    """A prepared folder to read from."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            ValueError: for one that is damaged, of a newer version or without samples.
        """
        self.folder = folder
        index = read_index(folder / INDEX)
        self.settings = Settings(**index["settings"])
        self.shapes: dict[str, list[int]] = index["shapes"]
        self.paths = [folder / SAMPLES / name for name in index["files"]]
        self.bad = shared_flags(len(self.paths))

    def read(self, position: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors called ``names`` of sample number ``position``, as they are stored.

        Raises:
            ValueError: where the file is missing or damaged, naming it.
        """
        path = self.paths[position]
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a prepared sample: {error}") from error


def read_index(path: Path) -> dict[str, Any]:
    """The index at ``path``: ``version``, ``settings``, ``shapes`` and ``files``.

    Raises:
        ValueError: for one that is damaged, of a newer version or without files, naming it.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the folder again") from error
    version = index.get("version") if isinstance(index, dict) else None
    if type(version) is int and version > VERSION:
        raise ValueError(f"{path} is of version {version}, this program reads up to {VERSION}: update it")
    known = {field.name for field in fields(Settings)}
    if type(version) is not int or set(index.get("settings", ())) != known or not index.get("files") or "shapes" not in index:
        raise ValueError(f"{path} is damaged: version, settings, shapes or files are missing; prepare the folder again")
    return index
