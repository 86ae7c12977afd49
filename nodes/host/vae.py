"""Encoding and decoding of any size through the modules of the host's own VAE object: exact tiles, image by image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ...tsdsr_core.vae_plan import HEADROOM, plan_tiles
from ...tsdsr_core.vae_program import Program, decoder_program, encoder_program
from ...tsdsr_core.vae_tiled import plan_and_run
from . import running

UNITS = 16
"""What one image counts for in progress on its way through the encoder or the decoder."""
_SHARE = 0.9
"""Of the memory of a device; the rest is for what other programs take."""


def factor_of(vae: Any) -> int:
    """Pixels per latent cell."""
    return int(vae.spacial_compression_encode())


def encode(vae: Any, pixels: Tensor, progress: running.Progress, tile: int | None = None) -> Tensor:
    """``(B, 3, H, W)`` in -1..1, sides multiples of the factor, to unscaled latents ``(B, C, h, w)`` in fp32.

    Args:
        tile: greatest side of a tile in pixels; None for what suits the memory.

    Raises:
        FloatingPointError: where the VAE overflows.
    """
    moments = _run(vae, encoder_program, pixels, progress, tile)
    return _finite(moments.chunk(2, 1)[0]).float()


def decode(vae: Any, latents: Tensor, progress: running.Progress, tile: int | None = None) -> Tensor:
    """Unscaled latents ``(B, C, h, w)`` to pixels ``(B, 3, H, W)`` in -1..1, fp32.

    Raises:
        ValueError: for latents of another VAE.
        FloatingPointError: where the VAE overflows.
    """
    if latents.ndim != 4 or 0 in latents.shape or latents.shape[1] != vae.latent_channels:
        raise ValueError(
            f"the latent has the shape {tuple(latents.shape)}: this VAE takes (batch, {vae.latent_channels}, height, width)"
        )
    return _finite(_run(vae, decoder_program, latents, progress, tile)).float()


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise FloatingPointError("the VAE overflowed: choose vae_precision fp32 in TSD-SR's loader")
    return values


def _run(vae: Any, half: Callable[..., Program], x: Tensor, progress: running.Progress, tile: int | None) -> Tensor:
    program = half(vae.first_stage_model, patched=bool(vae.patcher.patches))  # patches come in with the loading, below
    x = x.to(vae.output_device, vae.vae_dtype)
    device, cpu = vae.patcher.load_device, torch.device("cpu")
    wanted = plan_tiles([op.form for op in program], x.shape[2], x.shape[3], x.dtype.itemsize, _obtainable(vae), tile)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=wanted.device_bytes / HEADROOM)
    with _current(device):
        return plan_and_run(
            program, x, device, lambda: running.free_memory(vae.patcher), tile,
            lambda: comfy.model_management.get_free_memory(cpu), _affine, _ticker(progress, len(x)), running.release_memory,
        )  # fmt: skip


def _obtainable(vae: Any) -> int | None:
    """Memory of the VAE's device but for its weights: the host unloads other models for what it is asked for."""
    if running.free_memory(vae.patcher) is None:
        return None
    total = comfy.model_management.get_total_memory(vae.patcher.load_device)
    return int(_SHARE * total) - vae.model_size()


def _affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm on the device and in the type of ``like``, wherever the host keeps them."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, like, offloadable=True)
    found = weight.clone(), bias.clone()
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return found


def _ticker(progress: running.Progress, images: int) -> Callable[[int, int], None]:
    """Counts a run's tiles as ``UNITS`` for each image; Cancel ends the run."""
    counted = 0

    def tick(done: int, total: int) -> None:
        nonlocal counted
        running.check_interrupted()
        reached = done * UNITS * images // total
        if reached > counted:
            progress.update(reached - counted)
            counted = reached

    return tick


def _current(device: torch.device) -> Any:
    """Makes ``device`` the current one, where the host knows several."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return contextlib.nullcontext() if context is None else context(device)
