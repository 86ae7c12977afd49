"""Attention of one head over all pixels of a map, for one tile of queries."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(C)) v`` by torch's own kernel.

    Args:
        query: ``(1, C, h, w)``; key, value: ``(1, C, H, W)``.

    Returns:
        ``(1, C, h, w)``.
    """
    said = F.scaled_dot_product_attention(_tokens(query), _tokens(key), _tokens(value))
    return _tile(said, query)


def streamed(query: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The same over ``pairs`` of keys and values one after the other (online softmax, Milakov 2018), in fp32.

    It keeps the scores of one pair. Where the device's kernel keeps no scores, ``fused`` is quicker.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q = _tokens(query)[0, 0].to(wide) * query.shape[1] ** -0.5
    most = q.new_full((len(q), 1), -torch.inf)
    total, said = torch.zeros_like(most), torch.zeros_like(q)
    for pair in pairs:
        key, value = (_tokens(part)[0, 0].to(wide) for part in pair)
        score = q @ key.T  # (queries, keys of the pair)
        top = torch.maximum(most, score.amax(1, keepdim=True))
        fade = (most - top).exp_()
        score.sub_(top).exp_()
        total.mul_(fade).add_(score.sum(1, keepdim=True))
        said.mul_(fade).addmm_(score, value)
        most = top
    return _tile(said.div_(total).to(query.dtype)[None, None], query)


def _tokens(tile: Tensor) -> Tensor:
    """``(1, C, H, W)`` as one head's ``(1, 1, H * W, C)``, the channels together: else attention makes all scores at once."""
    return tile.permute(0, 2, 3, 1).contiguous().flatten(1, 2)[:, None]


def _tile(tokens: Tensor, like: Tensor) -> Tensor:
    """``(1, 1, h * w, C)`` as ``(1, C, h, w)``."""
    return tokens.reshape(1, *like.shape[2:], -1).permute(0, 3, 1, 2)
