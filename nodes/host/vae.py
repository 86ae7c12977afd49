"""Encoding and decoding of any size, image by image, through the host's own VAE object."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from . import running

TILE, OVERLAP = 128, 32
"""Latent cells; tiles this wide keep the estimate that each tile makes of the whole picture's statistics close."""
_HEADROOM = 0.9


def factor_of(vae: Any) -> int:
    """Pixels per latent cell."""
    return int(vae.spacial_compression_encode())


def encode(vae: Any, pixels: Tensor, progress: running.Progress) -> Tensor:
    """``(B, 3, H, W)`` in -1..1, sides multiples of the factor, to unscaled latents ``(B, C, h, w)`` in fp32."""
    factor = factor_of(vae)
    images = (pixels / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    results = []
    for image in images.split(1):
        shape = (1, 3, image.shape[1], image.shape[2])
        if _fits(vae, vae.memory_used_encode(shape, vae.vae_dtype)):
            running.check_interrupted()
            results.append(vae.encode(image))
            progress.update(tile_count(shape[2] // factor, shape[3] // factor))
        else:
            _load(vae, vae.memory_used_encode((1, 3, TILE * factor, TILE * factor), vae.vae_dtype))
            results.append(
                comfy.utils.tiled_scale(
                    image.movedim(-1, 1),
                    lambda tile: vae.first_stage_model.encode(_ready(vae, vae.process_input(tile))).float(),
                    tile_x=TILE * factor, tile_y=TILE * factor, overlap=OVERLAP * factor, upscale_amount=1 / factor,
                    out_channels=vae.latent_channels, output_device=vae.output_device, pbar=progress,
                )
            )  # fmt: skip
    return torch.cat(results).float()


def decode(vae: Any, latents: Tensor, progress: running.Progress) -> Tensor:
    """Unscaled latents ``(B, C, h, w)`` to pixels ``(B, 3, H, W)`` in -1..1, fp32.

    Raises:
        ValueError: for latents of another VAE.
        FloatingPointError: where the VAE overflows.
    """
    factor = factor_of(vae)
    if latents.ndim != 4 or 0 in latents.shape or latents.shape[1] != vae.latent_channels:
        raise ValueError(
            f"the latent has the shape {tuple(latents.shape)}: this VAE takes (batch, {vae.latent_channels}, height, width)"
        )
    results = []
    for latent in latents.split(1):
        if _fits(vae, vae.memory_used_decode(latent.shape, vae.vae_dtype)):
            running.check_interrupted()
            results.append(vae.decode(latent).movedim(-1, 1) * 2 - 1)
            progress.update(tile_count(*latent.shape[2:]))
        else:
            _load(vae, vae.memory_used_decode((1, latent.shape[1], TILE, TILE), vae.vae_dtype))
            results.append(
                comfy.utils.tiled_scale(
                    latent,
                    lambda tile: vae.first_stage_model.decode(_ready(vae, tile)).float(),
                    tile_x=TILE, tile_y=TILE, overlap=OVERLAP, upscale_amount=factor, out_channels=3,
                    output_device=vae.output_device, pbar=progress,
                )
            )  # fmt: skip
        if not torch.isfinite(results[-1]).all():
            raise FloatingPointError("the VAE overflowed: choose vae_precision fp32 in TSD-SR's loader")
    return torch.cat(results).float()


def total(vae: Any, batch: Tensor, padded: tuple[int, int]) -> int:
    """Progress units for one way through the VAE of a batch whose pictures have ``padded`` pixels."""
    factor = factor_of(vae)
    return len(batch) * tile_count(padded[0] // factor, padded[1] // factor)


def tile_count(height: int, width: int) -> int:
    """What one image of ``height`` x ``width`` latent cells counts for in progress, tiled or not."""
    return comfy.utils.get_tiled_scale_steps(width, height, TILE, TILE, OVERLAP)


def _fits(vae: Any, needed: float) -> bool:
    device = vae.patcher.load_device
    return needed < _HEADROOM * comfy.model_management.get_total_memory(device) and needed < _HEADROOM * _obtainable(device)


def _obtainable(device: torch.device) -> float:
    """Free memory, plus what the host would free by unloading its models."""
    loaded = sum(
        model.model_loaded_memory()
        for model in comfy.model_management.current_loaded_models
        if model.device == device and model.model is not None  # None: gone, and not yet taken off the host's list
    )
    return comfy.model_management.get_free_memory(device) + loaded


def _load(vae: Any, needed: float) -> None:
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)


def _ready(vae: Any, tile: Tensor) -> Tensor:
    running.check_interrupted()
    return tile.to(vae.patcher.load_device, vae.vae_dtype)
