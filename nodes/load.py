"""Loading: the official LoRAs and prompt embeddings, or a whole bundle."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tsdsr_core.bundle import BUILTIN, find_lora
from ..tsdsr_core.lora import TRANSFORMER_FILE, VAE_FILE
from ..tsdsr_core.prompt import POOLED_FILE, TOKENS_FILE, load_prompt
from . import inputs
from .host import files, loras, models
from .host.schema import field, schema

_LORAS = ("loras", files.FOLDER)
_PROMPTS = (files.FOLDER, "embeddings")
_BUNDLES = (files.FOLDER, "checkpoints")
_BUILTIN_NAME = "built-in model (no download)"


def _likely(names: list[str], published: str) -> str | None:
    """The first of ``names`` that is called like the published file, in whichever folder."""
    return next((name for name in names if name.split("/")[-1] == published), None)


class LoadLora(io.ComfyNode):
    """TSDSRLoadLora: the two official LoRAs onto SD3's MODEL and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = files.names(_LORAS, (".safetensors",))
        return schema(
            "TSDSRLoadLora",
            "TSD-SR Load LoRA",
            description="Patches Stable Diffusion 3 medium and its VAE with the two LoRA files of TSD-SR.",
            search_aliases=["tsdsr lora", "tsd-sr", "one-step upscaler", "super resolution"],
            inputs=[
                field(io.Model, "model", tooltip="Stable Diffusion 3 medium."),
                field(io.Vae, "vae", tooltip="The VAE of Stable Diffusion 3."),
                field(
                    io.Combo, "transformer_lora", options=names, default=_likely(names, TRANSFORMER_FILE),
                    tooltip="transformer.safetensors of TSD-SR, in models/loras (a subfolder is fine).",
                ),
                field(
                    io.Combo, "vae_lora", options=names, default=_likely(names, VAE_FILE),
                    tooltip="vae.safetensors of TSD-SR, in models/loras (a subfolder is fine).",
                ),
                field(
                    io.Float, "transformer_strength", default=1.0, min=0.0, max=2.0, step=0.05, advanced=True,
                    tooltip="Strength of the transformer's LoRA; 1 as published.",
                ),
                field(
                    io.Float, "vae_strength", default=1.0, min=0.0, max=2.0, step=0.05, advanced=True,
                    tooltip="Strength of the VAE encoder's LoRA; 1 as published.",
                ),
                inputs.vae_precision("keeps what it is; if that is bf16, it takes fp16 on a GPU and fp32 on the CPU."),
            ],
            outputs=[io.Model.Output(), io.Vae.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, transformer_lora: str | None, vae_lora: str | None, **others: Any) -> Any:
        return files.state(_LORAS, transformer_lora), files.state(_LORAS, vae_lora)

    @classmethod
    def execute(
        cls, model: Any, vae: Any, transformer_lora: str, vae_lora: str, transformer_strength: float, vae_strength: float,
        vae_precision: str,
    ) -> io.NodeOutput:  # fmt: skip
        parsed = [
            find_lora(files.find(_LORAS, name), target)
            for name, target in ((transformer_lora, "transformer"), (vae_lora, "vae"))
        ]
        models.check_sd3(model)
        patched_vae = loras.patch_vae(vae, parsed[1], vae_strength, inputs.PRECISIONS[vae_precision])
        return io.NodeOutput(loras.patch_model(model, parsed[0], transformer_strength), patched_vae)


class LoadPrompt(io.ComfyNode):
    """TSDSRLoadPrompt: the official prompt embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [
            name for name in files.names(_PROMPTS, (".safetensors", ".pt")) if name.endswith((TOKENS_FILE, ".safetensors"))
        ]
        return schema(
            "TSDSRLoadPrompt",
            "TSD-SR Load Prompt",
            description="Loads the prompt embeddings that TSD-SR was trained with. No text encoder is needed.",
            search_aliases=["tsdsr prompt", "prompt embeddings", "prompt_embeds.pt"],
            inputs=[
                field(
                    io.Combo, "prompt", options=names, default=_likely(names, TOKENS_FILE),
                    tooltip=f"{TOKENS_FILE} with {POOLED_FILE} beside it, or one safetensors file; in models/tsdsr or "
                    "models/embeddings.",
                ),
                inputs.prompt_tokens(),
            ],
            outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, prompt: str | None, **others: Any) -> Any:
        pooled = prompt and prompt.removesuffix(TOKENS_FILE) + POOLED_FILE
        return files.state(_PROMPTS, prompt), files.state(_PROMPTS, pooled)

    @classmethod
    def execute(cls, prompt: str, prompt_tokens: int = 0) -> io.NodeOutput:
        path = files.find(_PROMPTS, prompt)
        embeds = load_prompt(path.parent if path.suffix == ".pt" else path)
        return io.NodeOutput(models.to_conditioning(embeds.pruned(prompt_tokens) if prompt_tokens else embeds))


class LoadCheckpoint(io.ComfyNode):
    """TSDSRLoadCheckpoint: a self-contained bundle, or the built-in model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TSDSRLoadCheckpoint",
            "TSD-SR Load Checkpoint",
            description="Loads a whole one-step restorer: the small built-in model, or a bundle with everything in one file.",
            search_aliases=["tsdsr checkpoint", "tsdsr model", "built-in upscaler", "super resolution"],
            inputs=[
                field(
                    io.Combo, "checkpoint", options=[_BUILTIN_NAME, *files.names(_BUNDLES, (".safetensors",))],
                    default=_BUILTIN_NAME,
                    tooltip="The built-in model, or a TSD-SR bundle in models/tsdsr or models/checkpoints (made by TSD-SR "
                    "Save Checkpoint or the command tsdsr bundle --merge).",
                ),
                inputs.vae_precision("takes fp16 on a GPU and fp32 on the CPU."),
            ],
            outputs=[io.Model.Output(), io.Vae.Output(), io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **others: Any) -> Any:
        return "" if checkpoint == _BUILTIN_NAME else files.state(_BUNDLES, checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, vae_precision: str) -> io.NodeOutput:
        path = BUILTIN if checkpoint == _BUILTIN_NAME else files.find(_BUNDLES, checkpoint)
        return io.NodeOutput(*models.load_bundle(path, inputs.PRECISIONS[vae_precision]))
