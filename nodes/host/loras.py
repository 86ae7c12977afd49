"""LoRAs on copies of native models: all their modules fit, or none is applied."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ...tsdsr_core.weights.lora import Lora, check_fit
from ...tsdsr_core.weights.vae_keys import to_original
from ..types import HostModel, Patcher, Vae
from .bundling import merged_weights
from .models import build_vae, check_vae, plain_key, precise_dtype, vae_shape
from .vae import uncompiled

log = logging.getLogger("tsdsr")


class _Saved:
    """What is put before the class of a patched VAE and of the one that it was made of, for the host's nodes that save a VAE.

    Those nodes read the weights that the copy and the original share: without the copy's patches, or, while the copy is loaded,
    with them even for the original.
    """

    patcher: Patcher

    def get_sd(self) -> dict[str, Tensor]:
        """The weights under the host's names, patches merged, in the VAE's type on the CPU."""
        with uncompiled(self.patcher.model):
            return merged_weights(self.patcher, "")


def patch_model(model: HostModel, lora: Lora, strength: float) -> HostModel:
    """A copy of the MODEL with the transformer's LoRA, all modules or none.

    Raises:
        ValueError: for modules that the model does not have, or that have other shapes there.
    """
    found: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    targets = {name: found.get(f"transformer.{name}") for name in lora.pairs}
    patched = model.clone()
    _add(patched, lora, targets, strength)
    return patched


def patch_vae(vae: Vae, lora: Lora, strength: float, dtype: torch.dtype | None) -> Vae:
    """A copy of the VAE with the encoder's LoRA.

    Args:
        dtype: of the copy; None for the VAE's own, or a finer one where that is bf16.

    Raises:
        ValueError: for modules that the model does not have, or that have other shapes there.
    """
    check_vae(vae)
    with uncompiled(vae.first_stage_model):
        return _patched_vae(vae, lora, strength, dtype)


def _patched_vae(vae: Vae, lora: Lora, strength: float, dtype: torch.dtype | None) -> Vae:
    if dtype is None:
        dtype = vae.vae_dtype if vae.vae_dtype != torch.bfloat16 else precise_dtype(vae.patcher.load_device)
    if dtype == vae.vae_dtype:
        patched = copy.copy(vae)
        patched.patcher = vae.patcher.clone()
    else:
        if next(vae.first_stage_model.parameters()).dtype == torch.bfloat16:
            log.warning(
                "ComfyUI loaded the VAE in bf16, which lost precision; start ComfyUI with --fp16-vae for a more exact result"
            )
        base = {plain_key(key): entries[0][0] for key, entries in vae.patcher.get_key_patches().items()}
        patched = build_vae(base, dtype)
        patched.patcher.patches = {plain_key(key): list(entries) for key, entries in vae.patcher.patches.items()}
    weights = patched.first_stage_model.state_dict()
    keys = {plain_key(key): key for key in weights}
    levels = len(vae_shape({plain_key(key): weight for key, weight in weights.items()})["widths"])
    targets = {name: keys.get(f"{to_original(name, levels)}.weight") for name in lora.pairs}
    _add(patched.patcher, lora, targets, strength)
    for each in (vae, patched):  # while the copy is loaded, its patches are in the weights that both share
        if not isinstance(each, _Saved):
            each.__class__ = type(type(each).__name__, (_Saved, type(each)), {})
    return patched


def _add(patcher: Patcher, lora: Lora, targets: Mapping[str, Any], strength: float) -> None:
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
        raise ValueError(
            f"ComfyUI applied only {len(added)} of the {len(lora.pairs)} modules of the {lora.target} LoRA: update ComfyUI"
        )
