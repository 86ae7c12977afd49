"""The TSD-SR pipeline (Dong et al., CVPR 2025, fig. 2) over callables.

``x_L -> bicubic -> z_L = s E(x) -> v(z_L, t = 1000) -> z_H = z_L - v -> D(z_H / s) -> colour fix -> x_H``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import colour, official
from .checks import check_choice, check_number
from .errors import InputError
from .flow import one_step
from .image_size import PROCESS_SIZE, PROCESS_SIZE_RANGE, SCALE_RANGE, Size, SizePlan, plan_size
from .system.memory import ImageDevice
from .system.precision import check_finite
from .tiles.blend import Velocity, velocity_in_memory
from .tiles.memory import TileMemory
from .tiles.plan import MIN_TILE, OVERLAP, TILE, Tiling, choose_tiling

STRENGTH_RANGE = (0.0, 2.0)
_ADVICE = "run the model in fp32 (--dtype fp32; in ComfyUI --fp32-unet or vae_precision fp32), and check that the LoRA fits it"
"""Where values are not finite."""

GROUP_PIXELS = 1 << 23
"""Pixels of the images that go through a stage together: enough that a model which leaves the device between stages is not
loaded for each of many small images, and few enough that their latents take little memory beside the results."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are "encode", "step", "decode" and "colour"."""


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
    context_tokens: int = 0
    """Tokens that each tile costs besides its own, such as a prompt's."""
    memory: TileMemory = field(default_factory=TileMemory)
    """Chooses side and batch of the tiles where the options do not."""
    check_memory: Callable[[int, int], None] = lambda height, width: None
    """Raises ``MemoryError`` where ``encode`` or ``decode`` would for pixels of a height and width."""
    image_device: ImageDevice = field(default_factory=ImageDevice)
    """Where images are enlarged, resized and colour-corrected."""


