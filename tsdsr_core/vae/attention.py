"""Attention with one head over all pixels of a feature map, tile by tile: keys and values first, then the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feature_map import FeatureMap, Workspace
from .passes import KEY_TILE
from .plan import Region, Step, check_window
from .program import Attention, KeyValue, Program


def project_keys_and_values(work: Workspace, op: KeyValue, step: Step, x: FeatureMap) -> tuple[FeatureMap, FeatureMap]:
    """Keys and values of all pixels of ``x``."""
    scale_shift = work.scale_shift(op.norm, x)
    keys, values = (FeatureMap(work.allocate(step, work.plan.keys, x.tensor)) for _ in range(2))

    def process(region: Region) -> Callable[[], None]:
        tile = work.norms.apply(work.mover.read(x.crop(region)), *scale_shift, False)
        key, value = _project(op.key, tile), _project(op.value, tile)
        del tile  # frees its memory before more is needed
        key, value = work.mover.ready(keys.crop(region), key), work.mover.ready(values.crop(region), value)

        def write() -> None:
            work.mover.write(keys.crop(region), key)
            work.mover.write(values.crop(region), value)

        return write

    work.tiles.each(step.regions, process)
    return keys, values


def attend(
    work: Workspace, op: Attention, step: Step, x: FeatureMap, keys: FeatureMap, values: FeatureMap, eps: float | None
) -> FeatureMap:
    """``x`` plus the attention's output; ``eps`` is that of the norm that follows, None for no statistics."""
    scale_shift = work.scale_shift(op.norm, x)
    target, whole = FeatureMap(), Region(0, 0, step.height, step.width)

    def attention(query: Tensor, seen: Region) -> Tensor:
        if not work.plan.streamed:
            return fused(query, keys.crop(seen), values.crop(seen))
        pairs = (
            (work.mover.read(keys.crop(region)), work.mover.read(values.crop(region)))
            for region in seen.grid(KEY_TILE, KEY_TILE)
        )
        return streamed(query, pairs)

    def process(region: Region) -> Callable[[], None]:
        residual = work.mover.read(x.crop(region))
        tile = _project(op.query, work.norms.apply(residual, *scale_shift, False))
        seen = whole if op.spec.window is None else region.grown(op.spec.window, whole)
        tile = _project(op.out, attention(tile, seen)).contiguous(memory_format=work.layout)
        return work.store(step, target, region, *work.norms.add(tile, residual, eps), x)

    work.tiles.each(step.regions, process)
    return target


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(C)) v`` by torch's own kernel.

    Args:
        query: ``(1, C, h, w)``; key, value: ``(1, C, H, W)``.

    Returns:
        ``(1, C, h, w)``.
    """
    return _tile(F.scaled_dot_product_attention(_tokens(query), _tokens(key), _tokens(value)), query)


def streamed(query: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The same over ``pairs`` of keys and values one after the other (online softmax, Milakov 2018), in fp32.

    Only the scores of one pair are in memory. ``fused`` is faster if the device's kernel stores no scores.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q = _tokens(query)[0, 0].to(wide) * query.shape[1] ** -0.5
    running_max = q.new_full((len(q), 1), -torch.inf)
    denominator, numerator = torch.zeros_like(running_max), torch.zeros_like(q)
    for pair in pairs:
        key, value = (_tokens(part)[0, 0].to(wide) for part in pair)
        score = q @ key.T  # (queries, keys of the pair)
        new_max = torch.maximum(running_max, score.amax(1, keepdim=True))
        rescale = (running_max - new_max).exp_()
        score.sub_(new_max).exp_()
        denominator.mul_(rescale).add_(score.sum(1, keepdim=True))
        numerator.mul_(rescale).addmm_(score, value)
        running_max = new_max
    return _tile(numerator.div_(denominator).to(query.dtype)[None, None], query)


def _project(module: nn.Module, tile: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution of ``(1, C, H, W)``."""
    return module(tile.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(module, nn.Linear) else module(tile)


def _tokens(tile: Tensor) -> Tensor:
    """``(1, C, H, W)`` as one head's ``(1, 1, H * W, C)``, contiguous, since only then torch's kernel stores no scores."""
    return tile.permute(0, 2, 3, 1).contiguous().flatten(1, 2)[:, None]


def _tile(tokens: Tensor, like: Tensor) -> Tensor:
    """``(1, 1, h * w, C)`` as ``(1, C, h, w)``."""
    return tokens.reshape(1, *like.shape[2:], -1).permute(0, 3, 1, 2)


def in_windows(program: Program, window: int | None) -> Program:
    """``program`` with attention limited to a window: an estimate of the exact result, in time linear in the pixels.

    Args:
        window: cells beyond a tile of queries, on each side, that the queries see, at least 16; None for all cells.

    Raises:
        InputError: for a smaller window.
    """
    if window is None:
        return program
    check_window(window)
    return tuple(replace(op, spec=replace(op.spec, window=window)) if isinstance(op, Attention) else op for op in program)
