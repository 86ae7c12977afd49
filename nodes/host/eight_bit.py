"""8-bit weights (``tsdsr_core.weights.float8``) in ComfyUI's own quantised layers."""

from __future__ import annotations

import json
from collections.abc import Mapping

import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...tsdsr_core.weights.float8 import SCALE, STORED, dequantise

_LAYER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
"""What the host reads beside a weight: its type, and that products are not to be rounded to 8 bits as well."""


def hosted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
