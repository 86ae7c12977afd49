"""The small SD3-shaped model that ships with the package: its configuration and initial weights.

The initial weights make the autoencoder a linear resampler, so that training starts near bicubic enlargement instead of
near noise.  GroupNorm and SiLU on the main path are not linear, but can be cancelled well enough:

- A signal ``a`` is carried by the channel pair ``(a, -a)``, since ``silu(a) - silu(-a) = a``.
- With two channels per norm group, the pair ``(k + a, -k - a)`` has mean 0 and a standard deviation close to ``k``, so
  ``weight k, bias -k`` returns ``a`` up to the mean of the image.  A second pair with ``-k`` cancels the first-order
  change of contrast.  The mean is restored by the colour fix.

All residual branches and the velocity start at zero.

The architecture has the same number of residual blocks at each resolution, but a block at full resolution costs sixteen
times as much as one at the resolution of the input, and helps least.  So blocks beyond ``LIVE`` are dead: both convolutions
are zero, no gradient reaches them, and they can be skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn

from ...weights.prompt import PromptEmbeds

OFFSET = 4.0
"""``k`` above: large compared with the signal (-1..1), small enough for fp16."""
_COPIES = ((0, 1.0), (1, -1.0))

HEAD = 64
"""Channels per attention head."""
TRANSFORMER_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": HEAD,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 64,
}
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (64, 64, 64),
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "mid_block_add_attention": True,
}


LIVE = {"encoder": (None, 0), "decoder": (None, 1, 0)}
"""Residual blocks in use at each resolution, from the lowest one; the last number holds for all higher ones. None: all."""


def build(seed: int, layers: int, layers_per_block: int) -> tuple[SD3Transformer2DModel, AutoencoderKL, PromptEmbeds]:
    """Transformer, autoencoder and prompt embeddings with their initial weights, in fp32 on the CPU.

    Args:
        layers: number of the transformer's blocks and also of its heads: ComfyUI infers both from the width, as in SD3.
        layers_per_block: the encoder's residual blocks at each resolution; the decoder has one more.
    """
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        **TRANSFORMER_CONFIG, num_layers=layers, num_attention_heads=layers, caption_projection_dim=layers * HEAD
    )
    vae = AutoencoderKL(**VAE_CONFIG, layers_per_block=layers_per_block)
    _zero(transformer.proj_out)
    with torch.no_grad():
        _start_linear(vae)
        _zero_dead_blocks(vae, 0, 0)
    tokens = torch.randn(1, 8, TRANSFORMER_CONFIG["joint_attention_dim"])
    pooled = torch.randn(1, TRANSFORMER_CONFIG["pooled_projection_dim"])
    return transformer, vae, PromptEmbeds(tokens, pooled)


@torch.no_grad()
def deepened(vae: Any, layers_per_block: int) -> Any:
    """An autoencoder with at least ``layers_per_block`` residual blocks at each resolution; new ones start as the identity."""
    found = int(vae.config["layers_per_block"])
    if found >= layers_per_block:
        return vae
    deeper: Any = AutoencoderKL.from_config({**vae.config, "layers_per_block": layers_per_block})
    for half in (deeper.encoder, deeper.decoder):
        _zero_branches(half)
    deeper.load_state_dict({**deeper.state_dict(), **vae.state_dict()})
    _zero_dead_blocks(deeper, found, found + 1)
    return deeper


@torch.no_grad()
def shift_latents(transformer: Any, vae: Any, mean: Tensor, gain: Tensor) -> None:
    """Replace each latent ``z`` by ``gain * (z - mean)`` in the weights; images stay the same up to rounding.

    Args:
        mean, gain: of each channel ``(C,)`` of the unscaled latents; gains above 0.
    """
    channels = len(mean)
    quant, post_quant, patches, out = vae.quant_conv, vae.post_quant_conv, transformer.pos_embed.proj, transformer.proj_out
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = gain * (quant.bias[:channels] - mean)
    quant.bias[channels:] += 2 * gain.log()  # log-variances: the spread of the posterior scales like its mean
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight /= gain[:, None, None]
    patches.bias += patches.weight.sum((2, 3)) @ (mean * vae.config["scaling_factor"])
    patches.weight /= gain[:, None, None]
    out.weight.view(-1, channels, out.in_features).mul_(gain[:, None])  # channels run fastest within a patch
    out.bias.view(-1, channels).mul_(gain)


def _zero_dead_blocks(vae: Any, encoder: int, decoder: int) -> None:
    """Zero the blocks beyond ``LIVE``, except for the first ``encoder`` or ``decoder`` blocks of each level."""
    levels = {"encoder": reversed(vae.encoder.down_blocks), "decoder": vae.decoder.up_blocks}
    for half, first in (("encoder", encoder), ("decoder", decoder)):
        for index, level in enumerate(levels[half]):
            live = LIVE[half][min(index, len(LIVE[half]) - 1)]
            for block in level.resnets[len(level.resnets) if live is None else max(live, first) :]:
                _zero(block.conv1)
                _zero(block.conv2)


def _zero_branches(half: Any) -> None:
    for block in (module for module in half.modules() if hasattr(module, "conv2")):
        _zero(block.conv2)


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _start_linear(vae: Any) -> None:
    for half in (vae.encoder, vae.decoder):
        _zero_branches(half)
        attention = half.mid_block.attentions[0]
        _zero(attention.to_out[0])  # stays zero: results should not depend on the image size
    encoder, decoder = vae.encoder, vae.decoder
    colours = 3
    _spread(encoder.conv_in, colours)
    for block in encoder.down_blocks[:-1]:
        _keep(block.downsamplers[0].conv, colours, torch.tensor([0.5, 0.5, 0.0]))
    _cancel_norm(encoder.mid_block.resnets[-1].conv2, encoder.conv_norm_out, colours)
    _gather(encoder.conv_out, colours)
    encoder.conv_out.weight[16:] = 0  # log-variance: a narrow posterior
    encoder.conv_out.bias[16:] = -10
    _identity(vae.quant_conv)
    _identity(vae.post_quant_conv)
    _spread(decoder.conv_in, colours)
    for block in decoder.up_blocks[:-1]:
        _keep(block.upsamplers[0].conv, colours, torch.tensor([0.25, 0.5, 0.25]))
    _cancel_norm(decoder.up_blocks[-2].upsamplers[0].conv, decoder.conv_norm_out, colours)
    _gather(decoder.conv_out, colours)


def _pairs(colours: int) -> list[tuple[int, int, int, float]]:
    """``(colour, first channel, second channel, sign of k)`` for each channel pair that carries the image."""
    return [(c, 4 * c + 2 * copy, 4 * c + 2 * copy + 1, sign) for c in range(colours) for copy, sign in _COPIES]


def _spread(conv: Any, colours: int) -> None:
    for colour, first, second, _ in _pairs(colours):
        for channel, sign in ((first, 1.0), (second, -1.0)):
            conv.weight[channel] = 0
            conv.weight[channel, colour, 1, 1] = sign
            conv.bias[channel] = 0


def _keep(conv: Any, colours: int, taps: Tensor) -> None:
    kernel = torch.outer(taps, taps)
    for _, first, second, _ in _pairs(colours):
        for channel in (first, second):
            conv.weight[channel] = 0
            conv.weight[channel, channel] = kernel
            conv.bias[channel] = 0


def _cancel_norm(conv: Any, norm: Any, colours: int) -> None:
    for _, first, second, sign in _pairs(colours):
        conv.bias[first], conv.bias[second] = sign * OFFSET, -sign * OFFSET
        norm.weight[first] = norm.weight[second] = OFFSET
        norm.bias[first], norm.bias[second] = -sign * OFFSET, sign * OFFSET


def _gather(conv: Any, colours: int) -> None:
    conv.weight[:colours] = 0
    conv.bias[:colours] = 0
    for colour, first, second, _ in _pairs(colours):
        conv.weight[colour, first, 1, 1] = 1 / len(_COPIES)
        conv.weight[colour, second, 1, 1] = -1 / len(_COPIES)


def _identity(conv: Any) -> None:
    conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
    nn.init.zeros_(conv.bias)
