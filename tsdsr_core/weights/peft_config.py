"""PEFT's ``adapter_config.json``, and which of the LoRA files beside it it describes.

PEFT writes it beside ``adapter_model.safetensors``, and it alone says how strong that LoRA is.  People rename the LoRA file,
and keep several of them in one folder, so the name does not tell whose the configuration is.  What tells is its content:

- ``adapter_model.safetensors`` is described by it in any case;
- another file is, if the configuration targets all of its modules and gives the rank that each of them has;
- a file none of whose modules is targeted is not;
- in all other cases it belongs to another file of the folder that it describes; without one, it contradicts the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..system.atomic import reason
from .lora_alpha import FactorShapes, parse_settings, rank_of
from .lora_keys import PREFIXES, factor_shapes, target_of
from .reading import SUFFIXES, tensor_shapes

log = logging.getLogger("tsdsr")

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ALL_LINEAR = "all-linear"


def find_peft_config(path: Path) -> Path | None:
    """The configuration beside a LoRA file, or beside the file that the link ``path`` leads to; None if there is none."""
    candidates = (path.with_name(PEFT_CONFIG), path.resolve().with_name(PEFT_CONFIG))
    return next((config for config in candidates if config.is_file()), None)


def read_peft_config(path: Path, shapes: FactorShapes, has_alpha: bool) -> str | None:
    """The text of the configuration that describes the LoRA file ``path``; None if there is none, or it is another file's.

    Args:
        shapes: of the file's down factors by module name.
        has_alpha: whether the file itself says how strong it is; if so, a configuration that contradicts it is another file's.

    Raises:
        InputError: if it cannot be read, or contradicts the file and describes no other one.
    """
    config = find_peft_config(path)
    if config is None:
        return None
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{config} cannot be read: {reason(error)}") from error
    if PEFT_FILE in (path.name, path.resolve().name):
        return text
    try:
        settings = parse_settings(text)
        difference = _difference(settings, shapes)
    except ValueError as error:
        if has_alpha:
            return None
        raise InputError(f"{config}: {error}") from error
    if difference is None:
        _warn_of_others(config, path, settings, shapes)
        return text
    if has_alpha or not any(_is_targeted(settings, module) for module in shapes) or any(_described(config, path, settings)):
        return None
    raise InputError(
        f"the {PEFT_CONFIG} beside it is of another LoRA ({difference}), so its strength is unknown: put its own there, or "
        "move it to a folder without one"
    )


def _difference(settings: Mapping[str, Any], shapes: FactorShapes) -> str | None:
    """In what the configuration differs from a file with factors of these shapes; None if it describes the file."""
    if str(settings.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        return f"of type {settings['peft_type']}"
    foreign = next((module for module in shapes if not _is_targeted(settings, module)), None)
    if foreign is not None:
        return f"it does not target {foreign}"
    odd = next((module for module, shape in shapes.items() if shape[:1] != (rank_of(settings, module),)), None)
    return None if odd is None else f"rank {rank_of(settings, odd):g} for {odd}, whose tensor has the shape {shapes[odd]}"


def _is_targeted(settings: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt ``module`` by ``target_modules``: a pattern for the whole name, or names or ends of names."""
    targets = settings.get("target_modules")
    names = [module, *(prefix + module for prefix in PREFIXES)]  # as the model was called in training
    if targets is None or targets == _ALL_LINEAR:
        return True
    if isinstance(targets, str):
        try:
            return any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise InputError(f"target_modules = {targets!r}: expected a regular expression") from error
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"target_modules = {targets!r}: expected text or a list of texts")
    return any(name == target or name.endswith(f".{target}") for name in names for target in targets)


def _described(config: Path, path: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Path, FactorShapes]]:
    """LoRA files in the configuration's folder, other than ``path``, that it describes; only headers are read."""
    for other in sorted(config.parent.iterdir()):
        if other.name == path.name or other.suffix.lower() not in SUFFIXES or not other.is_file():
            continue
        try:
            shapes = factor_shapes(tensor_shapes(other))
            if shapes and _difference(settings, shapes) is None:
                yield other, shapes
        except ValueError:  # a damaged file has no say
            continue


def _warn_of_others(config: Path, path: Path, settings: Mapping[str, Any], shapes: FactorShapes) -> None:
    """Say so if the configuration describes a LoRA of the other part, too: PEFT writes one for each."""
    parts = set(map(target_of, shapes))
    for other, found in _described(config, path, settings):
        if set(map(target_of, found)) != parts:
            log.warning(
                "%s describes both %s and %s, and is used for both: if they were trained apart, put each into a folder of its "
                "own with its own %s", config, path.name, other.name, PEFT_CONFIG,
            )  # fmt: skip
            return
