"""Loading: the official LoRAs and prompt embeddings, or a whole bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..tsdsr_core.families.bundle import BUILTIN, find_lora
from ..tsdsr_core.weights.lora import TRANSFORMER_FILE, VAE_FILE
from ..tsdsr_core.weights.peft_config import find_peft_config
from ..tsdsr_core.weights.prompt import POOLED_FILE, TOKENS_FILE, load_prompt, pair_of
from ..tsdsr_core.weights.reading import PICKLED, SUFFIXES
from . import inputs
from .checks import checked
from .host import files, loras, models
from .host.schema import Schema, field
from .types import HostModel, Vae

_LORAS = ("loras", files.FOLDER)
_PROMPTS = (files.FOLDER, "embeddings")
BUNDLES = (files.FOLDER, "checkpoints")
_BUILTIN_NAME = "built-in model (no download)"


_NO_FILES = "no files found:"


def _choices(names: list[str], published: str, wanted: str) -> dict[str, Any]:
    """Options and default of a list of files: ``published``, in any folder, where there is one.

    An empty list would only say "Value not in list"; instead, its one entry says what to do.

    Args:
        wanted: what to put where, for that entry.
    """
    names = names or [f"{_NO_FILES} put {wanted}, then press R"]
    return {"options": names, "default": next((name for name in names if name.split("/")[-1].lower() == published), None)}


def _find(folders: tuple[str, ...], field_name: str, name: str) -> Path:
    if name.startswith(_NO_FILES):
        raise ValueError(f"{field_name}: {name}")
    return files.find(folders, name)


def _config_state(name: str | None) -> str:
    """Changes when the configuration does that says how strong a LoRA is."""
    try:
        config = None if name is None else find_peft_config(files.find(_LORAS, name))
    except (ValueError, OSError):  # gone, or in a folder that cannot be read
        return ""
    return "" if config is None else f" {files.stamp(config)}"


def _prompts() -> list[str]:
    """Safetensors files, and the first file of each complete pair of ``.pt`` files."""
    names = files.names(_PROMPTS, (*SUFFIXES, PICKLED))
    return [name for name in names if not name.lower().endswith(PICKLED) or _begins_a_pair(name)]


def _begins_a_pair(name: str) -> bool:
    try:
        path = files.find(_PROMPTS, name)
        pair = pair_of(path)
    except (ValueError, OSError):  # gone since it was listed, or in a folder that cannot be read
        return False
    return pair is not None and pair[0] == path and pair[1].is_file()


class LoadLora(io.ComfyNode):
    """TSDSRLoadLora: the two official LoRAs onto SD3's MODEL and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = files.names(_LORAS)
        where = "Put it into models/loras or a subfolder, such as models/loras/tsdsr, then press R to refresh the list."
        return Schema(
            node_id="TSDSRLoadLora",
            display_name="TSD-SR Load LoRA",
            description="Applies the two TSD-SR LoRA files to Stable Diffusion 3 medium and to its VAE.",
            search_aliases=["tsdsr lora", "tsd-sr lora"],
            inputs=[
                field(io.Model, "model", tooltip="Stable Diffusion 3 medium, from Load Checkpoint or Load Diffusion Model."),
                field(io.Vae, "vae", tooltip="The VAE of Stable Diffusion 3, from Load Checkpoint or Load VAE."),
                field(
                    io.Combo, "transformer_lora",
                    **_choices(names, TRANSFORMER_FILE, f"{TRANSFORMER_FILE} of TSD-SR into models/loras"),
                    tooltip=f"{TRANSFORMER_FILE} of TSD-SR. {where}",
                ),
                field(
                    io.Combo, "vae_lora", **_choices(names, VAE_FILE, f"{VAE_FILE} of TSD-SR into models/loras"),
                    tooltip=f"{VAE_FILE} of TSD-SR. {where}",
                ),
                field(
                    io.Float, "transformer_strength", default=1.0, min=0.0, max=2.0, step=0.05, advanced=True,
                    tooltip="Strength of the LoRA that restores the image. 1 = as published, 0 = without it.",
                ),
                field(
                    io.Float, "vae_strength", default=1.0, min=0.0, max=2.0, step=0.05, advanced=True,
                    tooltip="Strength of the LoRA that helps the VAE read degraded images. 1 = as published, 0 = without it.",
                ),
                inputs.vae_precision(
                    "as loaded, except bf16, which is too coarse for the LoRA and becomes fp16 on a GPU, fp32 on the CPU"
                ),
            ],
            outputs=[io.Model.Output(), io.Vae.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, transformer_lora: str | None, vae_lora: str | None, **others: Any) -> Any:
        return [files.state(_LORAS, name) + _config_state(name) for name in (transformer_lora, vae_lora)]

    @classmethod
    @checked
    def execute(
        cls, model: HostModel, vae: Vae, transformer_lora: str, vae_lora: str, transformer_strength: float, vae_strength: float,
        vae_precision: str,
    ) -> io.NodeOutput:  # fmt: skip
        models.check_sd3(model)
        models.check_vae(vae, model)
        parsed = [
            find_lora(_find(_LORAS, f"{target}_lora", name), target)
            for name, target in ((transformer_lora, "transformer"), (vae_lora, "vae"))
        ]
        patched_vae = loras.patch_vae(vae, parsed[1], vae_strength, inputs.PRECISIONS[vae_precision])
        return io.NodeOutput(loras.patch_model(model, parsed[0], transformer_strength), patched_vae)


class LoadPrompt(io.ComfyNode):
    """TSDSRLoadPrompt: the official prompt embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSRLoadPrompt",
            display_name="TSD-SR Load Prompt",
            description="Loads the prompt embeddings that TSD-SR was trained with, so that no text encoder is needed.",
            search_aliases=["tsdsr prompt", "prompt embeddings", "prompt_embeds.pt"],
            inputs=[
                field(
                    io.Combo, "prompt",
                    **_choices(_prompts(), TOKENS_FILE, f"{TOKENS_FILE} and {POOLED_FILE} of TSD-SR into models/tsdsr"),
                    tooltip=f"{TOKENS_FILE} of TSD-SR. Put it into models/tsdsr (or models/embeddings) together with "
                    f"{POOLED_FILE}, then press R to refresh the list. A TSD-SR bundle also works.",
                ),
                inputs.prompt_tokens(),
            ],
            outputs=[io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, prompt: str | None, **others: Any) -> Any:
        if prompt is None:
            return files.state(_PROMPTS, None)
        try:
            path = files.find(_PROMPTS, prompt)
            return [files.stamp(each) for each in pair_of(path) or (path,)]
        except (ValueError, OSError):  # gone, or in a folder that cannot be read
            return []

    @classmethod
    @checked
    def execute(cls, prompt: str, prompt_tokens: int = 0) -> io.NodeOutput:
        embeds = load_prompt(_find(_PROMPTS, "prompt", prompt))
        return io.NodeOutput(models.to_conditioning(embeds.pruned(prompt_tokens) if prompt_tokens else embeds))


class LoadCheckpoint(io.ComfyNode):
    """TSDSRLoadCheckpoint: a self-contained bundle, or the built-in model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="TSDSRLoadCheckpoint",
            display_name="TSD-SR Load Checkpoint",
            description="Loads a complete TSD-SR model: the small built-in model, or a bundle with everything in one file.",
            search_aliases=["tsdsr checkpoint", "tsdsr model", "tsdsr bundle", "load checkpoint"],
            inputs=[
                field(
                    io.Combo, "checkpoint", options=[_BUILTIN_NAME, *files.names(BUNDLES)],
                    default=_BUILTIN_NAME,
                    tooltip="The built-in model (nothing to download), or a TSD-SR bundle in models/tsdsr or "
                    "models/checkpoints. TSD-SR Save Checkpoint and the command tsdsr bundle --merge make bundles.",
                ),
                inputs.vae_precision("fp16 on a GPU, fp32 on the CPU"),
            ],
            outputs=[io.Model.Output(), io.Vae.Output(), io.Conditioning.Output()],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **others: Any) -> Any:
        return "" if checkpoint == _BUILTIN_NAME else files.state(BUNDLES, checkpoint)

    @classmethod
    @checked
    def execute(cls, checkpoint: str, vae_precision: str) -> io.NodeOutput:
        path = BUILTIN if checkpoint == _BUILTIN_NAME else files.find(BUNDLES, checkpoint)
        return io.NodeOutput(*models.load_bundle(path, inputs.PRECISIONS[vae_precision]))
