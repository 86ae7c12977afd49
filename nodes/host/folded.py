"""Folded transformers (``tsdsr_core.sd3.fold``) in ComfyUI's own MMDiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Model

POOLED = "tsdsr_pooled"
"""Name of the attachment with which a folded model carries the one pooled prompt that it takes."""
_TIME_CHANNELS = 256


class NoEmbedding(nn.Module):
    """Takes the place of the time embedder; the projections that read it have a weight of zero."""

    def forward(self, timestep: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
        """One zero for each sample, ``(B, 1)``."""
        return torch.zeros(len(timestep), 1, dtype=dtype, device=timestep.device)


def widened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def narrow(model: Model, pooled: Tensor) -> None:
    """Take the zeros out of a MODEL just loaded from ``widened`` weights; nobody else holds it yet."""
    diffusion = model.model.diffusion_model
    for module in diffusion.modules():
        if hasattr(module, "adaLN_modulation"):
            projection = module.adaLN_modulation[1]
            projection.weight = nn.Parameter(projection.weight.detach()[:, :1].clone(), requires_grad=False)
            projection.in_features = 1
    diffusion.t_embedder = NoEmbedding()
    model.size = 0  # the host then measures it again
    model.set_attachments(POOLED, pooled)


def _is_folded(key: str) -> bool:
    return key.endswith((".norm1.linear.weight", ".norm1_context.linear.weight")) or key == "norm_out.linear.weight"
