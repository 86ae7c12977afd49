"""Inputs that several nodes share, with their limits and what they say of themselves."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tsdsr_core.colour import METHODS, WAVELET_LEVELS
from ..tsdsr_core.memory import TILE_SIDES
from ..tsdsr_core.tile_plan import OVERLAP, TILE
from .host import running
from .host.sampling import StepSettings
from .host.schema import field

PRECISIONS = {"auto": None, "fp16": torch.float16, "fp32": torch.float32}


def strength() -> Any:
    """The dial between faithful and generative."""
    return field(
        io.Float, "strength", default=1.0, min=0.0, max=2.0, step=0.05,
        tooltip="How much of the step is taken: 1 as published, less stays closer to the input, 0 leaves what the VAE does.",
    )  # fmt: skip


def vae_precision(automatic: str) -> Any:
    """Type of the VAE's weights."""
    return field(
        io.Combo, "vae_precision", options=list(PRECISIONS), default="auto", advanced=True,
        tooltip=f"Type of the VAE. bf16 is too coarse for TSD-SR's change of it. auto {automatic}",
    )  # fmt: skip


def tiling() -> list[Any]:
    """Tile side, overlap and batch of the transformer."""
    return [
        field(
            io.Int, "tile", default=0, min=0, max=384, step=2, advanced=True,
            tooltip="Side of the transformer's tiles in latent cells (8 pixels each for SD3). 0 takes about 64, which TSD-SR "
            "was trained on, or less where memory is short.",
        ),
        field(
            io.Int, "tile_overlap", default=OVERLAP, min=0, max=128, step=2, advanced=True,
            tooltip="Least overlap of neighbouring tiles in latent cells. More hides seams better and takes longer.",
        ),
        field(
            io.Int, "tile_batch", default=0, min=0, max=64, advanced=True,
            tooltip="Tiles that run at once. 0 takes as many as fit into free memory.",
        ),
    ]  # fmt: skip


def vae_tile() -> Any:
    """Side of the VAE's tiles; optional, since saved workflows may not have it."""
    return field(
        io.Int, "vae_tile", default=0, min=0, max=8192, step=16, optional=True, advanced=True,
        tooltip="Greatest side of the VAE's tiles in pixels; the result is the same. 0 takes what suits the memory.",
    )  # fmt: skip


def prompt_tokens() -> Any:
    """How many tokens of the prompt to keep; optional, since saved workflows may not have it."""
    return field(
        io.Int, "prompt_tokens", default=0, min=0, max=4096, optional=True, advanced=True,
        tooltip="Keeps only so many of the prompt's tokens, those that differ most: quicker, not as published. 0 keeps all.",
    )  # fmt: skip


def colour_fix(source: str, levels: int = WAVELET_LEVELS, automatic: str = "") -> Any:
    """The colour fix from ``source``, with the one setting that one of them has; ``levels`` is its default."""
    wavelet_levels = field(
        io.Int, "wavelet_levels", default=levels, min=min(levels, 1), max=8, advanced=True,
        tooltip=f"More levels take only the broadest colours from {source}. 5 is the published value.{automatic}",
    )  # fmt: skip
    return field(
        io.DynamicCombo, "color_fix",
        options=[io.DynamicCombo.Option(name, [wavelet_levels] if name == "wavelet" else []) for name in METHODS],
        tooltip=f"What is taken from {source}: with wavelet the low frequencies, with adain mean and contrast of each colour, "
        "with lab the mean lightness and mean and contrast of the chroma, with none nothing.",
    )  # fmt: skip


def step_settings(strength: float, tile: int, tile_overlap: int, tile_batch: int) -> StepSettings:
    """The checked settings.

    Raises:
        ValueError: for a tile too small to see anything, or an overlap that is not below the tile.
    """
    if 0 < tile < TILE_SIDES[-1]:
        raise ValueError(f"tile {tile}: expected 0 for automatic, or at least {TILE_SIDES[-1]}")
    side = tile or TILE
    if tile_overlap >= side:
        raise ValueError(f"tile_overlap {tile_overlap} is not below tile {side}: make it smaller")
    return StepSettings(strength, tile, tile_overlap, tile_batch)


def to_core(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """A host IMAGE ``(B, H, W, 1, 3 or 4)`` as ``(B, 3, H, W)`` in 0..1 and its alpha ``(B, 1, H, W)`` or None.

    Both on the host's device for results, wherever the picture comes from.

    Raises:
        ValueError: for another shape, an empty batch, NaN or infinite pixels.
    """
    if image.ndim == 4 and image.shape[-1] == 1:
        image = image.expand(-1, -1, -1, 3)
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"the image has the shape {tuple(image.shape)}: expected (batch, height, width, 3 or 4), not empty")
    if not torch.isfinite(image).all():
        raise ValueError("the image has NaN or infinite pixels: check the node before")
    channels = image.to(running.results_device(), torch.float32).movedim(-1, 1).clamp(0, 1)
    return channels[:, :3], channels[:, 3:] if channels.shape[1] == 4 else None


def to_host(image: Tensor, alpha: Tensor | None) -> Tensor:
    """The inverse of ``to_core``."""
    channels = image if alpha is None else torch.cat((image, alpha), 1)
    return channels.movedim(1, -1).contiguous()
