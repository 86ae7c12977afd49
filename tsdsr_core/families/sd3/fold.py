"""Folding: makes the transformer a third smaller by precomputing its adaptive layer norms for t = 1000 and one prompt.

An adaLN projection computes ``W silu(time(t) + text(pooled)) + b``.  With ``t`` and ``pooled`` fixed the result is constant
and replaces ``b``; ``W`` and both embedders are removed.  In SD3 medium these are 683 of 2028 million parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from ...flow import TIMESTEP


class FoldedEmbedding(nn.Module):
    """Replaces the time and prompt embedder of a folded transformer; its output is ignored."""

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Return a zero for each sample, ``(B, 1)``."""
        return pooled.new_zeros(len(timestep), 1)


@torch.no_grad()
def fold(transformer: Any, pooled: Tensor) -> None:
    """Fold a diffusers ``SD3Transformer2DModel`` in place, in the type of its weights.

    Args:
        pooled: pooled prompt embedding ``(1, D)``.
    """
    dtype = next(transformer.time_text_embed.parameters()).dtype
    timestep = torch.full((1,), TIMESTEP, dtype=dtype, device=pooled.device)
    hidden = F.silu(transformer.time_text_embed(timestep, pooled.to(dtype)))
    for norm in _adaptive_norms(transformer):
        vector = norm.linear(hidden)[0]
        norm.linear = _constant(vector)
    transformer.time_text_embed = FoldedEmbedding()


def fold_structure(transformer: Any) -> None:
    """Give a transformer the modules of a folded one, without their values: before folded weights are loaded into it."""
    for norm in _adaptive_norms(transformer):
        norm.linear = _constant(norm.linear.bias)
    transformer.time_text_embed = FoldedEmbedding()


def _constant(vector: Tensor) -> nn.Linear:
    """A linear layer that ignores its input, one value, and returns ``vector``; a layer type that all loaders support."""
    linear = nn.Linear(1, len(vector), device="meta")
    linear.weight = nn.Parameter(torch.zeros(len(vector), 1, dtype=vector.dtype, device=vector.device), requires_grad=False)
    linear.bias = nn.Parameter(vector.detach().clone(), requires_grad=False)
    return linear


def _adaptive_norms(transformer: nn.Module) -> Iterator[Any]:
    kinds = (AdaLayerNormZero, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)
    return (module for module in transformer.modules() if isinstance(module, kinds))
