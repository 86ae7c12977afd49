"""LoRAs onto native models, all modules or none, on copies."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch

from ...tsdsr_core.lora import Lora, check_fit
from ...tsdsr_core.vae_keys import to_original
from .models import build_vae, precise_dtype, vae_shape

log = logging.getLogger("tsdsr")


def patch_model(model: Any, lora: Lora, strength: float) -> Any:
    """A copy of the MODEL with the transformer's LoRA, all modules or none.

    Raises:
        ValueError: where modules are left over or have other shapes.
    """
    found: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    targets = {name: found.get(f"transformer.{name}") for name in lora.pairs}
    patched = model.clone()
    _add(patched, lora, targets, strength)
    return patched


def patch_vae(vae: Any, lora: Lora, strength: float, dtype: torch.dtype | None) -> Any:
    """A copy of the VAE with the encoder's LoRA.

    Args:
        dtype: of the copy; None for the VAE's own, or a finer one where that is bf16.

    Raises:
        ValueError: where modules are left over or have other shapes.
    """
    weights = vae.first_stage_model.state_dict()
    if "decoder.up.0.block.0.conv1.weight" not in weights:
        raise ValueError(f"the VAE is a {type(vae.first_stage_model).__name__}: expected the one of Stable Diffusion 3")
    if dtype is None:
        dtype = vae.vae_dtype if vae.vae_dtype != torch.bfloat16 else precise_dtype(vae.patcher.load_device)
    if dtype == vae.vae_dtype:
        patched = copy.copy(vae)
        patched.patcher = vae.patcher.clone()
    else:
        if next(vae.first_stage_model.parameters()).dtype == torch.bfloat16:
            log.warning("ComfyUI loaded the VAE in bf16, which rounded it; start it with --fp16-vae for closer results")
        base = {key: entries[0][0] for key, entries in vae.patcher.get_key_patches().items()}
        patched = build_vae(base, dtype)
        patched.patcher.patches = {key: list(entries) for key, entries in vae.patcher.patches.items()}
    levels = len(vae_shape(weights)["widths"])
    targets = {name: f"{to_original(name, levels)}.weight" for name in lora.pairs}
    _add(patched.patcher, lora, targets, strength)
    return patched


def _add(patcher: Any, lora: Lora, targets: Mapping[str, Any], strength: float) -> None:
    """Add ``lora`` to ``patcher``; ``targets`` gives the host's key of each module, with its part of a joint weight."""
    weights = patcher.model_state_dict()
    shapes = {}
    for name, target in targets.items():
        key, offset, *_ = target if isinstance(target, tuple) else (target, None)
        if key in weights:
            shape = list(comfy.utils.get_attr(patcher.model, key).shape)  # of quantised weights, the state dict's are others
            if offset is not None:
                shape[offset[0]] = offset[2]
            linear = len(lora.pairs[name].weight_shape) == 2 and shape[2:] == [1, 1]  # the VAE's attention
            shapes[name] = tuple(shape[:2] if linear else shape)
    check_fit(lora, shapes)
    patches = comfy.lora.load_lora(lora.state_dict(), dict(targets))
    added = patcher.add_patches(patches, strength)
    if len(added) != len(lora.pairs):
        raise ValueError(f"ComfyUI took {len(added)} of the {len(lora.pairs)} modules of the {lora.target} LoRA")
