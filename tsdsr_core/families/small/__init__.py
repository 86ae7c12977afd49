"""The small model that ships with the package: SD3's architecture with an autoencoder of factor 4, trained from scratch."""

from collections.abc import Mapping
from dataclasses import replace

from ..record import Config, Family
from ..sd3 import SD3

_LEVELS = 3
"""Resolutions of the autoencoder; Stable Diffusion 3's has four."""


def matches(configs: Mapping[str, Config]) -> bool:
    """Whether the autoencoder is the small model's."""
    widths = configs.get("vae", {}).get("block_out_channels")
    return SD3.matches(configs) and isinstance(widths, list | tuple) and len(widths) == _LEVELS


SMALL: Family = replace(
    SD3,
    name="small",
    title="the small model",
    matches=matches,
    parts={name: replace(part, published={}, lora_targets=None) for name, part in SD3.parts.items()},
    published="",
    base_restores=True,
)
"""Its tiles count SD3's prompt, not its own of eight tokens: sizes of tiles, and so results, stay as they were."""
