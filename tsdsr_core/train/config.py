"""Training configuration: frozen dataclasses read from TOML, one table each."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import DEFAULTS
from ..flow import SCHEDULE_STEPS
from .dasm import Trajectory, plan
from .degradations import PRESETS

STAGES = ("pretrain", "teacher", "student")
OBJECTIVES = ("supervised", "vsd", "tsd", "tsd+dasm")
CHOICES = {
    "stage": STAGES, "trained": ("lora", "weights"), "name": OBJECTIVES, "perceptual": ("gradients", "lpips"),
    "schedule": ("cosine", "linear"), "precision": ("fp32", "bf16"),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What is trained on; the folders are arguments."""

    crop: int = 512
    """Side of a training crop in output pixels."""
    scale: int = 4
    presets: dict[str, float] = field(default_factory=lambda: {"realesrgan": 1.0})
    """Degradations and their weights."""
    synthetic_share: float = 0.0
    """Share of pictures that are drawn, 0..1."""
    candidates: int = 1
    """Crops of photographs from which one is drawn, those with more detail more often; prepared ones are taken as they come."""
    contrast: float = 1.0
    """Half of the crops get their contrast multiplied by a factor from 1 to this; prepared ones are taken as they come."""
    permute_channels: bool = False
    """Draw the order of red, green and blue of a crop; prepared ones are taken as they come."""
    captions: bool = False
    """Teacher and LoRA model see each picture's caption (``tsdsr train prepare --captions``), else the fixed prompt."""
    workers: int = 0
    """Processes that prepare batches beside the training; 0 prepares them in its own."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    trained: str = "lora"
    """lora: adapters on a base model. weights: a small model's own weights."""
    rank: int = 64
    layers: int = 2
    """Blocks of a small model's transformer, and its heads of 64 channels each."""
    layers_per_block: int = 0
    """Stage pretrain: residual blocks of each level of a small model's encoder; its decoder has one more. A base that has fewer
    gets more, which begin as nothing."""
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Objective:
    """The student's loss; the defaults are the paper's."""

    name: str = "tsd+dasm"
    """supervised: data terms alone. vsd: as in OSEDiff. tsd, tsd+dasm: as in TSD-SR."""
    vsd_share: float = 0.7
    """``lambda`` of TSD."""
    trajectory_steps: int = 4
    stride: int = 50
    later_weight: float = 0.3
    first_index: int = 20
    """Of the noise schedule's 1000, where trajectories may be."""
    last_index: int = 980
    guidance: float = 7.5
    distribution_weight: float = 1.0
    """Of VSD or TSD."""
    as_scores: bool = False
    """Target score matching compares scores, not velocities (``losses.with_the_score_of``); not published."""
    shifted_patches: bool = False
    """Score latents at random places of the transformer's grid of patches, so that the grid leaves no trace; not published."""
    latent_weight: float = 1.0
    pixel_weight: float = 0.0
    """Of the L1 distance in pixels."""
    perceptual: str = "lpips"
    perceptual_weight: float = 1.0
    perceptual_weight_end: float = 2.0
    """The weight rises to this on a line over the run."""
    wavelet_levels: int = 0
    """Of the colour fix that pixels pass before they are compared; 0 compares them as they are."""

    def vsd_part(self) -> float:
        """``lambda``, which is 1 where the objective is VSD."""
        return 1.0 if self.name == "vsd" else self.vsd_share

    def trajectory(self) -> Trajectory:
        """The levels that DASM visits; one where the objective does without."""
        steps = self.trajectory_steps if self.name == "tsd+dasm" else 1
        return plan(steps, self.stride, self.later_weight, self.first_index, self.last_index)


@dataclass(frozen=True)
class Pretrain:
    """The loss of a small model that is trained end to end."""

    reconstruction_share: float = 0.25
    """Share of a batch that trains the autoencoder alone: high quality in and out, no step."""
    wavelet_levels: int = 4
    raw_weight: float = 0.1
    """Weight of the L1 distance before the colour fix; after it the weight is 1."""
    coarse_weight: float = 0.0
    """Of the L1 distance between the means of 8x8 pixels after the colour fix."""
    sharpening: float = 0.0
    """Share by which the finest waves of the photograph grow before a restored output is compared with it."""
    latent_weight: float = 0.0
    """Of the distance between restored latents and those that the encoder makes of the photograph, in parts of the latter's
    variance: keeps one meaning for both, as the later stages want."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW and its learning rates."""

    learning_rate: float = 5e-6
    fake_learning_rate: float = 1e-6
    """Of the LoRA model."""
    beta2: float = 0.999
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    warmup_steps: int = 3000
    schedule: str = "cosine"
    """cosine: to zero, ``cycles`` times. linear: constant, then to zero over the last ``decay_steps``."""
    cycles: int = 1
    decay_steps: int = 0


