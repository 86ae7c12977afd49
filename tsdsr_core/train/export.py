"""From a checkpoint to what people install: the official pair of LoRA files, or a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..bundle import Bundle, write_bundle
from ..diffusers_models import merged_bundle
from ..files import atomic_path, write_tensors
from ..lora import TRANSFORMER_FILE, VAE_FILE
from ..prompt import POOLED_FILE, TOKENS_FILE, PromptEmbeds
from .build import Sources, build_networks
from .checkpoint import Checkpoint, check_autoencoder
from .config import Config
from .networks import STUDENT, TEACHER, set_parameters
from .preview import fit_preview, measure
from .small_model import shift_latents

CPU = torch.device("cpu")


def export(checkpoint: Checkpoint, out: Path, base: Path | None, notes: Mapping[str, str]) -> None:
    """Write the averaged weights of a checkpoint.

    Args:
        out: with adapters a folder for the official files, or a ``.safetensors`` bundle of the LoRAs; with a small model's own
            weights a ``.safetensors`` bundle with everything.
        base: what the run began with; adapters need none.

    Raises:
        ValueError: for an ``out`` of the wrong kind, or a base that does not fit.
    """
    notes = {
        "stage": checkpoint.config.stage,
        "objective": checkpoint.config.objective.name,
        "steps": str(checkpoint.step),
        **notes,
    }
    is_file = out.suffix == ".safetensors"
    if checkpoint.config.model.trained == "lora":
        _write_adapters(checkpoint, out, notes if is_file else None)
    elif not is_file:
        raise ValueError(f"-o {out}: a small model is exported as one .safetensors file")
    else:
        write_bundle(out, _small_bundle(checkpoint, base, notes))


def _write_adapters(checkpoint: Checkpoint, out: Path, notes: Mapping[str, str] | None) -> None:
    """The official files in a folder, or with ``notes`` one LoRA bundle."""
    parts = adapter_files(checkpoint.average)
    prompt = PromptEmbeds(checkpoint.prompt["tokens"], checkpoint.prompt["pooled"])
    if notes is not None:
        if not parts["vae"]:
            raise ValueError("a teacher has no encoder LoRA for a bundle: export it into a folder")
        write_bundle(out, Bundle("lora", prompt, parts["transformer"], parts["vae"], notes=notes))
        return
    for part, file in (("transformer", TRANSFORMER_FILE), ("vae", VAE_FILE)):
        if parts[part]:
            write_tensors(out / file, {f"transformer.{key}": value for key, value in parts[part].items()})
    for tensor, file in ((prompt.tokens, TOKENS_FILE), (prompt.pooled, POOLED_FILE)):
        with atomic_path(out / file) as temporary:
            torch.save(tensor.clone(), temporary)


def adapter_files(average: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Parameters of an adapter by part, under PEFT's keys without the adapter's name."""
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "vae": {}}
    for name, value in average.items():
        part, _, key = name.partition(".")
        for role in (STUDENT, TEACHER):
            key = key.replace(f".{role}.", ".")
        parts[part][key] = value.detach().cpu().contiguous()
    return parts


def _small_bundle(checkpoint: Checkpoint, base: Path | None, notes: Mapping[str, str]) -> Bundle:
    config = checkpoint.config
    plain = replace(config, objective=replace(config.objective, name="supervised"))  # a student alone needs no teacher
    networks = build_networks(plain, Sources(base), CPU)
    check_autoencoder(checkpoint, networks.autoencoder)
    role = TEACHER if config.stage == "teacher" else STUDENT
    set_parameters(networks.parameters(role), checkpoint.average, "the checkpoint (give what the run began with as --base)")
    transformer, vae = networks.transformers[role], networks.student_vae

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode()

    if config.stage == "pretrain":  # the next stage is a diffusion model, which wants mean 0 and variance 1
        mean, std = measure(encode)
        shift_latents(transformer, vae, mean, 1 / (std * networks.scaling_factor))
    prompt = PromptEmbeds(checkpoint.prompt["tokens"], checkpoint.prompt["pooled"])
    bundle = merged_bundle(transformer, vae, prompt, torch.float16, _defaults(config), notes)
    return replace(bundle, preview=fit_preview(encode))


def _defaults(config: Config) -> dict[str, int]:
    levels = config.wavelet_levels
    return {"process_size": 0, **({"wavelet_levels": levels} if levels else {})}
