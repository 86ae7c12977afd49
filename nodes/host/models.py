"""Native model and VAE objects: built from bundles, patched by LoRAs, read back into bundles."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...tsdsr_core.bundle import Bundle
from ...tsdsr_core.lora import Lora, check_fit
from ...tsdsr_core.prompt import PromptEmbeds
from ...tsdsr_core.vae_keys import to_original, weights_to_diffusers, weights_to_original

DEFAULTS = "tsdsr_defaults"
"""Name of the attachment with which a model carries the options that suit it."""
_SD3_WIDTHS = [128, 256, 512, 512]
_NORM_GROUPS = 32
"""ComfyUI's autoencoder knows no other number."""


def build_model(bundle: Bundle) -> Any:
    """A MODEL from the merged transformer of a bundle.

    Raises:
        ValueError: where ComfyUI cannot hold it.
    """
    weights = dict(bundle.transformer)
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    if model is None or not isinstance(model.model, comfy.model_base.SD3) or weights:
        raise ValueError(f"ComfyUI cannot load this bundle's transformer as SD3; left over: {sorted(weights)[:8]}")
    model.set_attachments(DEFAULTS, dict(bundle.defaults))
    return model


def build_vae(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """A VAE from an SD3-like autoencoder's weights under their original names.

    Args:
        dtype: of the weights; None lets the host choose.

    Raises:
        ValueError: where ComfyUI cannot hold it.
    """
    sd = dict(weights)
    shape = _vae_shape(sd)
    if any(width % _NORM_GROUPS for width in shape["widths"]):
        raise ValueError(f"VAE widths {shape['widths']}: ComfyUI needs multiples of {_NORM_GROUPS}")
    if shape["widths"] == _SD3_WIDTHS:
        return comfy.sd.VAE(sd=sd, dtype=dtype)
    sd.setdefault("quant_conv.weight", torch.eye(2 * shape["latents"])[:, :, None, None])
    sd.setdefault("quant_conv.bias", torch.zeros(2 * shape["latents"]))
    sd.setdefault("post_quant_conv.weight", torch.eye(shape["latents"])[:, :, None, None])
    sd.setdefault("post_quant_conv.bias", torch.zeros(shape["latents"]))
    first = shape["widths"][0]
    options = {
        "double_z": True, "z_channels": shape["latents"], "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": first,
        "ch_mult": [width // first for width in shape["widths"]], "num_res_blocks": shape["layers"], "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    vae = comfy.sd.VAE(sd=sd, dtype=dtype, config={"params": {"ddconfig": options, "embed_dim": shape["latents"]}})
    vae.latent_channels = shape["latents"]
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(shape["widths"]) - 1)
    _skip_idle_attention(vae.first_stage_model)
    return vae


def load_bundle(bundle: Bundle) -> tuple[Any, Any, list[Any]]:
    """MODEL, VAE and CONDITIONING of a merged bundle.

    Raises:
        ValueError: for a LoRA bundle, or one that ComfyUI cannot hold.
    """
    if bundle.kind != "merged":
        raise ValueError("this bundle holds only LoRAs: choose a merged one, or make it with TSD-SR Save Checkpoint")
    levels = len(bundle.configs["vae"]["block_out_channels"])
    vae = build_vae(weights_to_original(bundle.vae, levels))
    return build_model(bundle), vae, to_conditioning(bundle.prompt)


def check_sd3(model: Any) -> None:
    """Raise ``ValueError`` unless ``model`` is a Stable Diffusion 3 model."""
    if not isinstance(model.model, comfy.model_base.SD3):
        name = type(model.model).__name__
        raise ValueError(f"the MODEL is a {name}: TSD-SR runs on Stable Diffusion 3 medium; connect that or the built-in model")


def precise_dtype(vae: Any) -> torch.dtype | None:
    """None where the VAE's own type keeps a small LoRA; bf16 does not, so fp16 on a GPU, fp32 on the CPU."""
    if vae.vae_dtype != torch.bfloat16:
        return None
    return torch.float32 if vae.patcher.load_device.type == "cpu" else torch.float16


def to_conditioning(prompt: PromptEmbeds) -> list[Any]:
    """Prompt embeddings as CONDITIONING."""
    return [[prompt.tokens.float(), {"pooled_output": prompt.pooled.float()}]]


def from_conditioning(conditioning: list[Any]) -> PromptEmbeds:
    """The first entry of a CONDITIONING as prompt embeddings."""
    tokens, extra = conditioning[0]
    return PromptEmbeds(tokens, extra["pooled_output"])


def defaults_of(model: Any) -> dict[str, Any]:
    """The options that suit ``model``, if it came with any: ``process_size``, ``wavelet_levels``."""
    return dict(model.get_attachment(DEFAULTS) or {})


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
    """A copy of the VAE with the encoder's LoRA, in ``dtype`` where it differs from the VAE's.

    Raises:
        ValueError: where modules are left over or have other shapes.
    """
    weights = vae.first_stage_model.state_dict()
    if "decoder.up.0.block.0.conv1.weight" not in weights:
        raise ValueError(f"the VAE is a {type(vae.first_stage_model).__name__}: expected the one of Stable Diffusion 3")
    if dtype is None or dtype == vae.vae_dtype:
        patched = copy.copy(vae)
        patched.patcher = vae.patcher.clone()
    else:
        base = {key: entries[0][0] for key, entries in vae.patcher.get_key_patches().items()}
        patched = build_vae(base, dtype)
        patched.patcher.patches = {key: list(entries) for key, entries in vae.patcher.patches.items()}
    levels = len(_vae_shape(weights)["widths"])
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
            shape = list(weights[key].shape)
            if offset is not None:
                shape[offset[0]] = offset[2]
            linear = len(lora.pairs[name].weight_shape) == 2 and shape[2:] == [1, 1]  # the VAE's attention
            shapes[name] = tuple(shape[:2] if linear else shape)
    check_fit(lora, shapes)
    patches = comfy.lora.load_lora(lora.state_dict(), dict(targets))
    added = patcher.add_patches(patches, strength)
    if len(added) != len(lora.pairs):
        raise ValueError(f"ComfyUI took {len(added)} of the {len(lora.pairs)} modules of the {lora.target} LoRA")


def merged_weights(patcher: Any, prefix: str) -> dict[str, Tensor]:
    """All weights of a patcher's model under ``prefix``, without it, with their patches merged in fp32, on the CPU."""
    merged = {}
    for key, ((weight, convert), *patches) in patcher.get_key_patches(prefix).items():
        value = convert(weight.to("cpu", torch.float32, copy=True), inplace=False)  # merging works in place
        merged[key.removeprefix(prefix)] = comfy.lora.calculate_weight(patches, value, key)
    return merged


def to_bundle(model: Any, vae: Any, conditioning: list[Any], dtype: torch.dtype, notes: Mapping[str, str]) -> Bundle:
    """A self-contained bundle of native objects, their patches merged."""
    native = merged_weights(model, "diffusion_model.")
    unet = model.model.model_config.unet_config
    heads = unet["depth"]
    blocks = unet.get("num_blocks", heads)
    transformer = {}
    for name, target in comfy.utils.mmdit_to_diffusers({"depth": heads, "num_blocks": blocks}).items():
        key, offset, *function = target if isinstance(target, tuple) else (target, None)
        if key in native:
            weight = native[key] if offset is None else native[key].narrow(*offset)
            transformer[name] = (function[0](weight) if function else weight).to(dtype)
    original = merged_weights(vae.patcher, "")
    shape = _vae_shape(original)
    autoencoder = weights_to_diffusers(original, len(shape["widths"]))
    return Bundle(
        kind="merged",
        prompt=from_conditioning(conditioning).to("cpu", dtype),
        transformer=transformer,
        vae={name: weight.to(dtype) for name, weight in autoencoder.items()},
        configs={"transformer": _transformer_config(unet, native, blocks), "vae": _vae_config(shape, original, model)},
        defaults=defaults_of(model),
        notes=notes,
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


def _vae_config(shape: Mapping[str, Any], weights: Mapping[str, Tensor], model: Any) -> dict[str, Any]:
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
        "norm_num_groups": _NORM_GROUPS,
        "scaling_factor": form.scale_factor,
        "shift_factor": form.shift_factor,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }


def _vae_shape(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Widths per level, residual layers per encoder level and latent channels of an autoencoder."""
    widths = []
    while f"decoder.up.{len(widths)}.block.0.conv2.weight" in weights:
        widths.append(weights[f"decoder.up.{len(widths)}.block.0.conv2.weight"].shape[0])
    if not widths:
        raise ValueError("this is not the autoencoder of Stable Diffusion 3: it has no decoder.up.0")
    layers = 0
    while f"decoder.up.0.block.{layers + 1}.conv1.weight" in weights:
        layers += 1
    return {"widths": widths, "layers": layers, "latents": weights["decoder.conv_in.weight"].shape[1]}


def _skip_idle_attention(autoencoder: Any) -> None:
    """Skip mid-block attention whose output projection is zero: it adds nothing and costs the square of the pixels."""
    for half in (autoencoder.encoder, autoencoder.decoder):
        attention = half.mid.attn_1
        if not any(p.any() for p in attention.proj_out.parameters()):
            attention.forward = lambda x, **_: x
