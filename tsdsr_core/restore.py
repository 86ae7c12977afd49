"""The TSD-SR pipeline (Dong et al., CVPR 2025, fig. 2) over callables.

``x_L -> bicubic -> z_L = s E(x) -> v(z_L, t = 1000) -> z_H = z_L - v -> D(z_H / s) -> colour fix -> x_H``
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import colour, official
from .flow import one_step
from .geometry import PROCESS_SIZE, SCALE_RANGE, Size, SizePlan, plan_size
from .memory import TileMemory
from .tile_blend import Cutting, Velocity, centred_window, fitting_velocity, official_window
from .tile_plan import OVERLAP, STRETCH, TILE, TilePlan, TileSettings, even_tiles, official_tiles

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are "encode", "step" and "decode"."""


@dataclass(frozen=True)
class Model:
    """A one-step restorer as three functions and its geometry."""

    encode: Callable[[Tensor], Tensor]
    """Pixels ``(B, 3, H, W)`` in -1..1 -> unscaled latents ``(B, C, H / vae_factor, W / vae_factor)``."""
    velocity: Velocity
    """Scaled latents -> velocity at t = 1000 under the model's fixed prompt, same shape."""
    decode: Callable[[Tensor], Tensor]
    """Unscaled latents -> pixels in about -1..1."""
    scaling_factor: float
    """SD3's 1.5305; its shift factor is not used, since the published LoRAs were trained without it."""
    vae_factor: int = 8
    patch: int = 2
    longest_side: int | None = None
    """Longest latent side that the transformer's position table covers."""
    memory: TileMemory = field(default_factory=TileMemory)
    """Chooses side and batch of the tiles where the options do not."""


@dataclass(frozen=True)
class Options:
    """What a user chooses; the defaults are the published settings."""

    scale: float = 4.0
    colour_fix: str = "wavelet"
    wavelet_levels: int = colour.WAVELET_LEVELS
    strength: float = 1.0
    recipe: str = "default"
    tile: int | None = None
    """Side in latent cells; None for about the published 64, or less where memory is short."""
    tile_overlap: int = OVERLAP
    tile_batch: int | None = None
    """None for as many as fit into memory."""
    process_size: int = PROCESS_SIZE

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}: expected one of {', '.join(RECIPES)}")
        if self.colour_fix not in colour.METHODS:
            raise ValueError(f"unknown colour fix {self.colour_fix!r}: expected one of {', '.join(colour.METHODS)}")
        low, high = SCALE_RANGE
        if not low <= self.scale <= high:  # also false for NaN
            raise ValueError(f"scale {self.scale}: expected a number from {low:g} to {high:g}")
        if self.recipe == "official" and self.scale != int(self.scale):
            raise ValueError(f"scale {self.scale}: the official recipe needs a whole number")
        if not 0 <= self.strength <= 2:
            raise ValueError(f"strength {self.strength}: expected a number from 0 to 2")
        if self.tile_batch is not None and self.tile_batch < 1:
            raise ValueError(f"tile batch {self.tile_batch}: expected at least 1")


@dataclass(frozen=True)
class Recipe:
    """The steps in which the improved and the published procedure differ."""

    sizes: Callable[[Size, float, int, int], SizePlan]
    tiles: Callable[[int, int, TileSettings], TilePlan]
    window: Callable[[int, int], Tensor]
    enlarge: Callable[[Tensor, Size], Tensor]
    """Image in 0..1 and a (height, width) -> what is encoded, in 0..1."""
    finish: Callable[[Tensor, Tensor, Size, Options], Tensor]


def _quiet(stage: str, done: int, total: int) -> None:
    """The progress callback of those who do not watch."""


def restore(image: Tensor, model: Model, options: Options, progress: Progress = _quiet) -> Tensor:
    """Restore and enlarge a batch of images; each image is on its own.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, any size from 1x1, where the model's functions take it.
        progress: told of each finished image (encode, decode) and tile batch (step).

    Returns:
        ``(B, 3, scale H, scale W)`` in 0..1, the sides to the nearest pixel, halves up.

    Raises:
        ValueError: for an impossible option or a non-finite input, before any work.
        FloatingPointError: if the result is not finite.
    """
    check_image(image)
    recipe = RECIPES[options.recipe]
    size = recipe.sizes((image.shape[2], image.shape[3]), options.scale, model.vae_factor * model.patch, options.process_size)
    restored = restore_at(image, size, model, options, progress)
    if not torch.isfinite(restored).all():
        raise FloatingPointError("the result is not finite; try --dtype fp32, and check that the LoRA fits the model")
    return recipe.finish(restored, image, size.target, options)


