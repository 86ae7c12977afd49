"""Folders in diffusers' layout: finds, checks and loads the weight files of the transformer and the VAE."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import some
from ..errors import InputError
from ..system.atomic import reason
from ..weights.lora import weight_shapes
from ..weights.reading import check_types, check_weights, is_finite, load_pickle, parse_json, read_tensors
from . import check_config_numbers, family_of, part_folders
from .record import Config, Family

CONFIG = "config.json"
_STEM = "diffusion_pytorch_model"
_VARIANTS = ("", "fp32", "fp16", "bf16")
"""Variants of the weights in order of preference, before any other."""


class _StrayIndexError(InputError):
    """An index file, all of whose weight files are missing."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a part."""

    files: tuple[Path, ...]
    variant: str
    """diffusers' name of the variant; "" for the default one."""
    safetensors: bool
    """False for PyTorch's ``.bin`` files."""


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files of one part; prefers safetensors to ``.bin``, and default weights to a variant such as fp16.

    An index file without any of its weight files is ignored if there are other weights.

    Raises:
        InputError: if there are no weights, or some files of an index are missing.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    strays: list[InputError] = []
    for suffix in ("safetensors", "bin"):
        found: dict[str, Path] = {}
        for name in names:
            if match := re.fullmatch(rf"{_STEM}(?:\.([\w-]+))?\.{suffix}", name):
                if "-of-" not in name:  # a shard
                    found.setdefault(match[1] or "", folder / name)
            elif match := re.fullmatch(rf"{_STEM}\.{suffix}(?:\.(\w+))?\.index(?:\.(\w+))?\.json", name):
                found[match[1] or match[2] or ""] = folder / name  # preferred to a single file, as in diffusers
        for variant in sorted(found, key=_preference):
            try:
                files = _shards(found[variant]) if found[variant].suffix == ".json" else (found[variant],)
            except _StrayIndexError as error:
                strays.append(error)
            else:
                return WeightFiles(files, variant, suffix == "safetensors")
    if strays:
        raise strays[0]
    if others := [name for name in names if name.lower().endswith(".gguf")]:
        raise InputError(
            f"{folder} has only quantised weights ({some(others)}): give the unquantised folder, with {_STEM}.safetensors"
        )
    raise InputError(f"{folder} has no weights: expected {_STEM}.safetensors, a variant of it, or {_STEM}.bin")


def _preference(variant: str) -> tuple[int, str]:
    return _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS), variant


