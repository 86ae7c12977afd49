"""All in one: a picture in, a restored and larger picture out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tsdsr_core.geometry import PROCESS_SIZE, SCALE_RANGE, Size, SizePlan, plan_target, target_size
from ..tsdsr_core.restore import Options, bicubic, finish, from_pixels, to_pixels
from . import inputs
from .host import models, running, sampling
from .host import vae as host_vae
from .host.sampling import StepSettings
from .host.schema import field, schema

_LARGEST = 16384
_MOST_PIXELS = _LARGEST**2
_BY_FACTOR, _LONGER_SIDE, _SHORTER_SIDE, _WIDTH, _HEIGHT = "scale by", "longer side", "shorter side", "width", "height"


class Upscale(io.ComfyNode):
    """TSDSRUpscale: encode, step, decode and colour fix for each image of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side = field(io.Int, "pixels", default=2048, min=16, max=_LARGEST, tooltip="Wanted length in pixels.")
        return schema(
            "TSDSRUpscale",
            "TSD-SR Upscale",
            description="Restores and enlarges pictures in one step with TSD-SR. Any size, batches, alpha; tiles, batch sizes "
            "and memory are chosen by themselves.",
            search_aliases=["tsdsr", "tsd-sr", "upscale", "super resolution", "restore photo", "denoise photo", "enlarge"],
            essentials_category="Image Tools",
            inputs=[
                field(io.Image, "image", tooltip="One picture or a batch, of any size, with or without alpha."),
                field(io.Model, "model", tooltip="SD3 with the TSD-SR LoRA, or a TSD-SR checkpoint's model."),
                field(io.Vae, "vae", tooltip="The VAE from the same loader as the model."),
                field(io.Conditioning, "conditioning", tooltip="The prompt of TSD-SR, or any prompt of SD3."),
                field(
                    io.DynamicCombo, "size",
                    options=[
                        io.DynamicCombo.Option(_BY_FACTOR, [
                            field(
                                io.Float, "factor", default=4.0, min=SCALE_RANGE[0], max=SCALE_RANGE[1], step=0.05,
                                tooltip="4 is what TSD-SR was trained for.",
                            )
                        ]),
                        *(io.DynamicCombo.Option(name, [side]) for name in (_LONGER_SIDE, _SHORTER_SIDE, _WIDTH, _HEIGHT)),
                    ],
                    tooltip="The size of the result; the picture keeps its proportions.",
                ),
                inputs.strength(),
                inputs.colour_fix("the input", levels=0, automatic=" 0 takes what suits the model."),
                *inputs.tiling(),
                inputs.vae_tile(),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Any, model: Any, vae: Any, conditioning: Any, size: dict[str, Any], strength: float,
        color_fix: dict[str, Any], tile: int, tile_overlap: int, tile_batch: int, vae_tile: int = 0,
    ) -> io.NodeOutput:  # fmt: skip
        rgb, alpha = inputs.to_core(image)
        defaults = {"process_size": PROCESS_SIZE, **models.defaults_of(model)}
        if color_fix.get("wavelet_levels"):
            defaults["wavelet_levels"] = color_fix["wavelet_levels"]
        restorer = Restorer(
            model, vae, conditioning, inputs.step_settings(strength, tile, tile_overlap, tile_batch),
            Options(colour_fix=color_fix["color_fix"], **defaults), _target((rgb.shape[2], rgb.shape[3]), size),
            vae_tile or None,
        )  # fmt: skip
        sampling.check_model(model)
        sampling.check_conditioning(conditioning, model)
        progress = running.Progress(len(rgb) * restorer.units())
        result = rgb.new_empty(len(rgb), *restorer.target, 3 if alpha is None else 4)
        for index, picture in enumerate(restorer.run(rgb, progress)):
            larger = None if alpha is None else bicubic(alpha[index : index + 1], restorer.target)
            result[index : index + 1] = inputs.to_host(picture, larger)
        return io.NodeOutput(result)


@dataclass(frozen=True)
class Restorer:
    """The pipeline of ``tsdsr_core.restore`` over host objects."""

    model: Any
    vae: Any
    conditioning: Any
    settings: StepSettings
    options: Options
    target: Size
    vae_tile: int | None

    @property
    def size(self) -> SizePlan:
        """The sizes an image passes through."""
        patch = self.model.model.diffusion_model.patch_size
        return plan_target(self.target, host_vae.factor_of(self.vae) * patch, self.options.process_size)

    def units(self) -> int:
        """Progress units of one image: its tiles in all stages."""
        factor = host_vae.factor_of(self.vae)
        height, width = self.size.padded[0] // factor, self.size.padded[1] // factor
        latents = torch.empty(1, 1, height, width, device="meta")
        plan = sampling.plan_tiles(latents, self.model, self.settings)
        return 2 * host_vae.UNITS + len(plan)

    def run(self, images: Tensor, progress: running.Progress) -> Iterator[Tensor]:
        """Images ``(B, 3, H, W)`` in 0..1, one by one in their target size; each model is loaded once for all of them."""
        encoded = [host_vae.encode(self.vae, to_pixels(image, self.size), progress, self.vae_tile) for image in images.split(1)]
        z = sampling.run_one_step(self.model, self.conditioning, torch.cat(encoded), self.settings, progress=progress)
        for image, latent in zip(images.split(1), z.split(1), strict=True):
            y = host_vae.decode(self.vae, latent, progress, self.vae_tile)
            yield finish(from_pixels(y, self.size), image, self.target, self.options)


def _target(size: Size, wanted: dict[str, Any]) -> Size:
    """(height, width) of the result.

    Raises:
        ValueError: where it is more than 16 times the input, or too large for any memory.
    """
    target = _wanted(size, wanted)
    if target[0] * target[1] > _MOST_PIXELS:
        raise ValueError(
            f"the result would be {target[1]}x{target[0]} pixels, more than {_LARGEST}x{_LARGEST}: choose a smaller size"
        )
    return target


def _wanted(size: Size, wanted: dict[str, Any]) -> Size:
    how = wanted["size"]
    if how == _BY_FACTOR:
        return target_size(size, wanted["factor"])
    height, width = size
    reference = {_LONGER_SIDE: max(size), _SHORTER_SIDE: min(size), _WIDTH: width, _HEIGHT: height}[how]
    factor = wanted["pixels"] / reference
    if factor > SCALE_RANGE[1]:
        raise ValueError(f"{how} {wanted['pixels']} is {factor:.1f} times the input: expected at most {SCALE_RANGE[1]:g} times")
    return target_size(size, factor)