def restore_at(image: Tensor, size: SizePlan, model: Model, options: Options, progress: Progress = _quiet) -> Tensor:
    """The restored batch at its working size ``(B, 3, *size.work)`` in 0..1, before the colour fix."""
    x = to_pixels(image, size, RECIPES[options.recipe].enlarge)
    z = model.scaling_factor * _one_by_one(model.encode, x, "encode", progress)
    z = one_step(z, predict_velocity(z, model, options, progress), options.strength)
    y = _one_by_one(model.decode, z / model.scaling_factor, "decode", progress)
    return from_pixels(y, size)


def predict_velocity(z: Tensor, model: Model, options: Options, progress: Progress) -> Tensor:
    """Velocity of scaled latents ``(B, C, h, w)``, in tiles where they are large."""
    recipe = RECIPES[options.recipe]
    cutting = Cutting(tile_settings(model, options), options.tile_batch, recipe.tiles, recipe.window)
    return fitting_velocity(model.velocity, z, cutting, model.memory, lambda done, total, _: progress("step", done, total))


def tile_settings(model: Model, options: Options) -> TileSettings:
    """The tile settings of ``options`` for ``model``; raises ``ValueError`` where they do not suit it."""
    side = min(TILE, model.longest_side or TILE) if options.tile is None else options.tile
    if options.tile is not None or options.recipe == "official":
        return TileSettings(side, options.tile_overlap, model.patch, model.longest_side)
    settings = TileSettings(side, options.tile_overlap, model.patch, model.longest_side, STRETCH)
    return settings.with_tile(min(side, model.memory.side()))


def bicubic(image: Tensor, size: Size) -> Tensor:
    """``image`` at ``size`` (height, width): bicubic, clamped to 0..1; anti-aliased only where it shrinks."""
    if image.shape[2:] == size:
        return image.clamp(0, 1)
    shrinks = size[0] < image.shape[2] or size[1] < image.shape[3]
    return F.interpolate(image, size, mode="bicubic", align_corners=False, antialias=shrinks).clamp(0, 1)


def pad_to(image: Tensor, size: Size) -> Tensor:
    """Extend ``image`` to the right and below by reflection, or by its last row where it is too small for that."""
    bottom, right = size[0] - image.shape[2], size[1] - image.shape[3]
    for padding, length in (((0, 0, 0, bottom), image.shape[2]), ((0, right, 0, 0), image.shape[3])):
        if any(padding):
            image = F.pad(image, padding, mode="reflect" if max(padding) < length else "replicate")
    return image


def to_pixels(image: Tensor, size: SizePlan, enlarge: Callable[[Tensor, Size], Tensor] = bicubic) -> Tensor:
    """``image`` in 0..1 as the encoder takes it: enlarged and padded to ``size.padded``, in -1..1."""
    return pad_to(enlarge(image, size.work), size.padded) * 2 - 1


def from_pixels(pixels: Tensor, size: SizePlan) -> Tensor:
    """What the decoder gives, cropped to ``size.work`` and in 0..1."""
    return (pixels[:, :, : size.work[0], : size.work[1]] / 2 + 0.5).clamp(0, 1)


def check_image(image: Tensor) -> None:
    """Raise ``ValueError`` unless ``image`` is a finite float batch ``(B, 3, H, W)``."""
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f"image of shape {tuple(image.shape)} and {image.dtype}: expected float (B, 3, H, W), not empty")
    if not torch.isfinite(image).all():
        raise ValueError("the image has NaN or infinite pixels: expected values in 0..1")


def _one_by_one(function: Callable[[Tensor], Tensor], batch: Tensor, stage: str, progress: Progress) -> Tensor:
    """Images go through the autoencoder singly: its peak memory then does not grow with the batch."""
    results = []
    for index in range(len(batch)):
        results.append(function(batch[index : index + 1]))
        progress(stage, index + 1, len(batch))
    return torch.cat(results)


def finish(restored: Tensor, image: Tensor, target: Size, options: Options) -> Tensor:
    """Resize to the target and give it the colours of ``image``; tensors ``(B, 3, H, W)`` in 0..1 in and out."""
    restored = bicubic(restored, target)
    reference = bicubic(image, target)
    return colour.match_colour(restored, reference, options.colour_fix, options.wavelet_levels).clamp(0, 1)


def _finish_official(restored: Tensor, image: Tensor, target: Size, options: Options) -> Tensor:
    return official.finish(restored, image, target, options.colour_fix, options.wavelet_levels)


RECIPES = {
    "default": Recipe(plan_size, even_tiles, centred_window, bicubic, finish),
    "official": Recipe(official.plan_size, official_tiles, official_window, official.enlarge, _finish_official),
}
