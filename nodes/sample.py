"""The step itself, on latents."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .checks import checked
from .host import models
from .host.sampling import OneStepSampler, run_one_step
from .host.schema import Schema, field
from .types import Conditioning, HostModel, Latent


class OneStep(io.ComfyNode):
    """TSDSROneStep: LATENT to LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSROneStep",
            display_name="TSD-SR One Step",
            description="Restores a latent in one step. The latent is the enlarged image, encoded with the TSD-SR VAE.",
            search_aliases=["tsdsr step", "restore latent", "latent super resolution"],
            inputs=[
                field(io.Model, "model", tooltip=inputs.MODEL),
                field(io.Conditioning, "conditioning", tooltip=inputs.CONDITIONING),
                field(io.Latent, "latent", tooltip="The enlarged image from TSD-SR Encode, with the VAE of the same loader."),
                inputs.strength(),
                *inputs.tiling(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    @checked
    def execute(
        cls, model: HostModel, conditioning: Conditioning, latent: Latent, strength: float, tile: int, tile_overlap: int,
        tile_batch: int,
    ) -> io.NodeOutput:  # fmt: skip
        models.check_sd3(model)
        models.check_factor(latent.get(models.FACTOR), model)
        settings = inputs.step_options(strength, tile, tile_overlap, tile_batch)
        samples = run_one_step(model, conditioning, latent["samples"], settings, latent.get("noise_mask"))
        return io.NodeOutput({**latent, "samples": samples})


class OneStepSamplerNode(io.ComfyNode):
    """TSDSRSampler: the same step as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSRSampler",
            display_name="TSD-SR Sampler",
            description="The TSD-SR step as a sampler for SamplerCustomAdvanced. Use it with DisableNoise and "
            "BasicScheduler (1 step, denoise 1).",
            search_aliases=["tsdsr sampler"],
            inputs=[inputs.strength(), *inputs.tiling()],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    @checked
    def execute(cls, strength: float, tile: int, tile_overlap: int, tile_batch: int) -> io.NodeOutput:
        return io.NodeOutput(OneStepSampler(inputs.step_options(strength, tile, tile_overlap, tile_batch)))
