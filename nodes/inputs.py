"""Inputs that several nodes share, with their limits and tooltips."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tsdsr_core.alpha import spread_colours
from ..tsdsr_core.colour import METHODS, WAVELET_LEVELS, WAVELET_LEVELS_RANGE
from ..tsdsr_core.pipeline import STRENGTH_RANGE, Options
from ..tsdsr_core.tiles.plan import MIN_TILE, OVERLAP, TILE, max_overlap
from .host import running
from .host.schema import field

PRECISIONS = {"auto": None, "fp16": torch.float16, "fp32": torch.float32}


MODEL = "The MODEL output of TSD-SR Load LoRA or TSD-SR Load Checkpoint."
VAE = "The VAE output of the same loader as the model."
CONDITIONING = (
    "The prompt: TSD-SR Load Prompt for SD3, or the CONDITIONING output of TSD-SR Load Checkpoint. CLIP Text Encode with "
    "SD3's text encoders also works."
)
"""Tooltips of inputs that are connections."""


def strength(zero: str = "latent unchanged") -> Any:
    """The dial between faithful and generative; ``zero`` says what is left at 0."""
    return field(
        io.Float, "strength", default=1.0, min=STRENGTH_RANGE[0], max=STRENGTH_RANGE[1], step=0.05,
        tooltip=f"How strongly the image is restored. 1 = full restoration, lower = closer to the original, 0 = {zero}. "
        "Above 1 exaggerates.",
    )  # fmt: skip


def vae_precision(automatic: str) -> Any:
    """Precision of the VAE's weights; ``automatic`` says what "auto" becomes."""
    return field(
        io.Combo, "vae_precision", options=list(PRECISIONS), default="auto", advanced=True,
        tooltip=f"Precision of the VAE. fp32 is the most exact, fp16 needs half the memory. auto = {automatic}.",
    )  # fmt: skip


def tiling() -> list[Any]:
    """Tile size, overlap and batch size of the transformer."""
    return [
        field(
            io.Int, "tile", default=0, min=0, max=384, step=2, advanced=True,
            tooltip="Tile size of the transformer in latent cells (1 cell = 8 pixels for SD3, 4 for the built-in model). "
            "Larger tiles see more of the image at once but need more memory. 0 = automatic (64 to 80, smaller if memory "
            "is limited).",
        ),
        field(
            io.Int, "tile_overlap", default=OVERLAP, min=0, max=128, step=2, advanced=True,
            tooltip="Minimum overlap of neighbouring tiles in latent cells. More overlap hides seams better but is slower.",
        ),
        field(
            io.Int, "tile_batch", default=0, min=0, max=64, advanced=True,
            tooltip="Number of tiles processed at once. It does not change the image; more is faster but needs more memory. "
            "0 = automatic (as many as fit in free memory).",
        ),
    ]  # fmt: skip


def vae_tile() -> Any:
    """Tile size of the VAE; optional, since saved workflows may not have it."""
    return field(
        io.Int, "vae_tile", default=0, min=0, max=8192, step=16, optional=True, advanced=True,
        tooltip="Maximum tile size of the VAE in pixels. It does not change the image; smaller tiles need less memory. "
        "0 = automatic (chosen to fit in memory).",
    )  # fmt: skip


def draft() -> Any:
    """Whether to decode with TAESD3; optional, since saved workflows do not have it."""
    return field(
        io.Boolean, "draft", default=False, optional=True, advanced=True,
        tooltip="Decodes with the small decoder TAESD3 instead of the VAE: faster and less exact, for trials. For SD3; needs "
        "taesd3_decoder.safetensors in models/vae_approx.",
    )  # fmt: skip


def prompt_tokens() -> Any:
    """How many tokens of the prompt to keep; optional, since saved workflows may not have it."""
    return field(
        io.Int, "prompt_tokens", default=0, min=0, max=4096, optional=True, advanced=True,
        tooltip="Number of prompt tokens to keep. Fewer is faster but changes the image; the tokens that differ most "
        "from each other are kept. 0 = all (as published).",
    )  # fmt: skip


def colour_fix(source: str, automatic: str) -> Any:
    """The choice of colour fix, and the number of wavelet levels.

    Args:
        source: what the colours come from, such as "the input".
        automatic: the number of levels that 0 stands for.
    """
    wavelet_levels = field(
        io.Int, "wavelet_levels", default=0, min=0, max=WAVELET_LEVELS_RANGE[1], advanced=True,
        tooltip=f"Fewer levels keep finer colour detail of {source}, more levels only the colours of large areas. "
        f"{WAVELET_LEVELS} = as published. 0 = automatic ({automatic}).",
    )  # fmt: skip
    return field(
        io.DynamicCombo, "color_fix",
        options=[io.DynamicCombo.Option(name, [wavelet_levels] if name == "wavelet" else []) for name in METHODS],
        tooltip=f"Corrects colours that the restoration has shifted. wavelet: keeps the colours of {source} (safest). "
        f"adain: matches the overall colour and contrast of {source}. lab: matches overall brightness and tint, keeps the "
        "restored contrast. none: no correction.",
    )  # fmt: skip


def step_options(strength: float, tile: int, tile_overlap: int, tile_batch: int) -> Options:
    """The checked options of the step.

    Raises:
        ValueError: for a tile size below the minimum, or an overlap that makes too many tiles.
    """
    if 0 < tile < MIN_TILE:
        raise ValueError(f"tile {tile}: expected 0 (automatic) or at least {MIN_TILE}")
    for name, value in (("tile", tile), ("tile_overlap", tile_overlap)):
        if value % 2:
            raise ValueError(
                f"{name} {value}: expected an even number, because the transformer works on patches of 2x2 latent cells"
            )
    most = max_overlap(tile or TILE)
    if tile_overlap > most:
        named = f"tile {tile}" if tile else f"the automatic tile size {TILE}"
        raise ValueError(f"tile_overlap {tile_overlap}: expected at most {most}, three quarters of {named}")
    return Options(strength=strength, tile=tile or None, tile_overlap=tile_overlap, tile_batch=tile_batch or None)


def to_core(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """A checked IMAGE ``(B, H, W, 1, 3 or 4)`` as ``(B, 3, H, W)`` in 0..1 and its alpha ``(B, 1, H, W)`` or None.

    Both are on the host's device for results, and views of ``image`` where nothing had to change: a clip is large.
    Transparent areas take the visible colours next to them.
    """
    channels = image.to(running.results_device(), torch.float32).movedim(-1, 1)
    low, high = channels.aminmax()
    if low < 0 or high > 1:
        channels = channels.clamp(0, 1)
    alpha = channels[:, 3:] if channels.shape[1] == 4 else None
    rgb = channels.expand(-1, 3, -1, -1) if channels.shape[1] == 1 else channels[:, :3]
    return spread_colours(rgb, alpha), alpha


def to_host(image: Tensor, alpha: Tensor | None) -> Tensor:
    """The inverse of ``to_core``."""
    channels = image if alpha is None else torch.cat((image, alpha), 1)
    return channels.movedim(1, -1).contiguous()
