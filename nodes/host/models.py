"""Native model and VAE objects built from bundles, and checks of those from other loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import comfy.model_base
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ...tsdsr_core.families.bundle import Bundle, read_bundle
from ...tsdsr_core.system.memory import is_out_of_memory
from ...tsdsr_core.system.precision import fits
from ...tsdsr_core.vae.program import Replaced, decoder_program, encoder_program
from ...tsdsr_core.weights.prompt import PromptEmbeds
from ...tsdsr_core.weights.vae_keys import weights_to_original
from ..types import Conditioning, HostModel, LatentFormat, Patcher, Vae
from . import layers
from .vae import changed_by_others, check_unchanged

DEFAULTS: Final = "tsdsr_defaults"
PREVIEW: Final = "tsdsr_preview"
FACTOR: Final = "tsdsr_vae_factor"
"""Names of the attachments with which a model carries the options that suit it, how its latents look, and how many pixels a
side one cell of them stands for; a LATENT carries the last one, too."""
_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of the weights of a part."""
_SD3_FACTOR, _SD3_PROMPT_WIDTH = 8, 4096
_OWN_VAES = "connect the VAE of Stable Diffusion 3, or the VAE output of TSD-SR Load LoRA or TSD-SR Load Checkpoint"
_SD3_WIDTHS = [128, 256, 512, 512]
NORM_GROUPS = 32
"""ComfyUI's autoencoder knows no other number."""


def build_model(bundle: Bundle, **options: Any) -> HostModel:
    """A MODEL from the merged transformer of a bundle; ``options`` are the host loader's.

    Raises:
        ValueError: where ComfyUI cannot hold it.
    """
    blocks, heads = (bundle.configs["transformer"].get(name) for name in ("num_layers", "num_attention_heads"))
    if blocks != heads:
        raise ValueError(
            f"the transformer has {blocks} blocks and {heads} heads: ComfyUI supports SD3 only with as many blocks as heads; "
            "run this bundle with tsdsr upscale"
        )
    weights = layers.padded_to_host(bundle.transformer) if bundle.folded else dict(bundle.transformer)
    if bundle.eight_bit:
        weights = layers.float8_for_host(weights)
    elif bundle.int8:
        weights = layers.int8_for_host(weights)
    model = comfy.sd.load_diffusion_model_state_dict(weights, **options)
    if model is None or not isinstance(model.model, comfy.model_base.SD3) or weights:
        raise ValueError(f"ComfyUI cannot load this bundle's transformer as SD3; unused weights: {sorted(weights)[:8]}")
    if bundle.folded:
        layers.remove_padding(model, bundle.prompt.pooled.float())
    _check_scaling(bundle, model.model.latent_format)
    model.set_attachments(DEFAULTS, dict(bundle.defaults))
    model.set_attachments(FACTOR, 2 ** (len(bundle.configs["vae"]["block_out_channels"]) - 1))
    if bundle.preview:
        model.set_attachments(PREVIEW, bundle.preview)
        _set_preview(model.model.latent_format, bundle.preview)
    return model


def _check_scaling(bundle: Bundle, form: LatentFormat) -> None:
    factor = bundle.configs["vae"]["scaling_factor"]
    if abs(factor - form.scale_factor) > 1e-4:
        raise ValueError(
            f"the VAE has the scaling factor {factor:g}: ComfyUI supports only {form.scale_factor:g} for SD3; run this bundle "
            "with tsdsr upscale"
        )


def _set_preview(form: LatentFormat, rows: Sequence[Sequence[float]]) -> None:
    """Let the host's previews show this model's latents, which it shifts and scales: ``(z - shift) * scale``."""
    *factors, added = torch.tensor(rows, dtype=torch.float32)
    channels = torch.stack(factors)
    form.latent_rgb_factors = (channels / form.scale_factor).tolist()
    form.latent_rgb_factors_bias = (added + form.shift_factor * channels.sum(0)).tolist()
    form.taesd_decoder_name = None  # SD3's


