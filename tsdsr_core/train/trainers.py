"""The three trainers: what one batch adds to the gradients, over one loop (``loop``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..colour import wavelet, wavelet_low
from ..flow import one_step, schedule
from ..system.precision import check_finite
from ..weights.prompt import Condition
from .config import Config
from .data.batch import Batch
from .data.randomness import generator_for
from .networks.roles import FAKE, STUDENT, TEACHER, Networks
from .objectives import losses
from .objectives.flat import flat_error
from .objectives.grid import periodic_error
from .objectives.perceptual import STRIDE, Distance, distance

Backward = Callable[[Tensor], None]
"""Adds a loss's gradients to those of the parameters."""
COARSE = 8
"""Side in pixels of the means that ``pretrain.coarse_weight`` compares."""
SHARPENED_LEVELS = 2
"""Of the a-trous wavelet, whose bands ``sharpened`` raises."""
NULL_SHARE = 0.1
"""Of the samples that a diffusion model sees without its prompt, so that guidance has something to lead away from."""


@dataclass(frozen=True)
class Group:
    """Parameters with an optimiser of their own."""

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float


class Trainer(Protocol):
    """What the loop runs."""

    networks: Networks

    @property
    def groups(self) -> Mapping[str, Group]:
        """By name; the first is what is exported."""
        ...

    def accumulate(self, batch: Batch, step: int, backward: Backward) -> dict[str, Tensor]:
        """Add the gradients of one batch of a step, counted from 0; returns losses by name."""
        ...

    def restore(self, low: Tensor) -> Tensor | None:
        """What the model makes of enlarged low-quality pictures ``(B, 3, H, W)`` in 0..1; None where it restores nothing."""
        ...


class TeacherTrainer:
    """A diffusion model of good pictures: ``psi``."""

    def __init__(self, networks: Networks, config: Config) -> None:
        self.networks = networks
        self.groups = {TEACHER: Group(networks.parameters(TEACHER), config.optimiser.learning_rate)}

    def accumulate(self, batch: Batch, step: int, backward: Backward) -> dict[str, Tensor]:
        """The flow-matching loss on good pictures."""
        z = latent_of(batch, self.networks)
        loss = diffusion_loss(self.networks, TEACHER, z, batch)
        self.networks.activate(TEACHER)
        backward(loss)
        return {"teacher": loss.detach()}

    def restore(self, low: Tensor) -> None:
        """A teacher restores nothing."""


