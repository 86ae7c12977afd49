"""Saving a whole restorer as one file."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..tsdsr_core.bundle import write_bundle
from .host import files, sampling, saving
from .host.schema import field, schema

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class SaveCheckpoint(io.ComfyNode):
    """TSDSRSaveCheckpoint: MODEL, VAE and CONDITIONING into a bundle, patches merged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSRSaveCheckpoint",
            "TSD-SR Save Checkpoint",
            description="Writes model, VAE and prompt into one file with all LoRAs merged. TSD-SR Load Checkpoint and the "
            "command tsdsr read it. A file that contains Stable Diffusion 3 stays under its licence.",
            search_aliases=["tsdsr bundle", "merge lora"],
            inputs=[
                field(io.Model, "model", tooltip="SD3 with the TSD-SR LoRA, or a TSD-SR checkpoint's model."),
                field(io.Vae, "vae", tooltip="The VAE from the same loader as the model."),
                field(io.Conditioning, "conditioning", tooltip="The prompt of TSD-SR, or one prompt of SD3."),
                field(
                    io.String, "filename_prefix", default="checkpoints/tsdsr",
                    tooltip="In the output folder. Press R, and the loader lists what lies in its subfolder checkpoints.",
                ),
                field(io.Combo, "dtype", options=list(_DTYPES), default="fp16", advanced=True, tooltip="Type of the weights."),
            ],
            outputs=[],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, vae: Any, conditioning: Any, filename_prefix: str, dtype: str) -> io.NodeOutput:
        sampling.check_model(model)
        sampling.check_conditioning(conditioning, model)
        path, shown = files.new_output(filename_prefix)
        write_bundle(path, saving.to_bundle(model, vae, conditioning, _DTYPES[dtype], {"made by": "TSDSRSaveCheckpoint"}))
        return io.NodeOutput(ui={"text": [shown]})