@dataclass(frozen=True)
class Options:
    """What a user chooses; the defaults are the published settings."""

    scale: float = 4.0
    colour_fix: str = "wavelet"
    wavelet_levels: int = colour.WAVELET_LEVELS
    """From 1 to 10."""
    strength: float = 1.0
    recipe: str = "default"
    tile: int | None = None
    """Side in latent cells, at least 16; None for 64 to 80, or less if the model supports less or memory is limited."""
    tile_overlap: int = OVERLAP
    """Minimum overlap in latent cells, at most three quarters of the tile."""
    tile_batch: int | None = None
    """None for as many as fit into memory."""
    process_size: int = PROCESS_SIZE
    """A result whose shorter side has fewer pixels is worked on at this size, 0 to 4096; 0 for never."""

    def __post_init__(self) -> None:
        check_choice("recipe", self.recipe, RECIPES)
        check_choice("colour fix", self.colour_fix, colour.METHODS)
        check_number("scale", self.scale, *SCALE_RANGE)
        if self.recipe == "official" and self.scale != int(self.scale):
            raise InputError(f"scale {self.scale}: the official recipe needs a whole number")
        colour.check_levels(self.wavelet_levels)
        check_number("strength", self.strength, *STRENGTH_RANGE)
        if self.tile is not None:
            check_number("tile", self.tile, MIN_TILE, whole=True)
        check_number("tile overlap", self.tile_overlap, 0, whole=True)
        if self.tile_batch is not None:
            check_number("tile batch", self.tile_batch, 1, whole=True)
        check_number("process size", self.process_size, *PROCESS_SIZE_RANGE, whole=True)

    def tiling(self, patch: int, longest_side: int | None, context_tokens: int, memory: TileMemory) -> Tiling:
        """The tiling for a model of a patch size that sees ``longest_side`` latent cells; longer tiles are cut to that."""
        official = self.recipe == "official"
        affordable = TILE if official else memory.side()
        return choose_tiling(
            self.tile, self.tile_overlap, patch, longest_side, affordable, self.tile_batch, official, context_tokens
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The steps in which the improved and the published procedure differ."""

    sizes: Callable[[Size, float, int, int], SizePlan]
    enlarge: Callable[[Tensor, Size], Tensor]
    """Image in 0..1 and a (height, width) -> what is encoded, in 0..1."""
    match_input: Callable[[Tensor, Tensor, Size, Options], Tensor]


def _quiet(stage: str, done: int, total: int) -> None:
    """The progress callback of those who do not watch."""


@dataclass(frozen=True)
class Stages:
    """The three stages of the pipeline in which diffusers and ComfyUI differ; latents are unscaled."""

    encode: Callable[[Tensor], Tensor]
    """One image ``(1, 3, H, W)`` in -1..1 -> latents ``(1, C, h, w)``."""
    step: Callable[[Tensor], Tensor]
    """Latents of several images ``(B, C, h, w)`` -> the same after the one step, in tiles where they are large."""
    decode: Callable[[Tensor], Tensor]
    """Latents of one image -> its pixels in about -1..1."""
    image_device: ImageDevice = field(default_factory=ImageDevice)
    """Where the rest is done; ``encode`` and ``decode`` get tensors on that device, and may leave their results there."""


def restore(image: Tensor, model: Model, options: Options, progress: Progress = _quiet) -> Tensor:
    """Restore and enlarge a batch of images; each image is on its own.

    Args:
        image: ``(B, 3, H, W)`` in 0..1, any size from 1x1, where the model's functions take it.
        progress: told of each finished image (encode, decode, colour) and tile batch (step).

    Returns:
        ``(B, 3, scale H, scale W)`` in 0..1 on the device of ``image``, the sides to the nearest pixel, halves up.

    Raises:
        InputError: for an impossible option or a non-finite input, before any work.
        MemoryError: where an image of this size does not fit into memory, before any work.
        FloatingPointError: where a result of the model is not finite, naming the part.
    """
    check_image(image)
    stages = stages_of(model, options, progress)
    size = RECIPES[options.recipe].sizes(
        (image.shape[2], image.shape[3]), options.scale, model.vae_factor * model.patch, options.process_size
    )
    model.check_memory(*size.padded)
    return torch.cat([each.to(image.device) for each in run_stages(image, size, stages, options, progress)])


def run_stages(
    images: Tensor, size: SizePlan, stages: Stages, options: Options, progress: Progress = _quiet
) -> Iterator[Tensor]:
    """The pipeline: yields the restored images ``(1, 3, *size.target)`` in 0..1, one by one, on the device of
    ``stages.image_device`` if they fit there.

    Memory does not grow with the batch: images go through the stages in groups of ``GROUP_PIXELS``, through the autoencoder
    singly; the step takes the tiles of a group together.
    """
    recipe = RECIPES[options.recipe]

    def match_input(restored: Tensor, image: Tensor) -> Tensor:
        return recipe.match_input(restored, image, size.target, options)

    for index, restored in enumerate(restored_images(images, size, stages, recipe.enlarge, progress)):
        yield stages.image_device.run(*size.padded, match_input, restored, images[index : index + 1])
        progress("colour", index + 1, len(images))  # after it was taken: until then an accelerator may not have done it


def restored_images(
    images: Tensor, size: SizePlan, stages: Stages, enlarge: Callable[[Tensor, Size], Tensor], progress: Progress = _quiet
) -> Iterator[Tensor]:
    """What the stages make of ``images``: each ``(1, 3, *size.work)`` in 0..1, before the colour fix."""
    count, together = len(images), max(1, GROUP_PIXELS // (size.padded[0] * size.padded[1]))

    def encode(image: Tensor) -> Tensor:
        return stages.encode(to_pixels(image, size, enlarge))

    def decode(latent: Tensor) -> Tensor:
        return from_pixels(check_finite(stages.decode(latent), "the result of the VAE decoder", _ADVICE), size)

    for start in range(0, count, together):
        encoded = []
        for image in images[start : start + together].split(1):
            latents = stages.image_device.run(*size.padded, encode, image)
            encoded.append(latents.to(encoded[0].device) if encoded else latents)  # memory may have run out in between
            progress("encode", start + len(encoded), count)
        latents = check_finite(torch.cat(encoded), "the result of the VAE encoder", _ADVICE)
        del encoded
        latents = check_finite(stages.step(latents), "the result of the step", _ADVICE)
        for index, latent in enumerate(latents.split(1), start):
            restored = stages.image_device.run(*size.padded, decode, latent)
            progress("decode", index + 1, count)
            yield restored


def stages_of(model: Model, options: Options, progress: Progress = _quiet) -> Stages:
    """The stages of the library's model; raises ``InputError`` for tiles that do not suit it."""
    tiling = tiling_of(model, options)

    def step(latents: Tensor) -> Tensor:
        z = model.scaling_factor * latents
        velocity = velocity_in_memory(
            model.velocity, z, tiling, model.memory, lambda done, total, _: progress("step", done, total)
        )  # fmt: skip
        return one_step(z, velocity, options.strength) / model.scaling_factor

    return Stages(model.encode, step, model.decode, model.image_device)


def tiling_of(model: Model, options: Options) -> Tiling:
    """The tiling of ``options`` for ``model``; raises ``InputError`` where they do not suit it."""
    if options.tile is not None and model.longest_side is not None and options.tile > model.longest_side:
        raise InputError(f"tile {options.tile} is above the {model.longest_side} latent cells that this model supports")
    return options.tiling(model.patch, model.longest_side, model.context_tokens, model.memory)


def bicubic(image: Tensor, size: Size) -> Tensor:
    """``image`` at ``size`` (height, width): bicubic, clamped to 0..1; anti-aliased only where it shrinks."""
    if image.shape[2:] == size:
        return image.clamp(0, 1)
    shrinks = size[0] < image.shape[2] or size[1] < image.shape[3]
    if shrinks and image.device.type not in ("cpu", "cuda"):  # others may lack the kernel
        return bicubic(image.cpu(), size).to(image.device)
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
    """Raise ``InputError`` unless ``image`` is a finite float batch ``(B, 3, H, W)``."""
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
        raise InputError(f"image of shape {tuple(image.shape)} and {image.dtype}: expected float (B, 3, H, W), not empty")
    if not torch.isfinite(image).all():
        raise InputError("the image has NaN or infinite pixels: expected values in 0..1")


def match_input(restored: Tensor, image: Tensor, target: Size, options: Options) -> Tensor:
    """Resize to the target and give it the colours of ``image``; tensors ``(B, 3, H, W)`` in 0..1 in and out."""
    restored = bicubic(restored, target)
    reference = bicubic(image, target)
    return colour.match_colour(restored, reference, options.colour_fix, options.wavelet_levels).clamp_(0, 1)


def _match_official(restored: Tensor, image: Tensor, target: Size, options: Options) -> Tensor:
    return official.match_published(restored, image, target, options.colour_fix, options.wavelet_levels)


RECIPES = {
    "default": Recipe(plan_size, bicubic, match_input),
    "official": Recipe(official.plan_published_size, official.enlarge, _match_official),
}