def folder_family(path: Path) -> Family:
    """The family of a model folder, by the configurations in it.

    Raises:
        InputError: if there are none, or no family knows them.
    """
    configs = folder_configs(path)
    if not configs:
        raise InputError(f"{path} is not a model folder in diffusers' layout: expected transformer/{CONFIG} and vae/{CONFIG}")
    try:
        return family_of(configs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def folder_configs(path: Path) -> dict[str, Config]:
    """The configurations of a model folder by part, as far as it has them; ``InputError`` for what is none."""
    configs = {}
    for part in ("transformer", "vae"):
        for folder in part_folders(part):
            if (path / folder / CONFIG).exists():
                configs[part] = _read_config(path / folder / CONFIG)
    return configs


def part_folder(path: Path, part: str, family: Family) -> Path:
    """The folder of a part; for the autoencoder also ``path`` itself, where its files lie there."""
    folder = path / (family.parts[part].folder or part)
    return path if part == "vae" and not folder.is_dir() and (path / CONFIG).is_file() else folder


def folder_shapes(path: Path, part: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes of a model folder's "transformer" or "vae" by module name, from its configuration; no weight is read."""
    return weight_shapes(_empty_model(path, part))


def check_folder(path: Path, part: str) -> None:
    """Raise ``InputError`` unless the weight files of a model folder's part match its configuration."""
    expected = {name: tuple(tensor.shape) for name, tensor in _empty_model(path, part).state_dict().items()}
    folder = part_folder(path, part, folder_family(path))
    found = {}
    for file, tensors in _read(find_weights(folder)):
        check_weights(file, tensors)
        found |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise InputError(f"{folder}: weights that are missing, unexpected or of other shapes: {some(wrong)}")


def load_part(path: Path, part: str, dtype: torch.dtype, family: Family | None = None) -> Any:
    """Load the "transformer" or "vae" of a model folder in ``dtype``.

    Args:
        family: that it must be of; None for the folder's own.

    Raises:
        InputError: if it is missing, damaged or of another model family, or has weights that exceed the range of ``dtype``.
    """
    family = family or folder_family(path)
    folder = part_folder(path, part, family)
    _part_config(folder, part, family)
    weights = find_weights(folder)
    try:
        for file, tensors in _read(weights):
            check_types(file, tensors)
        model, report = family.parts[part].model_class().from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True,
            variant=weights.variant or None, use_safetensors=weights.safetensors,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError, ArithmeticError, LookupError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).strip()}") from error
    wrong = [f"{name} ({kind})" for kind in ("missing", "unexpected") for name in report[f"{kind}_keys"]]
    if wrong:
        raise InputError(f"{folder} does not match its configuration in {len(wrong)} weights: {some(wrong)}")
    beyond = [name for name, tensor in model.state_dict().items() if not is_finite(tensor)]
    if beyond:  # overflow of dtype, or damage: only now are the values read again
        for file, tensors in _read(weights):
            check_weights(file, tensors)
        raise InputError(f"{folder} has weights that exceed the range of {dtype} in {some(beyond)}: choose bf16 or fp32")
    return model


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = tuple(index.with_name(name) for name in sorted(set(names)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _StrayIndexError(f"{index} is not a valid index of weight files: download it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        kind = _StrayIndexError if len(missing) == len(files) else InputError
        raise kind(f"{index} lists missing files: {some(missing)}; download them, or remove the index")
    return files


def _read(weights: WeightFiles) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Each file with its tensors; those of a safetensors file stay on disk until they are used."""
    for file in weights.files:
        if weights.safetensors:
            yield file, read_tensors(file)[0]
            continue
        tensors = load_pickle(file)
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise InputError(f"{file} does not hold weights: expected tensors by name")
        yield file, tensors


def _empty_model(path: Path, part: str) -> Any:
    """A model without weights, on the meta device, from a folder's configuration."""
    family = folder_family(path)
    folder = part_folder(path, part, family)
    config = _part_config(folder, part, family)
    try:
        with torch.device("meta"):
            return family.parts[part].model_class().from_config(config)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{folder / CONFIG} is invalid: {error}") from error


def _part_config(folder: Path, part: str, family: Family) -> Config:
    """The configuration of a part, which must be the family's."""
    config, expected = _read_config(folder / CONFIG), family.parts[part]
    if config.get("_class_name") != expected.class_name:
        raise InputError(
            f"{folder / CONFIG} is for a {config.get('_class_name')}: expected {expected.class_name}, as in {family.title}"
        )
    if quantised := _quantisation(config):
        raise InputError(
            f"{folder / CONFIG} is for {quantised} weights, onto which LoRAs cannot be merged: give the unquantised folder, "
            "such as stabilityai/stable-diffusion-3-medium-diffusers; tsdsr bundle --merge with --eight-bit or --int8 makes it "
            "smaller"
        )
    try:
        check_config_numbers(expected, config, required=False)
    except ValueError as error:
        raise InputError(f"{folder / CONFIG} is invalid: {error}") from error
    return config


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """Words for the quantisation that a configuration names; None for unquantised weights.

    diffusers would ask to install a package for most of them, and then needs a GPU.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        return "quantised"
    bits = next((f", {bits} bits" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), "")
    return f"quantised ({settings.get('quant_method', 'by an unnamed method')}{bits})"


def _read_config(file: Path) -> Config:
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.parents[1]} is not a model folder in diffusers' layout: {file}: {reason(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a configuration: expected a JSON object")
    return config
