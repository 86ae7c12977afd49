"""Saving model, VAE and prompt as one file."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..tsdsr_core.families.bundle import write_bundle
from . import inputs
from .checks import checked
from .host import bundling, files, models, sampling
from .host.schema import Schema, field
from .load import BUNDLES
from .types import Conditioning, HostModel, Vae

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class SaveCheckpoint(io.ComfyNode):
    """TSDSRSaveCheckpoint: MODEL, VAE and CONDITIONING into a bundle, patches merged."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSRSaveCheckpoint",
            display_name="TSD-SR Save Checkpoint",
            description="Saves model, VAE and prompt as one file, with all LoRAs merged. TSD-SR Load Checkpoint and the tsdsr "
            "command can load it. A file that contains Stable Diffusion 3 is covered by the licence of that model.",
            search_aliases=["tsdsr bundle", "merge lora"],
            inputs=[
                field(io.Model, "model", tooltip=inputs.MODEL),
                field(io.Vae, "vae", tooltip=inputs.VAE),
                field(io.Conditioning, "conditioning", tooltip=inputs.CONDITIONING),
                field(
                    io.String, "filename_prefix", default="checkpoints/tsdsr",
                    tooltip="File name in the output folder, with subfolders; a number is added. TSD-SR Load Checkpoint lists "
                    "files in output/checkpoints after you press R.",
                ),
                field(
                    io.Combo, "dtype", options=list(_DTYPES), default="fp16", advanced=True,
                    tooltip="Precision of the saved weights. fp16 = half the size of fp32, fp32 = exact. With bf16, the VAE is "
                    "saved as fp16, because bf16 is too coarse for it.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: HostModel, vae: Vae, conditioning: Conditioning, filename_prefix: str, dtype: str) -> io.NodeOutput:
        sampling.check_model(model)
        sampling.check_conditioning(conditioning, model)
        models.check_vae(vae, model)
        files.output_prefix(filename_prefix)  # reports a bad prefix before the work
        bundle = bundling.to_bundle(model, vae, conditioning, _DTYPES[dtype], {"made by": "TSDSRSaveCheckpoint"})
        path, shown = files.new_output(filename_prefix, files.names(BUNDLES))
        write_bundle(path, bundle)
        return io.NodeOutput(ui=ui.PreviewText(shown))
