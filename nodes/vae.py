"""Encoding and decoding pictures of any size."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tsdsr_core.geometry import plan_target
from ..tsdsr_core.restore import from_pixels, to_pixels
from . import inputs
from .host import running
from .host import vae as host_vae
from .host.schema import field, schema

_SIZE = "tsdsr_size"
"""Entry of a LATENT with the (height, width) in pixels that it was encoded from, before padding."""
_PATCH = 2


class Encode(io.ComfyNode):
    """TSDSREncode: IMAGE to LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSREncode",
            "TSD-SR Encode",
            description="Encodes a picture of any size, in tiles that give what one piece would. Nothing is cropped: sides "
            "that do not fit the model are padded, and TSD-SR Decode takes the padding away again.",
            search_aliases=["tsdsr vae encode", "tiled vae encode"],
            inputs=[
                field(io.Image, "image", tooltip="One picture or a batch, of any size; enlarge it first. Alpha is left out."),
                field(io.Vae, "vae", tooltip="The VAE from the same loader as the model."),
                inputs.vae_tile(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, image: Any, vae: Any, vae_tile: int = 0) -> io.NodeOutput:
        rgb, _ = inputs.to_core(image)
        size = plan_target((rgb.shape[2], rgb.shape[3]), host_vae.factor_of(vae) * _PATCH, process_size=0)
        progress = running.Progress(len(rgb) * host_vae.UNITS)
        latents = host_vae.encode(vae, to_pixels(rgb, size), progress, vae_tile or None)
        return io.NodeOutput({"samples": latents, _SIZE: size.work})


class Decode(io.ComfyNode):
    """TSDSRDecode: LATENT to IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSRDecode",
            "TSD-SR Decode",
            description="Decodes a latent of any size, in tiles that give what one piece would: no seams, no change of tone.",
            search_aliases=["tsdsr vae decode", "tiled vae decode"],
            inputs=[
                field(io.Latent, "latent", tooltip="A latent of any size."),
                field(io.Vae, "vae", tooltip="The VAE from the same loader as the model."),
                inputs.vae_tile(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], vae: Any, vae_tile: int = 0) -> io.NodeOutput:
        samples = latent["samples"]
        factor = host_vae.factor_of(vae)
        padded = samples.shape[2] * factor, samples.shape[3] * factor
        work = latent.get(_SIZE, padded)
        size = plan_target(work, factor * _PATCH, process_size=0)
        if size.padded != padded:  # another node changed the latent's size
            size = plan_target(padded, 1, process_size=0)
        progress = running.Progress(len(samples) * host_vae.UNITS)
        pixels = host_vae.decode(vae, samples, progress, vae_tile or None)
        return io.NodeOutput(inputs.to_host(from_pixels(pixels, size), None))
