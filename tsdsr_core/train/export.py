"""Export of a checkpoint: the official pair of LoRA files, or a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..families.bundle import Bundle, write_bundle
from ..families.load import merged_bundle
from ..images.jobs import check_existing
from ..system.atomic import check_target, safetensors_writer, torch_writer, write_files
from ..weights.lora import TRANSFORMER_FILE, VAE_FILE
from ..weights.prompt import POOLED_FILE, TOKENS_FILE, PromptEmbeds
from .checkpoint import Checkpoint, check_frozen
from .config import Config
from .networks.build import Sources, build_networks
from .networks.preview import fit_preview, latent_statistics
from .networks.roles import STUDENT, TEACHER, set_parameters
from .networks.small_model import shift_latents

CPU = torch.device("cpu")


def export(checkpoint: Checkpoint, out: Path, base: Path | None, notes: Mapping[str, str], existing: str = "error") -> None:
    """Write the averaged weights of a checkpoint: all files or none.

    Args:
        out: for adapters a folder for the official files, or a ``.safetensors`` bundle of LoRAs; for a small model a
            ``.safetensors`` bundle of the whole model.
        base: what the run started with; not needed for adapters.
        notes: text to store in a bundle.
        existing: "error" or "overwrite": what to do about existing files.

    Raises:
        InputError: for an unsuitable ``out``, existing files, or a base that does not fit.
        OSError: if a file cannot be written; existing files are kept.
    """
    config = checkpoint.config
    notes = {"stage": config.stage, "steps": str(checkpoint.step), **notes}
    if config.stage == "student":
        notes["objective"] = config.objective.name
    is_file = out.suffix == ".safetensors"
    adapters = config.model.trained == "lora"
    if adapters and not is_file:
        _write_adapters(checkpoint, out, existing)
        return
    if not is_file:
        raise InputError(f"-o {out}: a small model is exported as one .safetensors file")
    check_existing([out], existing)
    check_target(out)
    write_bundle(out, _lora_bundle(checkpoint, notes) if adapters else _small_bundle(checkpoint, base, notes))


def _write_adapters(checkpoint: Checkpoint, folder: Path, existing: str) -> None:
    """Write the official files."""
    parts, prompt = adapter_files(checkpoint.average), _prompt(checkpoint)
    writers = {
        folder / file: safetensors_writer({f"transformer.{key}": value for key, value in parts[part].items()})
        for part, file in (("transformer", TRANSFORMER_FILE), ("vae", VAE_FILE))
        if parts[part]
    }
    for tensor, file in ((prompt.tokens, TOKENS_FILE), (prompt.pooled, POOLED_FILE)):
        writers[folder / file] = torch_writer(tensor.clone())
    check_existing(list(writers), existing)
    write_files(writers)


def _lora_bundle(checkpoint: Checkpoint, notes: Mapping[str, str]) -> Bundle:
    parts = adapter_files(checkpoint.average)
    if not parts["vae"]:
        raise InputError("a teacher has no encoder LoRA, which a bundle needs: export it to a folder")
    return Bundle("lora", _prompt(checkpoint), parts["transformer"], parts["vae"], notes=notes)


def _prompt(checkpoint: Checkpoint) -> PromptEmbeds:
    return PromptEmbeds(checkpoint.prompt["tokens"], checkpoint.prompt["pooled"])


def adapter_files(average: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's parameters by part ("transformer", "vae"), under PEFT's keys without the adapter's name."""
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "vae": {}}
    for name, value in average.items():
        part, _, key = name.partition(".")
        if part not in parts or not key:
            raise InputError(f"the checkpoint has the weight {name!r}, which is none of a LoRA of the transformer or the VAE")
        for role in (STUDENT, TEACHER):
            key = key.replace(f".{role}.", ".")
        parts[part][key] = value.detach().cpu().contiguous().clone()  # files hold no shared memory
    if not parts["transformer"]:
        raise InputError("the checkpoint has no weights of the transformer's LoRA: it is damaged")
    return parts


def _small_bundle(checkpoint: Checkpoint, base: Path | None, notes: Mapping[str, str]) -> Bundle:
    config = checkpoint.config
    plain = replace(config, objective=replace(config.objective, name="supervised"))  # the teacher is not needed here
    networks = build_networks(plain, Sources(base), CPU)
    check_frozen(checkpoint, {"autoencoder": networks.autoencoder})
    role = TEACHER if config.stage == "teacher" else STUDENT
    set_parameters(networks.parameters(role), checkpoint.average, "the checkpoint (--base must be what the run started with)")
    transformer, vae = networks.transformers[role], networks.student_vae

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode()

    if config.stage == "pretrain":  # the next stage is a diffusion model, which needs latents of mean 0 and variance 1
        mean, std = latent_statistics(encode)
        shift_latents(transformer, vae, mean, 1 / (std * networks.scaling_factor))
    bundle = merged_bundle(transformer, vae, _prompt(checkpoint), torch.float16, _defaults(config), notes)
    return replace(bundle, preview=fit_preview(encode))


def _defaults(config: Config) -> dict[str, int]:
    levels = config.wavelet_levels
    return {"process_size": 0, **({"wavelet_levels": levels} if levels else {})}
