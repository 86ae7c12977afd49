"""Names of the SD3 autoencoder's weights in diffusers' layout and in the original one (CompVis LDM), which ComfyUI uses.

They differ in names, in the order of the decoder's levels, and in the projections of the mid-block attention, which are
linear layers in diffusers, ``(C, C)``, and 1x1 convolutions in the original, ``(C, C, 1, 1)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_PAIRS = (
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("resnets", "block"),
)
"""Parts of names, (diffusers, original); specific ones before general ones."""
_PROJECTION = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$")


def to_original(name: str, levels: int) -> str:
    """The original name of a diffusers module or weight; ``levels`` is the number of resolutions.

    >>> to_original("decoder.up_blocks.0.resnets.1.conv_shortcut.weight", 4)
    'decoder.up.3.block.1.nin_shortcut.weight'
    """
    for ours, theirs in _PAIRS:
        name = name.replace(ours, theirs)
    name = re.sub(r"\bdown_blocks\.", "down.", name)
    return re.sub(r"\bup_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)


def to_diffusers(name: str, levels: int) -> str:
    """The diffusers name of an original module or weight."""
    name = re.sub(r"\bdown\.(?=\d)", "down_blocks.", name)
    name = re.sub(r"\bup\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
    for ours, theirs in _PAIRS:
        name = re.sub(rf"\b{re.escape(theirs)}\b", ours, name)
    return name


def weights_to_original(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A diffusers autoencoder's weights under their original names and in their original shapes."""
    renamed = {to_original(name, levels): weight for name, weight in weights.items()}
    return {name: w[:, :, None, None] if _PROJECTION.search(name) else w for name, w in renamed.items()}


def weights_to_diffusers(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The inverse of ``weights_to_original``."""
    return {to_diffusers(name, levels): w[:, :, 0, 0] if _PROJECTION.search(name) else w for name, w in weights.items()}
