"""Fold what never changes: at t = 1000 under one prompt, every adaptive layer norm of SD3 gets the same vector each time.

An adaLN projection computes ``W silu(time(t) + text(pooled)) + b``; with ``t`` and ``pooled`` fixed the result takes the
place of ``b``, and ``W`` and both embedders go.  In SD3 medium that is 683 of 2028 million parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from .flow import TIMESTEP


class NoEmbedding(nn.Module):
    """Takes the place of the time and prompt embedder; the projections that read it have a weight of zero."""

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """One zero for each sample, ``(B, 1)``."""
        return pooled.new_zeros(len(timestep), 1)


@torch.no_grad()
def fold(transformer: Any, pooled: Tensor) -> None:
    """Fold the constants of a diffusers ``SD3Transformer2DModel`` in place, in the type of its weights.

    Args:
        pooled: pooled prompt ``(1, D)``.
    """
    dtype = next(transformer.time_text_embed.parameters()).dtype
    timestep = torch.full((1,), TIMESTEP, dtype=dtype, device=pooled.device)
    hidden = F.silu(transformer.time_text_embed(timestep, pooled.to(dtype)))
    for norm in _adaptive_norms(transformer):
        vector = norm.linear(hidden)[0]
        norm.linear = _constant(vector)
    transformer.time_text_embed = NoEmbedding()


def empty(transformer: Any) -> None:
    """Give a transformer without weights, such as one on the meta device, the modules that folding leaves."""
    for norm in _adaptive_norms(transformer):
        norm.linear = _constant(norm.linear.bias)
    transformer.time_text_embed = NoEmbedding()


def _constant(vector: Tensor) -> nn.Linear:
    """A projection of one ignored value to ``vector``; a linear layer still, so that every loader knows how to treat it."""
    linear = nn.Linear(1, len(vector), device="meta")
    linear.weight = nn.Parameter(torch.zeros(len(vector), 1, dtype=vector.dtype, device=vector.device), requires_grad=False)
    linear.bias = nn.Parameter(vector.detach().clone(), requires_grad=False)
    return linear


def _adaptive_norms(transformer: nn.Module) -> Iterator[Any]:
    kinds = (AdaLayerNormZero, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)
    return (module for module in transformer.modules() if isinstance(module, kinds))
