"""Stable Diffusion 3 through diffusers: its record, and folding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...checks import is_bounded
from ...errors import InputError
from ...weights.prompt import Condition
from ..record import Config, Family, Geometry, Part, Shapes
from .config import TRANSFORMER_CONFIG, TRANSFORMER_TARGETS, VAE_CONFIG, VAE_TARGETS

_LIVE_MAPS = 24
"""Token maps of the hidden width alive at once in one block (two streams, qkv, 4x feed-forward, residuals)."""
PROMPT_TOKENS = 333
_LEVELS, _WIDTH = 8, 2**14
"""Maximum number of an autoencoder's resolutions, and of the channels at one of them."""


def geometry(configs: Mapping[str, Config]) -> Geometry:
    """The sizes of a model: the shift factor is left out, since the published LoRAs were trained without it."""
    transformer, vae = configs["transformer"], configs["vae"]
    patch = transformer["patch_size"]
    cells = transformer["pos_embed_max_size"] or transformer["sample_size"] // patch
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Geometry(vae["scaling_factor"], factor, patch, cells * patch, PROMPT_TOKENS)


def velocity(network: Callable[..., Any], z: Tensor, timestep: Tensor, prompt: Condition) -> Tensor:
    """``v(z, t)`` of an ``SD3Transformer2DModel``, as ``Family.velocity``."""
    return network(
        hidden_states=z, timestep=timestep, encoder_hidden_states=prompt.tokens, pooled_projections=prompt.pooled,
        return_dict=False,
    )[0]  # fmt: skip


def tile_bytes(config: Config, tile_height: int, tile_width: int, context: int, itemsize: int) -> int:
    """Activation bytes of a tile, as ``Family.tile_bytes``."""
    tokens = (tile_height // config["patch_size"]) * (tile_width // config["patch_size"]) + context
    return tokens * config["attention_head_dim"] * config["num_attention_heads"] * itemsize * _LIVE_MAPS


def check_weights(configs: Mapping[str, Config], shapes: Shapes) -> list[str]:
    """Compare the configuration's main sizes with the tensors, as ``Family.check_weights``."""
    transformer, vae = configs["transformer"], configs["vae"]
    hidden, patch = transformer["attention_head_dim"] * transformer["num_attention_heads"], transformer["patch_size"]
    expected: dict[str, tuple[int, ...]] = {
        "transformer.pos_embed.pos_embed": (1, transformer["pos_embed_max_size"] ** 2, hidden),
        "transformer.pos_embed.proj.weight": (hidden, transformer["in_channels"], patch, patch),
        "vae.decoder.conv_in.weight": (vae["block_out_channels"][-1], vae["latent_channels"], 3, 3),
        "vae.encoder.conv_in.weight": (vae["block_out_channels"][0], vae["in_channels"], 3, 3),
    }
    wrong = [
        f"{key} is {shapes.get(key, 'missing')}, expected {shape}"
        for key, shape in expected.items()
        if shapes.get(key) != shape
    ]
    blocks, levels = (
        {match[1] for key in shapes if (match := re.match(pattern, key))}
        for pattern in (r"transformer\.transformer_blocks\.(\d+)\.", r"vae\.encoder\.down_blocks\.(\d+)\.")
    )
    if len(blocks) != transformer["num_layers"]:
        wrong.append(f"{len(blocks)} transformer blocks, expected {transformer['num_layers']}")
    if len(levels) > len(vae["block_out_channels"]):  # the last level may have no weights
        wrong.append(f"{len(levels)} levels of the VAE, expected {len(vae['block_out_channels'])}")
    return wrong


def check_configs(configs: Mapping[str, Config]) -> None:
    """Raise ``InputError`` where the configurations do not fit each other, or the autoencoder's lists are invalid."""
    transformer, vae = configs["transformer"], configs["vae"]
    if transformer["in_channels"] != vae["latent_channels"]:
        raise InputError(
            f"the transformer has {transformer['in_channels']} channels, the VAE's latents {vae['latent_channels']}"
        )
    widths = vae.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= _LEVELS or not all(map(_is_width, widths)):
        raise InputError(
            f"vae_config block_out_channels = {widths!r}: expected up to {_LEVELS} whole numbers from 1 to {_WIDTH}"
        )
    scale, shift = vae.get("scaling_factor"), vae.get("shift_factor")
    if not is_bounded(scale) or scale <= 0:
        raise InputError(f"vae_config scaling_factor = {scale!r}: expected a number above 0")
    if shift is not None and not is_bounded(shift):
        raise InputError(f"vae_config shift_factor = {shift!r}: expected a number")


def matches(configs: Mapping[str, Config]) -> bool:
    """Whether the transformer is SD3's; a bundle's configuration has no name of a class."""
    config = configs.get("transformer")
    if config is None:
        return configs.get("vae", {}).get("_class_name") == "AutoencoderKL"
    if "_class_name" in config:
        return config["_class_name"] == "SD3Transformer2DModel"
    return "joint_attention_dim" in config or "pos_embed_max_size" in config


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _WIDTH


def _transformer_class() -> Any:
    from diffusers import SD3Transformer2DModel  # here, since it takes seconds

    return SD3Transformer2DModel


def _vae_class() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL


def _fold(transformer: Any, pooled: Tensor) -> None:
    from .fold import fold

    fold(transformer, pooled)


def _fold_structure(transformer: Any) -> None:
    from .fold import fold_structure

    fold_structure(transformer)


def _is_folded(transformer: Any) -> bool:
    from .fold import FoldedEmbedding

    return isinstance(transformer.time_text_embed, FoldedEmbedding)


_SIDE = 2**16
SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    matches=matches,
    parts={
        "transformer": Part(
            "SD3Transformer2DModel",
            _transformer_class,
            {
                "patch_size": (1, 16), "in_channels": (1, 1024), "num_layers": (1, 512), "attention_head_dim": (1, 1024),
                "num_attention_heads": (1, 1024), "caption_projection_dim": (1, _SIDE), "joint_attention_dim": (1, _SIDE),
                "pooled_projection_dim": (1, _SIDE), "pos_embed_max_size": (1, 2**14),
            },
            TRANSFORMER_CONFIG,
            TRANSFORMER_TARGETS,
        ),
        "vae": Part(
            "AutoencoderKL",
            _vae_class,
            {
                "in_channels": (1, 3), "out_channels": (1, 3), "layers_per_block": (0, 64), "latent_channels": (1, 1024),
                "norm_num_groups": (1, 1024),
            },
            VAE_CONFIG,
            VAE_TARGETS,
        ),
    },
    geometry=geometry,
    velocity=velocity,
    tile_bytes=tile_bytes,
    prompt_widths=lambda config: (config["joint_attention_dim"], config["pooled_projection_dim"]),
    bundle_version=1,
    published="SD3 medium",
    check_configs=check_configs,
    check_weights=check_weights,
    fold=_fold,
    fold_structure=_fold_structure,
    is_folded=_is_folded,
)  # fmt: skip
