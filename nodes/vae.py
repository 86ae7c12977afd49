"""Encoding and decoding images of any size."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tsdsr_core.image_size import plan_target
from ..tsdsr_core.pipeline import from_pixels, to_pixels
from . import inputs
from .checks import check_latents, checked
from .host import models, padded_latents, running
from .host import vae as host_vae
from .host.draft import Draft, draft_state
from .host.schema import Schema, field
from .types import Latent, Vae

_PATCH = 2


class Encode(io.ComfyNode):
    """TSDSREncode: IMAGE to LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSREncode",
            display_name="TSD-SR Encode",
            description="Encodes an image of any size to a latent, in tiles but with the same result as in one piece. Nothing "
            "is cropped: sizes that do not fit the model are padded, and TSD-SR Decode removes the padding.",
            search_aliases=["tsdsr vae encode", "tiled vae encode"],
            inputs=[
                field(
                    io.Image,
                    "image",
                    tooltip="One image or a batch of any size, already enlarged to the final size. Alpha is ignored.",
                ),
                field(io.Vae, "vae", tooltip="The VAE output of TSD-SR Load LoRA or TSD-SR Load Checkpoint."),
                inputs.vae_tile(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    @checked
    def execute(cls, image: Tensor, vae: Vae, vae_tile: int = 0) -> io.NodeOutput:
        models.check_vae(vae)
        rgb, _ = inputs.to_core(image)
        factor = host_vae.factor_of(vae)
        size = plan_target((rgb.shape[2], rgb.shape[3]), factor * _PATCH, process_size=0)
        progress, device = running.NodeProgress(len(rgb) * host_vae.UNITS), running.image_device(vae.patcher)

        def encode(image: Tensor) -> Tensor:
            return host_vae.encode(vae, to_pixels(image, size), progress, vae_tile or None)

        latents = torch.cat([device.run(*size.padded, encode, each).to(rgb.device) for each in rgb.split(1)])
        latent = {"samples": latents, models.FACTOR: factor}
        if size.padded != size.work:
            latent[padded_latents.KEY] = padded_latents.Placement(latents, size.work, factor)
        return io.NodeOutput(latent)


class Decode(io.ComfyNode):
    """TSDSRDecode: LATENT to IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSRDecode",
            display_name="TSD-SR Decode",
            description="Decodes a latent of any size to an image, in tiles but with the same result as in one piece: no "
            "seams, no colour shift.",
            search_aliases=["tsdsr vae decode", "tiled vae decode"],
            inputs=[
                field(io.Latent, "latent", tooltip="The latent to decode, of any size."),
                field(io.Vae, "vae", tooltip="The VAE output of TSD-SR Load LoRA or TSD-SR Load Checkpoint."),
                inputs.vae_tile(),
                inputs.draft(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, draft: bool | None = False, **others: Any) -> Any:
        return draft_state(draft)

    @classmethod
    @checked
    def execute(cls, latent: Latent, vae: Vae, vae_tile: int = 0, draft: bool = False) -> io.NodeOutput:
        models.check_vae(vae)
        decoder = Draft(vae) if draft else None
        samples = latent["samples"]
        check_latents(samples, vae.latent_channels, "connect the VAE that it was encoded with")
        factor = host_vae.factor_of(vae)
        if (own := latent.get(models.FACTOR) or factor) != factor:
            raise ValueError(
                f"the latent was encoded with {own} pixels per cell, but the VAE has {factor}: connect the VAE of TSD-SR Encode"
            )
        progress, device = running.NodeProgress(samples.shape[0] * host_vae.UNITS), running.image_device(vae.patcher)
        top, left, height, width = padded_latents.image_area(latent, factor)
        size = plan_target((height, width), 1, process_size=0)
        result = torch.empty(len(samples), height, width, 3, dtype=torch.float32, device=running.results_device())

        def decode(samples: Tensor) -> Tensor:
            pixels = decoder.decode(samples, progress) if decoder else host_vae.decode(vae, samples, progress, vae_tile or None)
            return inputs.to_host(from_pixels(pixels[:, :, top : top + height, left : left + width], size), None)

        for index, each in enumerate(samples.split(1)):  # one by one, so that memory grows by the result alone
            result[index : index + 1] = device.run(each.shape[2] * factor, each.shape[3] * factor, decode, each)
        return io.NodeOutput(result)
