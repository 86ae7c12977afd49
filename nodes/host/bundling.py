"""Native models back into bundles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor, nn

from ...tsdsr_core.families.bundle import Bundle, vae_weights
from ...tsdsr_core.weights.vae_keys import weights_to_diffusers
from ..types import Conditioning, HostModel, Patcher, Vae
from . import layers, running
from .models import NORM_GROUPS, PREVIEW, defaults_of, from_conditioning, plain_key, vae_shape
from .vae import uncompiled


def merged_weights(patcher: Patcher, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All weights of a patcher's model under ``prefix``, without it, patches merged in fp32, on the CPU.

    Buffers stay as they are, whatever the patches say: the host patches parameters alone.

    Args:
        dtype: of the result; None for what each weight has.

    Raises:
        ValueError: for a quantised model.
    """
    _check_plain(patcher)
    entries = patcher.get_key_patches(prefix)
    buffers = {key for key, _ in patcher.model.named_buffers()}
    progress = running.NodeProgress(len(entries))
    merged = {}
    for key, ((weight, convert), *patches) in entries.items():
        value = convert(weight.to("cpu", torch.float32, copy=True), inplace=False)  # merging works in place
        patches = [] if key in buffers else patches
        merged[plain_key(key.removeprefix(prefix))] = comfy.lora.calculate_weight(patches, value, key).to(dtype or weight.dtype)
        progress.update(1)
    return merged


def _check_plain(patcher: Patcher) -> None:
    """Raise ``ValueError`` for weights in a form of the host's, or of another pack, such as one for GGUF files."""
    quantised = [key for key in patcher.model_state_dict() if key.endswith((".weight_scale", ".comfy_quant"))]
    for key, weight in patcher.model.named_parameters():
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            quantised.append(f"{key} is a {type(weight).__name__} of {weight.dtype}")
    if quantised:
        raise ValueError(
            f"the model is quantised ({quantised[0]}): to save a checkpoint, load the model unquantised (.safetensors)"
        )


def _check_saves_whole(model: HostModel, vae: Vae, conditioning: Conditioning) -> None:
    """Raise ``ValueError`` where something changes the weights only while they run, which no file of weights can hold."""
    for name, patcher in (("MODEL", model), ("VAE", vae.patcher)):
        found = [*getattr(patcher, "injections", {}), *getattr(patcher, "weight_wrapper_patches", {})]
        if found:
            raise ValueError(
                f"another node changes the {name} while it runs ({found[0]}), as Load LoRA (Bypass) does, which a checkpoint "
                "cannot hold: use Load LoRA instead, or leave that node out"
            )
    if any(extra.get("hooks") for _, extra in conditioning) or getattr(model, "forced_hooks", None):
        raise ValueError(
            "the conditioning carries hooks, such as a hook LoRA, which a checkpoint cannot hold: use Load LoRA on the MODEL "
            "instead, or leave the hooks out"
        )


def to_bundle(model: HostModel, vae: Vae, conditioning: Conditioning, dtype: torch.dtype, notes: Mapping[str, str]) -> Bundle:
    """A self-contained bundle of native objects, their patches merged, with weights in ``dtype``.

    The VAE's are as ``vae_weights`` gives them.

    Raises:
        ValueError: for several prompts, of which a bundle holds one, for a quantised model, and for what acts on weights only
            while they run.
    """
    if model.get_attachment(layers.POOLED) is not None:
        raise ValueError(
            "this checkpoint is folded, which cannot be saved again: copy its file, or load the checkpoint it was folded from"
        )
    if len(conditioning) > 1:
        raise ValueError(
            f"the conditioning combines {len(conditioning)} prompts: a checkpoint can store only one; connect a single prompt"
        )
    _check_saves_whole(model, vae, conditioning)
    native = merged_weights(model, "diffusion_model.", dtype)
    unet = model.model.model_config.unet_config
    heads = unet["depth"]
    blocks = unet.get("num_blocks", heads)
    transformer = {}
    for name, target in comfy.utils.mmdit_to_diffusers({"depth": heads, "num_blocks": blocks}).items():
        key, offset, *function = target if isinstance(target, tuple) else (target, None)
        if key in native:
            weight = native[key] if offset is None else native[key].narrow(*offset)
            transformer[name] = function[0](weight) if function else weight
    with uncompiled(vae.patcher.model):
        original = merged_weights(vae.patcher, "", torch.float32)
    shape = vae_shape(original)
    autoencoder = vae_weights(weights_to_diffusers(original, len(shape["widths"])), dtype)
    return Bundle(
        kind="merged",
        prompt=from_conditioning(conditioning).to("cpu", dtype),
        transformer=transformer,
        vae=autoencoder,
        configs={"transformer": _transformer_config(unet, native, blocks), "vae": _vae_config(shape, original, model)},
        defaults=defaults_of(model),
        notes=notes,
        preview=model.get_attachment(PREVIEW) or (),
    )


def _transformer_config(unet: Mapping[str, Any], native: Mapping[str, Tensor], blocks: int) -> dict[str, Any]:
    hidden, channels, patch, _ = native["x_embedder.proj.weight"].shape
    dual = unet.get("x_block_self_attn_layers") or []
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": native["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": blocks,
        "attention_head_dim": 64,
        "num_attention_heads": hidden // 64,
        "caption_projection_dim": hidden,
        "joint_attention_dim": native["context_embedder.weight"].shape[1],
        "pooled_projection_dim": native["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": round(native["pos_embed"].shape[1] ** 0.5),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if unet.get("qk_norm") else None,
    }


def _vae_config(shape: Mapping[str, Any], weights: Mapping[str, Tensor], model: HostModel) -> dict[str, Any]:
    levels = len(shape["widths"])
    form = model.model.latent_format
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": shape["widths"],
        "layers_per_block": shape["layers"],
        "latent_channels": shape["latents"],
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": form.scale_factor,
        "shift_factor": form.shift_factor,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }
