"""The metadata of a bundle, read and checked from the file's header before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import is_bounded, some
from ..colour import WAVELET_LEVELS_RANGE
from ..errors import InputError
from ..image_size import PROCESS_SIZE_RANGE
from ..system.atomic import no_file, reason
from ..weights.kinds import recognise_file
from ..weights.prompt import POOLED_KEY, TOKENS_KEY
from ..weights.reading import open_tensors, parse_json
from . import check_config_numbers, family_of
from .record import Family, Shapes

VERSION = 5
METADATA_KEY = "tsdsr_bundle"
KINDS = ("lora", "merged")
WRONG_KIND = {
    "lora": "this bundle holds merged weights, not LoRAs: load it as the model, without a LoRA",
    "merged": "this bundle holds only LoRAs: load Stable Diffusion 3 as the model and the bundle as the LoRA",
}
"""Messages by the kind that was expected."""
DEFAULTS = {"process_size": PROCESS_SIZE_RANGE, "wavelet_levels": WAVELET_LEVELS_RANGE}
"""Options that a bundle may set, all whole numbers, and their ranges."""
FLAGS = ("folded", "eight_bit", "int8")
"""Boolean entries that bundles of merged weights may have."""
PARTS = ("transformer", "vae")


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a safetensors file with bundle metadata; False for any other file."""
    try:
        return METADATA_KEY in _header(path)[0]
    except ValueError:
        return False


def read_description(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check the JSON metadata of a bundle, without reading its tensors.

    Args:
        kind: "lora" or "merged" to accept only that kind.

    Raises:
        InputError: for a missing, damaged or unknown file, a newer version, invalid metadata, or the wrong kind.
    """
    other = recognise_file(path) if path.is_file() and not is_bundle(path) else None
    if other:
        raise InputError(f"{path} is not a TSD-SR bundle but {other.name}: {other.use}")
    header, shapes = _header(path)
    if METADATA_KEY not in header:
        raise InputError(f"{path} is not a TSD-SR bundle (no {METADATA_KEY!r} metadata): make one with tsdsr bundle")
    try:
        description = parse_json(header[METADATA_KEY])
    except ValueError as error:
        raise InputError(f"{path} has damaged bundle metadata: {reason(error)}") from error
    version = description.get("version") if isinstance(description, dict) else None
    if type(version) is not int or version < 1:
        raise InputError(f"{path} has damaged bundle metadata: no version")
    if version > VERSION:
        raise InputError(f"{path} is a bundle of version {version}, this program reads up to version {VERSION}: update it")
    found = description.get("kind")
    if found not in KINDS:
        raise InputError(f"{path} is a bundle of kind {found!r}: expected one of {', '.join(KINDS)}")
    try:
        _check(description)
    except ValueError as error:
        raise InputError(f"{path} has damaged bundle metadata: {error}; download or make it again") from error
    if kind not in (None, found):
        raise InputError(f"{path}: {WRONG_KIND[kind]}")
    if {re.sub(r"\..+", ".", key) for key in shapes} != {TOKENS_KEY, POOLED_KEY, *(f"{part}." for part in PARTS)}:
        raise InputError(
            f"{path} is damaged: expected prompt embeddings, a transformer, a VAE and nothing else; download or make it again"
        )
    if found == "merged":
        wrong = described_family(description).check_weights(stored_configs(description), shapes)
        if wrong:
            raise InputError(f"{path} does not match its configuration: {some(wrong)}")
    return description


def stored_configs(description: Mapping[str, Any]) -> dict[str, Any]:
    """The configurations by part that a bundle of merged weights has."""
    return {part: description[f"{part}_config"] for part in PARTS}


def described_family(description: Mapping[str, Any]) -> Family:
    """The family of a bundle of merged weights; raises ``InputError`` where no family knows its configurations."""
    return family_of(stored_configs(description))


def _header(path: Path) -> tuple[dict[str, str], Shapes]:
    """The metadata, and the shapes of the tensors."""
    if not path.is_file():
        raise InputError(f"{path} {no_file(path)}")
    with open_tensors(path) as file:
        return file.metadata(), {key: file.shape(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping


def _check(description: Mapping[str, Any]) -> None:
    kind = description["kind"]
    for name in ["defaults", "notes"] + [f"{part}_config" for part in PARTS if kind == "merged"]:
        if not isinstance(description.get(name), dict):
            raise InputError(f"{name} is missing")
    for name, value in description["defaults"].items():
        low, high = DEFAULTS.get(name, (1, 0))
        if type(value) is not int or not low <= value <= high:
            raise InputError(f"default {name} = {value!r}")
    for name, value in description["notes"].items():
        if not isinstance(value, str):
            raise InputError(f"note {name} = {value!r}: expected text")
    for name in FLAGS:
        value = description.get(name, False)
        if type(value) is not bool or (value and kind != "merged"):
            raise InputError(f"{name} = {value!r} in a bundle of kind {kind}")
    if description.get("eight_bit") and description.get("int8"):
        raise InputError("eight_bit and int8 exclude each other")
    if kind == "merged":
        configs = stored_configs(description)
        family = family_of(configs)
        for part in PARTS:
            try:
                check_config_numbers(family.parts[part], configs[part])
            except ValueError as error:
                raise InputError(f"{part}_config {error}") from error
        family.check_configs(configs)
    if "preview" in description and not _is_preview(description):
        raise InputError("preview: expected rows of 3 numbers, one row more than there are latent channels")


def _is_preview(description: Mapping[str, Any]) -> bool:
    if description["kind"] != "merged":
        return False
    rows, channels = description["preview"], description["vae_config"]["latent_channels"]
    if not isinstance(rows, list) or len(rows) != channels + 1:
        return False
    return all(isinstance(row, list) and len(row) == 3 and all(map(is_bounded, row)) for row in rows)
