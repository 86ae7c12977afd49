"""Reads configurations from TOML files and checks their settings."""

from __future__ import annotations

import codecs
import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as _repr
from typing import Any

from ..errors import InputError
from ..families.bundle_header import DEFAULTS
from ..flow import SCHEDULE_STEPS
from ..system.atomic import reason
from .config import CHOICES, Config, DataSettings
from .data.degradations import PRESET_NAMES
from .objectives.perceptual import STRIDE

_LEAST, _MOST = -(2**63), 2**63 - 1
"""Of whole numbers: TOML promises no more, and larger ones overflow in torch."""


def read_config(path: Path) -> Config:
    """Read and check a TOML file.

    Raises:
        InputError: for an unknown key, a value of the wrong type or an impossible value, naming it.
    """
    try:
        data = path.read_bytes()
        marks_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as some Windows programs save text
        values = tomllib.loads(data.decode("utf-16" if marks_utf_16 else "utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a TOML file: {reason(error)}") from error
    try:
        return from_dict(values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build and check a configuration from nested tables; the inverse of ``dataclasses.asdict``.

    Raises:
        InputError: as ``read_config``.
    """
    config = _table(Config, values, "")
    _check(config)
    return config


_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: 'a table of numbers; with --set, as JSON: \'{"light": 0.5, "medium": 0.5}\'',
}


def _table(kind: Any, values: Mapping[str, Any], name: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for key, value in values.items():
        where = f"{name}{key}"
        if key not in known:
            raise InputError(f"unknown key {where}; known keys: {', '.join(sorted(f'{name}{other}' for other in known))}")
        default = getattr(kind(), key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"{where} = {_repr(value)}: expected a table [{where}]")
            found[key] = _table(type(default), value, f"{where}.")
            continue
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise InputError(f"{where} = {_repr(value)}: expected {_TYPES[type(default)]}")
        if type(value) is int and not _LEAST <= value <= _MOST:
            raise InputError(f"{where} = {_repr(value)}: expected a whole number from -2^63 to 2^63 - 1")
        if key in CHOICES and value not in CHOICES[key]:
            raise InputError(f"{where} = {_repr(value)}: expected one of {', '.join(CHOICES[key])}")
        found[key] = float(value) if type(default) is float else value
    return kind(**found)


_AT_LEAST_ONE = (
    "data.scale", "data.candidates", "model.rank", "objective.fake_steps", "objective.trajectory_steps", "objective.stride",
    "optimiser.cycles", "run.steps", "run.batch", "run.accumulate", "run.save_every", "run.validate_every",
    "pretrain.wavelet_levels",
)  # fmt: skip
_POSITIVE = ("optimiser.learning_rate", "optimiser.fake_learning_rate", "optimiser.clip_norm")
_SHARES = (
    "data.synthetic_share", "data.smaller_scales", "objective.vsd_share", "pretrain.reconstruction_share",
    "pretrain.guide_share", "run.ema_decay",
)  # fmt: skip
_NOT_NEGATIVE = (
    "data.workers", "model.layers_per_block", "objective.later_weight", "objective.guidance", "objective.distribution_weight",
    "objective.latent_weight", "objective.pixel_weight", "objective.perceptual_weight", "objective.perceptual_weight_end",
    "objective.wavelet_levels", "pretrain.raw_weight", "pretrain.coarse_weight", "pretrain.sharpening",
    "pretrain.latent_weight", "pretrain.perceptual_weight", "pretrain.grid_weight", "pretrain.flat_weight",
    "optimiser.weight_decay", "optimiser.warmup_steps", "optimiser.decay_steps",
)  # fmt: skip


def _check(config: Config) -> None:
    """Raise ``InputError`` for a value out of range or settings that contradict each other."""
    rules = (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_POSITIVE, lambda value: 0 < value < math.inf, "a number above 0"),
        (_SHARES, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "a number of at least 0"),
    )
    for names, holds, expected in rules:
        for name in names:
            table, key = name.split(".")
            value = getattr(getattr(config, table), key)
            if not holds(value):
                raise InputError(f"{name} = {value}: expected {expected}")
    for name in ("objective", "pretrain"):
        levels, most = getattr(config, name).wavelet_levels, DEFAULTS["wavelet_levels"][1]
        if levels > most:
            raise InputError(f"{name}.wavelet_levels = {levels}: expected at most {most}")
    _check_data(config.data)
    if config.stage == "pretrain" and config.model.trained != "weights":
        raise InputError("stage = 'pretrain' trains a small model's own weights: set model.trained = 'weights'")
    if config.stage == "pretrain" and config.perceptual and config.data.crop < 3 * STRIDE:
        raise InputError(f"data.crop = {config.data.crop}: expected at least {3 * STRIDE} with pretrain.perceptual_weight")
    part, most = config.pretrain.perceptual_crop, config.data.crop - STRIDE
    if config.stage == "pretrain" and config.perceptual and part and not 2 * STRIDE <= part <= most:
        raise InputError(f"pretrain.perceptual_crop = {part}: expected 0, or {2 * STRIDE} to {most} (data.crop less {STRIDE})")
    if not 0 <= config.optimiser.beta2 < 1:
        raise InputError(f"optimiser.beta2 = {config.optimiser.beta2}: expected a number from 0 to below 1")
    if config.model.layers < 2:
        raise InputError(
            f"model.layers = {config.model.layers}: expected at least 2, since the last block differs in structure"
        )
    if config.objective.last_index >= SCHEDULE_STEPS:
        raise InputError(f"objective.last_index = {config.objective.last_index}: expected less than {SCHEDULE_STEPS}")
    first = config.objective.first_index
    if config.objective.as_scores and first < 1:
        raise InputError(f"objective.first_index = {first}: expected at least 1 with as_scores, since index 0 is pure noise")
    config.objective.trajectory()


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MOST


def _check_data(data: DataSettings) -> None:
    if not 1 <= data.contrast < math.inf:
        raise InputError(f"data.contrast = {data.contrast}: expected a number of at least 1")
    unknown = sorted(set(data.presets) - set(PRESET_NAMES))
    weights = data.presets.values()
    if unknown or not all(_is_weight(w) for w in weights) or not sum(weights) > 0:
        raise InputError(f"data.presets = {data.presets}: expected weights of at least 0 for some of {', '.join(PRESET_NAMES)}")
    multiple = math.lcm(16, data.scale)  # 16 pixels are a patch of SD3's latents
    if data.crop % multiple or data.crop < 2 * multiple:
        raise InputError(f"data.crop = {data.crop}: expected a multiple of {multiple}, at least {2 * multiple}")
