"""The step itself, on latents."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs
from .host.sampling import OneStepSampler, run_one_step
from .host.schema import field, schema


class OneStep(io.ComfyNode):
    """TSDSROneStep: LATENT to LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSROneStep",
            "TSD-SR One Step",
            description="Restores a latent in one step. The latent is the enlarged picture, encoded with TSD-SR's VAE.",
            search_aliases=["tsdsr", "one-step restore", "latent super resolution"],
            inputs=[
                field(io.Model, "model", tooltip="SD3 with the TSD-SR LoRA, or a TSD-SR checkpoint's model."),
                field(io.Conditioning, "conditioning", tooltip="The prompt of TSD-SR, or any prompt of SD3."),
                field(io.Latent, "latent", tooltip="The enlarged picture from TSD-SR Encode, with the VAE of the same loader."),
                inputs.strength(),
                *inputs.tiling(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, conditioning: Any, latent: dict[str, Any], strength: float, tile: int, tile_overlap: int,
        tile_batch: int,
    ) -> io.NodeOutput:  # fmt: skip
        settings = inputs.step_settings(strength, tile, tile_overlap, tile_batch)
        samples = run_one_step(model, conditioning, latent["samples"], settings, latent.get("noise_mask"))
        return io.NodeOutput({**latent, "samples": samples})


class OneStepSamplerNode(io.ComfyNode):
    """TSDSRSampler: the same step as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSRSampler",
            "TSD-SR Sampler",
            description="The one step for SamplerCustomAdvanced. Give it sigmas of one step, 1 to 0, and no noise.",
            search_aliases=["tsdsr sampler"],
            inputs=[inputs.strength(), *inputs.tiling()],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, strength: float, tile: int, tile_overlap: int, tile_batch: int) -> io.NodeOutput:
        return io.NodeOutput(OneStepSampler(inputs.step_settings(strength, tile, tile_overlap, tile_batch)))
