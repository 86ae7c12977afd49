"""Mean and variance of a whole map, merged from those of disjoint tiles (Chan, Golub, LeVeque 1979)."""

from __future__ import annotations

import torch
from torch import Tensor

Part = tuple[int, Tensor, Tensor]
"""A part of a map: pixels, and the mean and summed squared deviation of each channel, in fp32 or better."""
_CHUNK = 2**21
"""Elements that the CPU measures at once, so that they are still near when they are read again."""


def measure(tile: Tensor) -> list[Part]:
    """A tile ``(1, C, H, W)`` in parts."""
    wide = torch.promote_types(tile.dtype, torch.float32)
    if tile.device.type != "cpu":
        variance, mean = torch.var_mean(tile.to(wide), (0, 2, 3), correction=0)
        return [(tile[0, 0].numel(), mean, variance * tile[0, 0].numel())]
    parts = []  # torch.var_mean is slow here
    for rows in tile.split(max(1, _CHUNK // (tile.shape[1] * tile.shape[3])), 2):
        count = rows.shape[2] * rows.shape[3]
        mean = _channel_sums(rows, wide) / count
        off = rows - mean[:, None, None]
        mean += _channel_sums(off, wide) / count  # what rounding lost
        parts.append((count, mean, _channel_sums(off.square_(), wide)))
    return parts


def _channel_sums(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of each channel ``(C,)``; row by row, since torch takes up to 30 times as long for both axes of a cut-out at once."""
    return tile.sum(3, dtype=dtype).sum((0, 2))


def merge(parts: list[Part], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(groups,)`` of each group of channels over disjoint parts: variance within and between them."""
    if len(parts) == 1:
        ((count, mean, square),) = parts
        between, whole = torch.var_mean(mean.unflatten(0, (groups, -1)), 1, correction=0)
        return whole, square.unflatten(0, (groups, -1)).mean(1).div_(count).add_(between)
    counts, means, squares = zip(*parts, strict=True)
    mean, square = (torch.stack(values).unflatten(1, (groups, -1)) for values in (means, squares))
    share = torch.tensor(counts, dtype=mean.dtype, device=mean.device)[:, None, None] / (sum(counts) * mean.shape[2])
    near = mean[0, :, 0]  # sums of differences from it are exact where a map is constant
    whole = near + (share * (mean - near[:, None])).sum((0, 2))
    return whole, (square / (sum(counts) * mean.shape[2]) + share * (mean - whole[:, None]).square()).sum((0, 2))
