"""Training configuration: one frozen dataclass for each table of the TOML file; ``config_file`` reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .objectives.perceptual import DISTANCES
from .objectives.trajectory import Trajectory, plan

STAGES = ("pretrain", "teacher", "student")
OBJECTIVES = ("supervised", "vsd", "tsd", "tsd+dasm")
CHOICES = {
    "stage": STAGES, "trained": ("lora", "weights"), "name": OBJECTIVES, "perceptual": DISTANCES,
    "schedule": ("cosine", "linear"), "fake_levels": ("queried", "logit-normal"), "precision": ("fp32", "bf16"),
}  # fmt: skip


@dataclass(frozen=True)
class DataSettings:
    """Training images; the folders themselves are arguments of the command."""

    crop: int = 512
    """Side of a training crop, in pixels of the high-quality image."""
    scale: int = 4
    """How many times smaller the low-quality input is."""
    presets: dict[str, float] = field(default_factory=lambda: {"realesrgan": 1.0})
    """Degradation presets and how often each is drawn, as relative weights."""
    synthetic_share: float = 0.0
    """Share of synthetic images among the samples, 0..1."""
    candidates: int = 1
    """Number of crops to choose each training crop from; crops with more detail are more likely. Not for prepared folders."""
    contrast: float = 1.0
    """Maximum contrast gain: half of the crops get a random gain from 1 to this. Not for prepared folders."""
    smaller_scales: float = 0.0
    """Share of samples with a lower scale, 0..1: a random smaller divisor of ``scale``, 1 included."""
    permute_channels: bool = False
    """Shuffle red, green and blue of each crop. Not for prepared folders."""
    captions: bool = False
    """Use each image's caption for teacher and fake model (``tsdsr train prepare --captions``); false: the fixed prompt."""
    workers: int = 0
    """Processes that prepare batches in parallel; 0 prepares them in the training process."""


@dataclass(frozen=True)
class ModelSettings:
    """Which weights are trained."""

    trained: str = "lora"
    """lora: adapters on a base model. weights: all weights of a small model."""
    rank: int = 64
    """Rank of the adapters."""
    layers: int = 2
    """Number of blocks of a small model's transformer; it has as many attention heads, of 64 channels each."""
    layers_per_block: int = 0
    """Stage pretrain: residual blocks at each level of a small model's encoder; the decoder has one more. A base with fewer
    is deepened with blocks that start as the identity."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The student's loss; the defaults are the paper's."""

    name: str = "tsd+dasm"
    """supervised: data terms only. vsd: as in OSEDiff. tsd, tsd+dasm: as in TSD-SR."""
    vsd_share: float = 0.7
    """``lambda`` of TSD: the share of VSD, 0..1; target score matching has the rest."""
    trajectory_steps: int = 4
    """Number of noise levels that DASM visits."""
    stride: int = 50
    """Distance between two of them, in indices of the noise schedule."""
    later_weight: float = 0.3
    """Weight of each level after the first, which has weight 1."""
    first_index: int = 20
    """First index of the noise schedule (0..999) that a trajectory may visit."""
    last_index: int = 980
    """Last index of the noise schedule that a trajectory may visit."""
    guidance: float = 7.5
    """Classifier-free guidance of the teacher and of the fake model; 1 = none."""
    fake_levels: str = "queried"
    """Noise levels at which the fake model is trained. queried: uniform over the indices where the objective evaluates it.
    logit-normal: as SD3 was trained."""
    fake_steps: int = 1
    """Training steps of the fake model per step of the student. Above 1, the student is trained in one of so many steps."""
    distribution_weight: float = 1.0
    """Weight of the VSD or TSD term."""
    as_scores: bool = True
    """true: target score matching compares scores, which is the paper's residual of noise predictions. false: it compares
    velocities, as the published script does (see ``losses.with_the_score_of``)."""
    shifted_patches: bool = False
    """Shift the latents by a random part of a transformer patch before they are scored, so that the patch grid leaves no
    pattern. Not part of the published method."""
    latent_weight: float = 1.0
    """Weight of the mean squared error in latents."""
    pixel_weight: float = 0.0
    """Weight of the L1 distance in pixels."""
    perceptual: str = "lpips"
    """Perceptual distance. gradients: image gradients, no network. lpips: LPIPS with VGG. lpips-alex: LPIPS with AlexNet.
    dists: DISTS."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance at the first step."""
    perceptual_weight_end: float = 2.0
    """Its weight at the last step; in between it changes linearly."""
    wavelet_levels: int = 0
    """Levels of the wavelet colour fix applied before pixels are compared; 0 = no colour fix."""

    def vsd_part(self) -> float:
        """``lambda``: ``vsd_share``, or 1 for the objective ``vsd``."""
        return 1.0 if self.name == "vsd" else self.vsd_share

    def trajectory(self) -> Trajectory:
        """The noise levels that DASM visits; a single one for objectives without DASM."""
        steps = self.trajectory_steps if self.name == "tsd+dasm" else 1
        return plan(steps, self.stride, self.later_weight, self.first_index, self.last_index)


