"""Transformers with layers unlike the host's: folded ones (``tsdsr_core.sd3.fold``), and 8-bit weights
(``tsdsr_core.weights.float8``) in the host's quantised layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...tsdsr_core.weights.float8 import SCALE, STORED, dequantise
from ..types import Model

POOLED = "tsdsr_pooled"
"""Name of the attachment with which a folded model carries the one pooled prompt that it takes."""
_TIME_CHANNELS = 256
_LAYER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
"""What the host reads beside a weight: its type, and that products are not to be rounded to 8 bits as well."""


class NoEmbedding(nn.Module):
    """Takes the place of the time embedder; the projections that read it have a weight of zero."""

    def forward(self, timestep: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
        """One zero for each sample, ``(B, 1)``."""
        return torch.zeros(len(timestep), 1, dtype=dtype, device=timestep.device)


def padded_to_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` in the shapes that the host's loader expects; what was folded away is zeros that take no memory."""
    hidden = weights["proj_out.weight"].shape[1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros((), dtype=weights["proj_out.weight"].dtype).expand(shape)

    found = dict(weights)
    for key in filter(_is_folded, weights):
        rows = len(weights[key])
        # of two rows for each channel, scale and shift, the host swaps the halves in place, which needs memory
        found[key] = zeros(rows, hidden).contiguous() if rows == 2 * hidden else zeros(rows, hidden)
    embedder = "time_text_embed.timestep_embedder"
    for name, inputs in (("linear_1", _TIME_CHANNELS), ("linear_2", hidden)):
        found[f"{embedder}.{name}.weight"] = zeros(hidden, inputs)
        found[f"{embedder}.{name}.bias"] = zeros(hidden)
    return found


def remove_padding(model: Model, pooled: Tensor) -> None:
    """Take the zeros out of a MODEL just loaded from ``padded_to_host`` weights; nobody else holds it yet."""
    diffusion = model.model.diffusion_model
    for module in diffusion.modules():
        if hasattr(module, "adaLN_modulation"):
            projection = module.adaLN_modulation[1]
            projection.weight = nn.Parameter(projection.weight.detach()[:, :1].clone(), requires_grad=False)
            projection.in_features = 1
    diffusion.t_embedder = NoEmbedding()
    model.size = 0  # the host then measures it again
    model.set_attachments(POOLED, pooled)


def quantised_for_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bundle's 8-bit transformer in the names and shapes that the host's loader knows as quantised.

    A device that cannot hold 8-bit numbers, such as Apple's, gets the weights dequantised.

    Raises:
        ValueError: where the names are not SD3's.
    """
    if not comfy.model_management.supports_cast(comfy.model_management.get_torch_device(), STORED):
        return dequantise(weights, weights["proj_out.weight"].dtype)
    # the host's own conversion from diffusers' names knows weights and biases, no scales
    rest = {key: weight for key, weight in weights.items() if not key.endswith(SCALE)}
    found = comfy.model_detection.convert_diffusers_mmdit(rest, "")
    if found is None or rest:
        raise ValueError(f"ComfyUI cannot load this bundle's 8-bit transformer as SD3; unused weights: {sorted(rest)[:8]}")
    targets = _targets(weights)
    mark = torch.tensor(list(json.dumps(_LAYER).encode()), dtype=torch.uint8)
    for key in filter(lambda key: key.endswith(SCALE), weights):
        target = targets[key.removesuffix(SCALE)]
        found[target + SCALE] = weights[key]
        found[f"{target.removesuffix('.weight')}.comfy_quant"] = mark
    return found


def _targets(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The host's key of each weight; those of query, key and value share one."""
    heads = weights["pos_embed.proj.weight"].shape[0] // 64
    blocks = comfy.model_detection.count_blocks(weights, "transformer_blocks.{}.")
    names = comfy.utils.mmdit_to_diffusers({"depth": heads, "num_blocks": blocks})
    return {name: target if isinstance(target, str) else target[0] for name, target in names.items()}


def _is_folded(key: str) -> bool:
    return key.endswith((".norm1.linear.weight", ".norm1_context.linear.weight")) or key == "norm_out.linear.weight"