def build_vae(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Vae:
    """A VAE from an SD3-like autoencoder's weights under their original names.

    Args:
        dtype: of the weights, fp32 where one of them is beyond it; None lets the host choose.

    Raises:
        ValueError: where ComfyUI cannot hold it.
    """
    sd = dict(weights)
    if dtype is not None and not fits("VAE", sd.values(), dtype):
        dtype = torch.float32
    shape = vae_shape(sd)
    if any(width % NORM_GROUPS for width in shape["widths"]):
        raise ValueError(f"the VAE has widths {shape['widths']}: ComfyUI supports only multiples of {NORM_GROUPS}")
    if any(f"{half}.mid.attn_1.q.weight" not in sd for half in ("encoder", "decoder")):
        raise ValueError(
            "the VAE has no attention in its middle block, which ComfyUI requires; run this bundle with tsdsr upscale"
        )
    if shape["widths"] == _SD3_WIDTHS:
        return comfy.sd.VAE(sd=sd, dtype=dtype)
    for name, channels in (("quant_conv", 2 * shape["latents"]), ("post_quant_conv", shape["latents"])):
        sd.setdefault(f"{name}.weight", torch.eye(channels, dtype=torch.float32)[:, :, None, None])
        sd.setdefault(f"{name}.bias", torch.zeros(channels, dtype=torch.float32))
    first = shape["widths"][0]
    options = {
        "double_z": True, "z_channels": shape["latents"], "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": first,
        "ch_mult": [width // first for width in shape["widths"]], "num_res_blocks": shape["layers"], "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    vae = comfy.sd.VAE(sd=sd, dtype=dtype, config={"params": {"ddconfig": options, "embed_dim": shape["latents"]}})
    vae.latent_channels = shape["latents"]
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(shape["widths"]) - 1)
    vae.get_sd = _refuse_saving
    return vae


def _refuse_saving() -> Any:
    raise ValueError("ComfyUI's own VAE loader cannot load this VAE: save it with TSD-SR Save Checkpoint")


def load_bundle(path: Path, vae_dtype: torch.dtype | None = None) -> tuple[HostModel, Vae, Conditioning]:
    """MODEL, VAE and CONDITIONING of a model bundle.

    Args:
        vae_dtype: of the VAE's weights; None for the fastest that keeps what TSD-SR's LoRA changed.

    Raises:
        ValueError: for a file that is not a bundle, a bundle of LoRAs, or one that ComfyUI cannot hold.
    """
    bundle = read_bundle(path, "merged")
    try:
        model, vae = build_model(bundle), _bundled_vae(bundle, vae_dtype)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} does not match its configuration: {' '.join(str(error).split())[:300]}") from error
    # newer hosts build a model again from this for a second device, and where dynamic VRAM does not go with a node
    model.cached_patcher_init = (_load_model, (path,))
    vae.patcher.cached_patcher_init = (_load_vae, (path, vae_dtype))
    return model, vae, to_conditioning(bundle.prompt)


def _bundled_vae(bundle: Bundle, dtype: torch.dtype | None) -> Vae:
    levels, groups = len(bundle.configs["vae"]["block_out_channels"]), bundle.configs["vae"]["norm_num_groups"]
    if groups != NORM_GROUPS:
        raise ValueError(
            f"the VAE has {groups} norm groups: ComfyUI supports only {NORM_GROUPS}; run this bundle with tsdsr upscale"
        )
    if dtype is None:
        device = comfy.model_management.vae_device()
        dtype = comfy.model_management.vae_dtype(device, [torch.float16, torch.float32])
        dtype = precise_dtype(device) if dtype == torch.bfloat16 else dtype
    return build_vae(weights_to_original(bundle.vae, levels), dtype)


def _load_model(path: Path, **options: Any) -> HostModel:
    return build_model(read_bundle(path), **options)


def _load_vae(path: Path, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Patcher:
    return _bundled_vae(read_bundle(path), dtype).patcher


def check_sd3(model: HostModel) -> None:
    """Raise ``ValueError`` unless ``model`` is a Stable Diffusion 3 model."""
    if not isinstance(model.model, comfy.model_base.SD3):
        name = type(model.model).__name__
        raise ValueError(
            f"the MODEL is not Stable Diffusion 3 ({name}): connect Stable Diffusion 3 medium or the built-in model"
        )


def check_vae(vae: Vae, model: HostModel | None = None) -> None:
    """Raise ``ValueError`` unless ``vae`` is an autoencoder in the layout of Stable Diffusion 3's, and the model's own.

    All nodes that take a VAE ask this before any work.  Others in SD3's layout pass, such as finetuned ones: they differ in
    weights alone, from which nothing follows.

    Args:
        model: a MODEL that it is to go with, if there is one.
    """
    module = getattr(vae, "first_stage_model", None)
    if module is None:
        raise ValueError(f"the VAE has no weights: {_OWN_VAES}")
    check_unchanged(vae)
    try:
        encoder_program(module, patched=True)
        decoder_program(module, patched=True)
        understood = vae.latent_dim == 2 and module.decoder.conv_in.weight.shape[1] == vae.latent_channels
    except Replaced as error:
        raise ValueError(changed_by_others(str(error))) from error
    except (ValueError, AttributeError):
        understood = False
    if not understood:
        kind = {"PixelspaceConversionVAE": "pixel_space"}.get(type(module).__name__, type(module).__name__)
        raise ValueError(f"the VAE is of another kind ({kind}): {_OWN_VAES}")
    if model is None or not isinstance(model.model, comfy.model_base.SD3):
        return
    channels = model.model.latent_format.latent_channels
    if vae.latent_channels != channels:
        raise ValueError(f"the VAE has {vae.latent_channels} latent channels, but the MODEL expects {channels}: {_OWN_VAES}")
    check_factor(int(vae.spacial_compression_encode()), model)


def check_factor(factor: int | None, model: HostModel) -> None:
    """Raise ``ValueError`` where latents of ``factor`` pixels a cell are certainly not this MODEL's; None is not known.

    A MODEL of this pack's loaders carries its factor; one that takes the prompts of SD3's text encoders is SD3's.
    """
    known = model.get_attachment(FACTOR)
    if known is None and model.model.diffusion_model.context_embedder.in_features == _SD3_PROMPT_WIDTH:
        known = _SD3_FACTOR
    if None not in (known, factor) and known != factor:
        raise ValueError(
            f"the VAE has {factor} pixels per latent cell, but the MODEL expects {known}: connect MODEL and VAE from the same "
            "loader (SD3 with its own VAE, the built-in model with the VAE output of TSD-SR Load Checkpoint)"
        )


def plain_key(key: str) -> str:
    """The name that a weight has where its part was not compiled."""
    return key.replace(_COMPILED, "")


def precise_dtype(device: torch.device) -> torch.dtype:
    """The fastest type of a VAE on ``device`` that keeps a small LoRA, which bf16 does not."""
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def to_conditioning(prompt: PromptEmbeds) -> Conditioning:
    """Prompt embeddings as CONDITIONING."""
    return [[prompt.tokens.float(), {"pooled_output": prompt.pooled.float()}]]


def from_conditioning(conditioning: Conditioning) -> PromptEmbeds:
    """The first entry of a CONDITIONING as prompt embeddings."""
    tokens, extra = conditioning[0]
    return PromptEmbeds(tokens, extra["pooled_output"])


def defaults_of(model: HostModel) -> dict[str, Any]:
    """The options that suit ``model``, if it came with any: ``process_size``, ``wavelet_levels``."""
    return dict(model.get_attachment(DEFAULTS) or {})


def vae_shape(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Widths per level, residual layers per encoder level and latent channels of an autoencoder."""
    widths = []
    while f"decoder.up.{len(widths)}.block.0.conv2.weight" in weights:
        widths.append(weights[f"decoder.up.{len(widths)}.block.0.conv2.weight"].shape[0])
    if not widths:
        raise ValueError("the VAE is not the autoencoder of Stable Diffusion 3: it has no decoder.up.0")
    layers = 0
    while f"decoder.up.0.block.{layers + 1}.conv1.weight" in weights:
        layers += 1
    return {"widths": widths, "layers": layers, "latents": weights["decoder.conv_in.weight"].shape[1]}
