"""Native model and VAE objects, built from bundles; what is known of those from other loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ...tsdsr_core.bundle import Bundle, read_bundle
from ...tsdsr_core.prompt import PromptEmbeds
from ...tsdsr_core.vae_keys import weights_to_original
from . import eight_bit, folded

DEFAULTS, PREVIEW = "tsdsr_defaults", "tsdsr_preview"
"""Names of the attachments with which a model carries the options that suit it and how its latents look."""
_SD3_WIDTHS = [128, 256, 512, 512]
NORM_GROUPS = 32
"""ComfyUI's autoencoder knows no other number."""


def build_model(bundle: Bundle, **options: Any) -> Any:
    """A MODEL from the merged transformer of a bundle; ``options`` are the host loader's.

    Raises:
        ValueError: where ComfyUI cannot hold it.
    """
    blocks, heads = (bundle.configs["transformer"].get(name) for name in ("num_layers", "num_attention_heads"))
    if blocks != heads:
        raise ValueError(
            f"a transformer of {blocks} blocks with {heads} heads: ComfyUI takes SD3 to have as many blocks as heads; run this "
            "bundle with tsdsr upscale"
        )
    weights = folded.widened(bundle.transformer) if bundle.folded else dict(bundle.transformer)
    if bundle.eight_bit:
        weights = eight_bit.hosted(weights)
    model = comfy.sd.load_diffusion_model_state_dict(weights, **options)
    if model is None or not isinstance(model.model, comfy.model_base.SD3) or weights:
        raise ValueError(f"ComfyUI cannot load this bundle's transformer as SD3; left over: {sorted(weights)[:8]}")
    if bundle.folded:
        folded.narrow(model, bundle.prompt.pooled.float())
    model.set_attachments(DEFAULTS, dict(bundle.defaults))
    if bundle.preview:
        model.set_attachments(PREVIEW, bundle.preview)
        _set_preview(model.model.latent_format, bundle.preview)
    return model


def _set_preview(form: Any, rows: Sequence[Sequence[float]]) -> None:
    """Let the host's previews show this model's latents, which it shifts and scales: ``(z - shift) * scale``."""
    *factors, added = torch.tensor(rows)
    channels = torch.stack(factors)
    form.latent_rgb_factors = (channels / form.scale_factor).tolist()
    form.latent_rgb_factors_bias = (added + form.shift_factor * channels.sum(0)).tolist()
    form.taesd_decoder_name = None  # SD3's


def build_vae(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """A VAE from an SD3-like autoencoder's weights under their original names.

    Args:
        dtype: of the weights; None lets the host choose.

    Raises:
        ValueError: where ComfyUI cannot hold it.
    """
    sd = dict(weights)
    shape = vae_shape(sd)
    if any(width % NORM_GROUPS for width in shape["widths"]):
        raise ValueError(f"VAE widths {shape['widths']}: ComfyUI needs multiples of {NORM_GROUPS}")
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
    return vae


def load_bundle(path: Path, vae_dtype: torch.dtype | None = None) -> tuple[Any, Any, list[Any]]:
    """MODEL, VAE and CONDITIONING of a merged bundle.

    Args:
        vae_dtype: of the VAE's weights; None for the fastest that keeps what TSD-SR's LoRA changed.

    Raises:
        ValueError: for a file that is no bundle, a LoRA bundle, or one that ComfyUI cannot hold.
    """
    bundle = read_bundle(path)
    if bundle.kind != "merged":
        raise ValueError(
            "this bundle holds only LoRAs: choose it in TSD-SR Load LoRA and TSD-SR Load Prompt instead, or take a merged one"
        )
    model, vae = build_model(bundle), _bundled_vae(bundle, vae_dtype)
    # newer hosts build a model again from this for a second device, and where dynamic VRAM does not go with a node
    model.cached_patcher_init = (_load_model, (path,))
    vae.patcher.cached_patcher_init = (_load_vae, (path, vae_dtype))
    return model, vae, to_conditioning(bundle.prompt)


def _bundled_vae(bundle: Bundle, dtype: torch.dtype | None) -> Any:
    levels = len(bundle.configs["vae"]["block_out_channels"])
    if dtype is None:
        device = comfy.model_management.vae_device()
        dtype = comfy.model_management.vae_dtype(device, [torch.float16, torch.float32])
        dtype = precise_dtype(device) if dtype == torch.bfloat16 else dtype
    return build_vae(weights_to_original(bundle.vae, levels), dtype)


def _load_model(path: Path, **options: Any) -> Any:
    return build_model(read_bundle(path), **options)


def _load_vae(path: Path, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    return _bundled_vae(read_bundle(path), dtype).patcher


def check_sd3(model: Any) -> None:
    """Raise ``ValueError`` unless ``model`` is a Stable Diffusion 3 model."""
    if not isinstance(model.model, comfy.model_base.SD3):
        name = type(model.model).__name__
        raise ValueError(f"the MODEL is a {name}: TSD-SR runs on Stable Diffusion 3 medium; connect that or the built-in model")


def precise_dtype(device: torch.device) -> torch.dtype:
    """The fastest type of a VAE on ``device`` that keeps a small LoRA, which bf16 does not."""
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


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


def vae_shape(weights: Mapping[str, Any]) -> dict[str, Any]:
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