class StudentTrainer:
    """The one-step restorer, and ``phi`` that follows its outputs."""

    def __init__(self, networks: Networks, config: Config, perceptual_weights: Path | None = None) -> None:
        self.networks, self.objective, self.steps = networks, config.objective, config.run.steps
        rates = config.optimiser
        self.groups = {STUDENT: Group(networks.parameters(STUDENT), rates.learning_rate)}
        self.distils = config.distils
        if self.distils:
            self.groups[FAKE] = Group(networks.parameters(FAKE), rates.fake_learning_rate)
        self.distance = _distance(networks, config, perceptual_weights)
        self.trajectory = config.objective.trajectory()
        self.schedule = schedule().to(networks.device)

    def accumulate(self, batch: Batch, step: int, backward: Backward) -> dict[str, Tensor]:
        """The student's loss, then that of the fake model (phi) on what the student made.

        With ``objective.fake_steps`` above 1 the student has a loss in one of so many steps only.
        """
        networks, objective = self.networks, self.objective
        if self.distils and step % objective.fake_steps:
            with torch.no_grad():
                z_hat = restored_latent(networks, batch.low)
            return {"fake": self._train_fake(z_hat, batch, backward)}
        z = latent_of(batch, networks)
        z_hat = restored_latent(networks, batch.low)
        parts = {"latent": objective.latent_weight * F.mse_loss(z_hat.float(), z.float())}
        parts |= self._pixel_terms(z_hat, batch, step)
        if self.distils:
            gradient = self._distribution_gradient(z_hat.detach(), z, batch)
            parts["distribution"] = objective.distribution_weight * losses.surrogate(z_hat, gradient)
        networks.activate(STUDENT)
        backward(torch.stack(list(parts.values())).sum())
        if self.distils:
            parts["fake"] = self._train_fake(z_hat.detach(), batch, backward)
        return {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def restore(self, low: Tensor) -> Tensor:
        """The one step, without the colour fix."""
        return _restored(self.networks, low)

    def _train_fake(self, z_hat: Tensor, batch: Batch, backward: Backward) -> Tensor:
        """Add the gradients of the fake model's diffusion loss on restored latents, at the levels where it is asked."""
        objective, levels = self.objective, None
        if objective.fake_levels == "queried":
            levels = batch.scheduled(objective.first_index, objective.last_index, self.schedule, f"{FAKE} level")
        loss = diffusion_loss(self.networks, FAKE, z_hat, batch, levels)
        self.networks.activate(FAKE)
        backward(loss)
        return loss.detach()

    def _pixel_terms(self, z_hat: Tensor, batch: Batch, step: int) -> dict[str, Tensor]:
        objective = self.objective
        first, last = objective.perceptual_weight, objective.perceptual_weight_end
        weight = first + (last - first) * step / self.steps
        if not (weight or objective.pixel_weight):
            return {}
        pixels = self.networks.decode(z_hat)
        if objective.wavelet_levels:
            pixels = wavelet(pixels, batch.low, objective.wavelet_levels)
        parts = {}
        if weight and self.distance:
            parts["perceptual"] = weight * self.distance(pixels, batch.high)
        if objective.pixel_weight:
            parts["pixel"] = objective.pixel_weight * (pixels - batch.high).abs().mean()
        return parts

    def _distribution_gradient(self, z_hat: Tensor, z: Tensor, batch: Batch) -> Tensor:
        objective = self.objective
        given = caption_of(batch, self.networks)
        null = self.networks.null.expanded(len(z))

        def denoiser(role: str) -> losses.Denoiser:
            def run(z_t: Tensor, sigma: Tensor, told: bool) -> Tensor:
                return self.networks.velocity(role, z_t, sigma, given if told else null)

            return losses.guided(run, objective.guidance)

        def gradient(z_hat: Tensor, z: Tensor, noise: Tensor) -> Tensor:
            return losses.distribution_gradient(
                z_hat, z, noise, batch.starts(self.trajectory), self.schedule, self.trajectory,
                denoiser(TEACHER), denoiser(FAKE), objective.vsd_part(), objective.as_scores,
            )  # fmt: skip

        noise = batch.noise(z, "distribution")
        if not objective.shifted_patches:
            return gradient(z_hat, z, noise)
        patch = int(self.networks.transformers[TEACHER].config["patch_size"])
        shifts = batch.shifts(patch)
        inner = (losses.cut(latent, shifts, patch) for latent in (z_hat, z, noise))
        return losses.put_back(gradient(*inner), shifts, patch)


class PretrainTrainer:
    """A small model end to end: encoder, transformer and decoder through the colour fix."""

    def __init__(self, networks: Networks, config: Config, perceptual_weights: Path | None = None) -> None:
        self.networks, self.settings = networks, config.pretrain
        self.distance = _distance(networks, config, perceptual_weights)
        self.groups = {STUDENT: Group(networks.parameters(STUDENT), config.optimiser.learning_rate)}
        table = networks.transformers[STUDENT].pos_embed
        self.table, self.positions = table, table.pos_embed.clone()

    def accumulate(self, batch: Batch, step: int, backward: Backward) -> dict[str, Tensor]:
        """L1 after and before the colour fix, what else has a weight; a share of the samples is restored by no step."""
        self._shift_positions(batch.seed, step)
        kept = batch.chosen(self.settings.reconstruction_share, "reconstruction")[:, None, None, None]
        source = torch.where(kept, batch.high, batch.low)
        with self.networks.autocast():
            z = restored_latent(self.networks, source, (~kept).to(source))
            output = self.networks.decode(z).float()
        fixed = wavelet(output, source, self.settings.wavelet_levels)
        target = torch.where(kept, batch.high, sharpened(batch.high, self.settings.sharpening))
        raw = (output - target).abs().mean()
        loss = (fixed - target).abs().mean()
        share = 0.0 if batch.guide is None else self.settings.guide_share
        if share and batch.guide is not None:
            loss = (1 - share) * loss + share * (fixed - torch.where(kept, batch.high, batch.guide)).abs().mean()
        parts = {"pixel": loss, "raw": self.settings.raw_weight * raw}
        if self.settings.coarse_weight:
            parts["coarse"] = self.settings.coarse_weight * F.avg_pool2d(fixed - target, COARSE).abs().mean()
        if self.settings.latent_weight:
            parts["latent"] = self.settings.latent_weight * self._latent_distance(z, batch.high)
        if self.distance:
            side = self.settings.perceptual_crop
            less = fixed.shape[2] - side if side else STRIDE
            shifts = batch.shifts(less)
            shown, real = (losses.cut(pixels, shifts, less) for pixels in (fixed, batch.high))
            parts["perceptual"] = self.settings.perceptual_weight * self.distance(shown, real)
        aim = batch.high if batch.guide is None else torch.where(kept, batch.high, batch.guide)
        if self.settings.grid_weight:
            parts["grid"] = self.settings.grid_weight * periodic_error(fixed, aim)
        if self.settings.flat_weight:
            parts["flat"] = self.settings.flat_weight * flat_error(fixed, aim, batch.high)
        backward(torch.stack(list(parts.values())).sum())
        return {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def restore(self, low: Tensor) -> Tensor:
        """The one step, without the colour fix."""
        self.table.pos_embed.copy_(self.positions)
        return _restored(self.networks, low)

    def _latent_distance(self, z: Tensor, high: Tensor) -> Tensor:
        with torch.no_grad(), self.networks.autocast():
            target = self.networks.encode(high, student=True).float()
        return ((z.float() - target).square().mean((0, 2, 3)) / target.var((0, 2, 3))).mean()

    def _shift_positions(self, seed: int, step: int) -> None:
        """Train each step at a random place of the position table, so that large tiles meet no unknown position."""
        grid = self.table.pos_embed_max_size
        reach = grid // 5
        shift = torch.randint(-reach, reach + 1, (2,), generator=generator_for(seed, step, "position")).tolist()
        self.table.pos_embed.copy_(self.positions.view(grid, grid, -1).roll(shift, (0, 1)).view_as(self.positions))


def _distance(networks: Networks, config: Config, weights: Path | None) -> Distance | None:
    return distance(config.perceptual, networks.device, weights) if config.perceptual else None


def _restored(networks: Networks, low: Tensor) -> Tensor:
    """The one step's image in 0..1; raises ``FloatingPointError`` where it is not finite, before the clamp hides that."""
    pixels = networks.decode(restored_latent(networks, low))
    return check_finite(pixels, "the restored image", "a lower learning rate or precision = 'fp32' may help").clamp(0, 1)


def restored_latent(networks: Networks, pixels: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Scaled latents after one step from pixels ``(B, 3, H, W)`` in 0..1; ``strength`` multiplies the velocity."""
    z = networks.encode(pixels, student=True)
    velocity = networks.velocity(STUDENT, z, z.new_ones(len(z)), networks.prompt.expanded(len(z)))
    return one_step(z, strength * velocity)


def sharpened(high: Tensor, share: float) -> Tensor:
    """A photograph ``(B, 3, H, W)`` in 0..1 whose waves of up to about 8 pixels are ``1 + share`` times as high.

    L1 alone is best off where waves that may lie here or there are flat, so its outputs are softer than photographs.  Sharper
    targets make up for that where the input says where the waves are, as in Real-ESRGAN (Wang et al. 2021, sec. 4).
    """
    return (high + share * (high - wavelet_low(high, SHARPENED_LEVELS))).clamp(0, 1) if share else high


def latent_of(batch: Batch, networks: Networks) -> Tensor:
    """Scaled latents of the good pictures: prepared ones, or encoded now."""
    if batch.latent is not None:
        return batch.latent * networks.scaling_factor
    with torch.no_grad():
        return networks.encode(batch.high, student=False)


def caption_of(batch: Batch, networks: Networks) -> Condition:
    """The samples' captions, or the fixed prompt for each."""
    return networks.prompt.expanded(len(batch.high)) if batch.caption is None else batch.caption


def diffusion_loss(networks: Networks, role: str, z: Tensor, batch: Batch, levels: Tensor | None = None) -> Tensor:
    """The flow-matching loss of a role's network on clean latents, some samples without their prompt.

    Args:
        levels: noise levels ``(B,)``; None draws logit-normal ones, as SD3 was trained.
    """
    dropped = batch.chosen(NULL_SHARE, f"{role} prompt")
    condition = caption_of(batch, networks).where(~dropped, networks.null.expanded(len(z)))
    return losses.flow_matching(
        lambda z_t, sigma: networks.velocity(role, z_t, sigma, condition), z, batch.noise(z, f"{role} noise"),
        batch.levels(f"{role} level") if levels is None else levels,
    )  # fmt: skip
