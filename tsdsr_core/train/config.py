"""Training configuration: a frozen dataclass read from TOML."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .degradations import PRESETS


@dataclass(frozen=True)
class SupervisedConfig:
    """Settings of the supervised one-step objective; the defaults are the built-in model's first phase."""

    steps: int = 20000
    """Number of optimiser steps."""
    decay_steps: int = 500
    """Steps at the end over which the learning rate falls linearly to zero."""
    warmup_steps: int = 100
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    batch: int = 8
    crop: int = 80
    """Side of a training crop in output pixels."""
    scale: int = 4
    reconstruction_share: float = 0.25
    """Share of a batch that trains the autoencoder alone: high quality in and out, no step."""
    presets: dict[str, float] = field(default_factory=lambda: {"light": 0.45, "medium": 0.45, "heavy": 0.1})
    synthetic_share: float = 0.15
    wavelet_levels: int = 4
    raw_weight: float = 0.1
    """Weight of the L1 distance before the colour fix; after it the weight is 1."""
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    save_every: int = 200
    seed: int = 0


def read_config(path: Path) -> SupervisedConfig:
    """Read and check a TOML file.

    Raises:
        ValueError: for an unknown key, a value of the wrong type or an impossible value, naming it.
    """
    with path.open("rb") as file:
        try:
            values = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
    known = {f.name: type(getattr(SupervisedConfig(), f.name)) for f in fields(SupervisedConfig)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}; known keys: {', '.join(sorted(known))}")
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            raise ValueError(f"{path}: {name} = {value!r} should be of type {known[name].__name__}")
    config = SupervisedConfig(**values)
    check(config)
    return config


def check(config: SupervisedConfig) -> None:
    """Raise ``ValueError`` for a setting that cannot be trained with."""
    unknown = sorted(set(config.presets) - set(PRESETS))
    weights = config.presets.values()
    if unknown or not all(isinstance(w, int | float) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"presets = {config.presets}: expected weights of at least 0 for some of {', '.join(PRESETS)}")
    multiple = math.lcm(8, config.scale)  # 8 pixels are a patch of the small model
    if config.crop % multiple or config.crop < 4 * config.scale:
        raise ValueError(f"crop = {config.crop}: expected a multiple of {multiple}, at least {4 * config.scale}")
    for name, value in asdict(config).items():
        if name in ("reconstruction_share", "synthetic_share", "ema_decay") and not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: expected a number from 0 to 1")
        if name in ("learning_rate", "clip_norm") and not value > 0:
            raise ValueError(f"{name} = {value}: expected a number above 0")
        if name in ("steps", "batch", "scale", "save_every", "wavelet_levels") and value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
