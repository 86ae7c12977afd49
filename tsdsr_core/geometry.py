"""Image sizes of the pipeline, in whole pixels; no tensors here."""

from __future__ import annotations

import math
from dataclasses import dataclass

PROCESS_SIZE = 512
"""Shorter side in pixels below which SD3 is not run: it was trained at 512."""
_STRETCH = 4
"""A thin strip is enlarged for processing until its long side is this many process sizes, not beyond."""
SCALE_RANGE = (1.0, 16.0)

Size = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class SizePlan:
    """The sizes one image passes through, each (height, width) in pixels."""

    target: Size
    """Size of the result."""
    work: Size
    """Size at which the model runs; above ``target`` for small images."""
    padded: Size
    """``work`` rounded up to what the model's patches need."""


def plan_size(size: Size, scale: float, multiple: int, process_size: int) -> SizePlan:
    """Target, working and padded size of an image of ``size`` enlarged by ``scale``.

    Args:
        size: (height, width) of the input, at least 1 each.
        scale: from 1 to 16; the target is rounded to the nearest pixel, halves up.
        multiple: what the model's input sides must divide by (VAE factor times patch size, 16 for SD3).
        process_size: where the shorter side of the target is less, work at this size and resize back; 0 for never.
    """
    return plan_target(target_size(size, scale), multiple, process_size)


def plan_target(target: Size, multiple: int, process_size: int) -> SizePlan:
    """As ``plan_size``, for a wanted (height, width) of the result."""
    enlarge = process_size / min(target)
    enlarge = max(1.0, min(enlarge, _STRETCH * process_size / max(target)))
    work = target if enlarge == 1.0 else target_size(target, enlarge)
    return SizePlan(target, work, (_round_up(work[0], multiple), _round_up(work[1], multiple)))


def target_size(size: Size, scale: float) -> Size:
    """``size`` times ``scale``, to the nearest pixel, halves up, at least 1."""
    return max(1, math.floor(size[0] * scale + 0.5)), max(1, math.floor(size[1] * scale + 0.5))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