@dataclass(frozen=True)
class PretrainSettings:
    """The loss of stage pretrain, which trains a small model end to end."""

    reconstruction_share: float = 0.25
    """Share of the samples that train only the autoencoder, 0..1: high quality in and out, without the step."""
    wavelet_levels: int = 4
    """Levels of the wavelet colour fix that the model is trained through."""
    raw_weight: float = 0.1
    """Weight of the L1 distance before the colour fix; the L1 distance after it has weight 1."""
    coarse_weight: float = 0.0
    """Weight of the L1 distance between means of 8x8 pixels, after the colour fix."""
    guide_share: float = 0.0
    """Share of the guide in the L1 target, 0..1 (see ``data.guided``); the photograph has the rest."""
    sharpening: float = 0.0
    """How much the target is sharpened: its finest detail is amplified by 1 + this."""
    latent_weight: float = 0.0
    """Weight of the distance between restored latents and the encoder's latents of the photograph, relative to the variance
    of the latter. Keeps both in one latent space, which the later stages need."""
    perceptual: str = "lpips"
    """Perceptual distance, as ``objective.perceptual``."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance after the colour fix. Crops are shifted at random against the network's stride, so that
    it leaves no pattern."""
    perceptual_crop: int = 0
    """Side in pixels of the random part of each crop that the perceptual distance sees, to save time; 0: all but 16 pixels."""
    grid_weight: float = 0.0
    """Weight of the penalty on errors that repeat with the model's own grid (``objectives.grid``)."""
    flat_weight: float = 0.0
    """Weight of the penalty on fine texture in flat areas (``objectives.flat``)."""


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW and its learning rates."""

    learning_rate: float = 5e-6
    """Learning rate of the student, or of whatever else the stage trains."""
    fake_learning_rate: float = 1e-6
    """Learning rate of the fake model."""
    beta2: float = 0.999
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    """Maximum norm of the gradient; larger ones are scaled down to it."""
    warmup_steps: int = 3000
    """Steps over which the learning rates rise linearly to their full value."""
    schedule: str = "cosine"
    """cosine: falls to zero, ``cycles`` times. linear: constant, then falls to zero over the last ``decay_steps``."""
    cycles: int = 1
    decay_steps: int = 0


@dataclass(frozen=True)
class RunSettings:
    """Length, batch size, precision and saving of a run."""

    steps: int = 100000
    """Number of optimiser steps."""
    batch: int = 1
    """Batch size of each process."""
    accumulate: int = 1
    """Number of batches whose gradients are accumulated for one step."""
    precision: str = "fp32"
    """bf16: mixed precision in the transformers, and in stage pretrain also in the autoencoder."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is exported; 0 exports the latest weights."""
    save_every: int = 500
    """Steps between checkpoints."""
    validate_every: int = 500
    """Steps between validations."""
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    stage: str = "student"
    """pretrain: a small model end to end. teacher: a diffusion model of good images. student: the one-step restorer."""
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    run: RunSettings = field(default_factory=RunSettings)

    @property
    def distils(self) -> bool:
        """Whether the student learns from a teacher."""
        return self.stage == "student" and self.objective.name != "supervised"

    @property
    def perceptual(self) -> str | None:
        """Name of the perceptual distance that the stage uses; None where its weight is 0."""
        if self.stage == "pretrain":
            return self.pretrain.perceptual if self.pretrain.perceptual_weight else None
        weighs = self.objective.perceptual_weight or self.objective.perceptual_weight_end
        return self.objective.perceptual if self.stage == "student" and weighs else None

    @property
    def wavelet_levels(self) -> int:
        """Levels of the wavelet colour fix that the stage is trained through; 0 for none."""
        return self.pretrain.wavelet_levels if self.stage == "pretrain" else self.objective.wavelet_levels


def differences(before: Config, after: Config) -> list[str]:
    """The settings that differ, each as the text ``TABLE.KEY BEFORE -> AFTER``."""
    old, new = asdict(before), asdict(after)
    found = [f"stage {before.stage} -> {after.stage}"] if before.stage != after.stage else []
    for table in (name for name, value in new.items() if isinstance(value, dict)):
        keys = (key for key, value in new[table].items() if old[table][key] != value)
        found += [f"{table}.{key} {old[table][key]} -> {new[table][key]}" for key in keys]
    return found
