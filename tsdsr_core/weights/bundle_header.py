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
from .kinds import recognise_file
from .prompt import POOLED_KEY, TOKENS_KEY
from .reading import open_tensors, parse_json

VERSION = 4
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
_SIZES = {
    "transformer": {
        "patch_size": 16, "in_channels": 1024, "num_layers": 512, "attention_head_dim": 1024, "num_attention_heads": 1024,
        "caption_projection_dim": 2**16, "joint_attention_dim": 2**16, "pooled_projection_dim": 2**16,
        "pos_embed_max_size": 2**14,
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "layers_per_block": 64, "latent_channels": 1024, "norm_num_groups": 1024,
    },
}  # fmt: skip
"""Whole numbers that a configuration must have, and their maximum values."""
_FROM_ZERO = ("layers_per_block",)
"""Numbers that may be 0; the others are at least 1."""
_LEVELS, _WIDTH = 8, 2**14
"""Maximum number of an autoencoder's resolutions, and of the channels at one of them."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a file's tensors by key."""


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
        _check_shapes(path, description, shapes)
    return description


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
        for part in PARTS:
            try:
                check_config_numbers(part, description[f"{part}_config"])
            except ValueError as error:
                raise InputError(f"{part}_config {error}") from error
        _check_configs(description["transformer_config"], description["vae_config"])
    if "preview" in description and not _is_preview(description):
        raise InputError("preview: expected rows of 3 numbers, one row more than there are latent channels")


def check_config_numbers(part: str, config: Mapping[str, Any], required: bool = True) -> None:
    """Check the whole numbers of a "transformer" or "vae" configuration in diffusers' terms.

    Args:
        required: whether all of them must be present; if not, diffusers has defaults for missing ones.

    Raises:
        InputError: with the first invalid number.
    """
    for name, most in _SIZES[part].items():
        value, least = config.get(name), 0 if name in _FROM_ZERO else 1
        if (required or name in config) and (type(value) is not int or not least <= value <= most):
            raise InputError(f"{name} = {value!r}: expected a whole number from {least} to {most}")


def _check_configs(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    if transformer["in_channels"] != vae["latent_channels"]:
        raise InputError(
            f"the transformer has {transformer['in_channels']} channels, the VAE's latents {vae['latent_channels']}"
        )
    widths = vae.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= _LEVELS or not all(map(_is_width, widths)):
        raise InputError(
            f"vae_config block_out_channels = {widths!r}: expected up to {_LEVELS} whole numbers from 1 to {_WIDTH}"
        )
    scale, shift = vae.get("scaling_factor"), vae.get("shift_factor")
    if not is_bounded(scale) or scale <= 0:
        raise InputError(f"vae_config scaling_factor = {scale!r}: expected a number above 0")
    if shift is not None and not is_bounded(shift):
        raise InputError(f"vae_config shift_factor = {shift!r}: expected a number")


def _check_shapes(path: Path, description: Mapping[str, Any], shapes: Shapes) -> None:
    """Compare the configuration's main sizes with the tensors, before a model of these sizes is built."""
    transformer, vae = description["transformer_config"], description["vae_config"]
    hidden, patch = transformer["attention_head_dim"] * transformer["num_attention_heads"], transformer["patch_size"]
    expected: dict[str, tuple[int, ...]] = {
        "transformer.pos_embed.pos_embed": (1, transformer["pos_embed_max_size"] ** 2, hidden),
        "transformer.pos_embed.proj.weight": (hidden, transformer["in_channels"], patch, patch),
        "vae.decoder.conv_in.weight": (vae["block_out_channels"][-1], vae["latent_channels"], 3, 3),
        "vae.encoder.conv_in.weight": (vae["block_out_channels"][0], vae["in_channels"], 3, 3),
    }
    wrong = [f"{key} is {shapes.get(key, 'missing')}, expected {shape}" for key, shape in expected.items()
             if shapes.get(key) != shape]  # fmt: skip
    blocks, levels = (
        {match[1] for key in shapes if (match := re.match(pattern, key))}
        for pattern in (r"transformer\.transformer_blocks\.(\d+)\.", r"vae\.encoder\.down_blocks\.(\d+)\.")
    )
    if len(blocks) != transformer["num_layers"]:
        wrong.append(f"{len(blocks)} transformer blocks, expected {transformer['num_layers']}")
    if len(levels) > len(vae["block_out_channels"]):  # the last level may have no weights
        wrong.append(f"{len(levels)} levels of the VAE, expected {len(vae['block_out_channels'])}")
    if wrong:
        raise InputError(f"{path} does not match its configuration: {some(wrong)}")


def _is_preview(description: Mapping[str, Any]) -> bool:
    if description["kind"] != "merged":
        return False
    rows, channels = description["preview"], description["vae_config"]["latent_channels"]
    if not isinstance(rows, list) or len(rows) != channels + 1:
        return False
    return all(isinstance(row, list) and len(row) == 3 and all(map(is_bounded, row)) for row in rows)


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _WIDTH