@dataclass(frozen=True)
class Run:
    """How long and how."""

    steps: int = 100000
    """Number of optimiser steps."""
    batch: int = 1
    """Pictures at once in each process."""
    accumulate: int = 1
    """Batches for each step."""
    precision: str = "fp32"
    """bf16: of the transformers, and in stage "pretrain" of the autoencoder too."""
    ema_decay: float = 0.999
    """Of the averaged weights that are exported; 0 exports the last ones."""
    save_every: int = 500
    validate_every: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A whole run."""

    stage: str = "student"
    """pretrain: a small model end to end. teacher: a diffusion model of good pictures. student: the one-step restorer."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    pretrain: Pretrain = field(default_factory=Pretrain)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)

    @property
    def distils(self) -> bool:
        """Whether there is a teacher beside the student."""
        return self.stage == "student" and self.objective.name != "supervised"

    @property
    def wavelet_levels(self) -> int:
        """Of the colour fix that the stage is trained through; 0 for none."""
        return self.pretrain.wavelet_levels if self.stage == "pretrain" else self.objective.wavelet_levels


def read_config(path: Path) -> Config:
    """Read and check a TOML file.

    Raises:
        ValueError: for an unknown key, a value of the wrong type or an impossible value, naming it.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file that can be read: {error}") from error
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_dict(values: Mapping[str, Any]) -> Config:
    """The checked configuration of nested tables, as ``dataclasses.asdict`` gives them back.

    Raises:
        ValueError: as ``read_config``.
    """
    config = _table(Config, values, "")
    _check(config)
    return config


def differences(before: Config, after: Config) -> list[str]:
    """``TABLE.KEY BEFORE -> AFTER`` of every setting that differs."""
    old, new = asdict(before), asdict(after)
    found = [f"stage {before.stage} -> {after.stage}"] if before.stage != after.stage else []
    for table in (name for name, value in new.items() if isinstance(value, dict)):
        keys = (key for key, value in new[table].items() if old[table][key] != value)
        found += [f"{table}.{key} {old[table][key]} -> {new[table][key]}" for key in keys]
    return found


def _table(kind: Any, values: Mapping[str, Any], name: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    found = {}
    for key, value in values.items():
        where = f"{name}{key}"
        if key not in known:
            raise ValueError(f"unknown key {where}; known keys: {', '.join(sorted(f'{name}{other}' for other in known))}")
        default = getattr(kind(), key)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ValueError(f"{where} = {value!r}: expected a table [{where}]")
            found[key] = _table(type(default), value, f"{where}.")
            continue
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ValueError(f"{where} = {value!r}: expected a value of type {type(default).__name__}")
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{where} = {value!r}: expected one of {', '.join(CHOICES[key])}")
        found[key] = float(value) if type(default) is float else value
    return kind(**found)


_AT_LEAST_ONE = (
    "data.scale", "data.candidates", "model.rank", "optimiser.cycles", "run.steps", "run.batch", "run.accumulate",
    "run.save_every", "run.validate_every", "pretrain.wavelet_levels",
)  # fmt: skip
_POSITIVE = ("optimiser.learning_rate", "optimiser.fake_learning_rate", "optimiser.clip_norm")
_SHARES = (
    "data.synthetic_share", "objective.vsd_share", "pretrain.reconstruction_share", "run.ema_decay", "optimiser.beta2",
)  # fmt: skip
_NOT_NEGATIVE = (
    "data.workers", "model.layers_per_block", "objective.later_weight", "objective.guidance", "objective.distribution_weight",
    "objective.latent_weight", "objective.pixel_weight", "objective.perceptual_weight", "objective.perceptual_weight_end",
    "objective.wavelet_levels", "pretrain.raw_weight", "pretrain.coarse_weight", "pretrain.sharpening",
    "pretrain.latent_weight", "optimiser.weight_decay", "optimiser.warmup_steps", "optimiser.decay_steps",
)  # fmt: skip


def _check(config: Config) -> None:
    """Raise ``ValueError`` for a setting that cannot be trained with."""
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
                raise ValueError(f"{name} = {value}: expected {expected}")
    for name in ("objective", "pretrain"):
        levels, most = getattr(config, name).wavelet_levels, DEFAULTS["wavelet_levels"][1]
        if levels > most:
            raise ValueError(f"{name}.wavelet_levels = {levels}: expected at most {most}")
    _check_data(config.data)
    if config.stage == "pretrain" and config.model.trained != "weights":
        raise ValueError("stage = 'pretrain' trains a small model's own weights: set model.trained = 'weights'")
    if config.model.layers < 2:
        raise ValueError(f"model.layers = {config.model.layers}: expected at least 2, since the last block is of another form")
    if config.objective.last_index >= SCHEDULE_STEPS:
        raise ValueError(f"objective.last_index = {config.objective.last_index}: expected less than {SCHEDULE_STEPS}")
    first = config.objective.first_index
    if config.objective.as_scores and first < 1:
        raise ValueError(f"objective.first_index = {first}: expected at least 1 with as_scores, since level 0 is noise alone")
    config.objective.trajectory()


def _check_data(data: Data) -> None:
    if not 1 <= data.contrast < math.inf:
        raise ValueError(f"data.contrast = {data.contrast}: expected a number of at least 1")
    unknown = sorted(set(data.presets) - set(PRESETS))
    weights = data.presets.values()
    if unknown or not all(isinstance(w, int | float) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"data.presets = {data.presets}: expected weights of at least 0 for some of {', '.join(PRESETS)}")
    multiple = math.lcm(16, data.scale)  # 16 pixels are a patch of SD3's latents
    if data.crop % multiple or data.crop < 2 * multiple:
        raise ValueError(f"data.crop = {data.crop}: expected a multiple of {multiple}, at least {2 * multiple}")
