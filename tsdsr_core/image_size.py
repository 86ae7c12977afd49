"""Image sizes of the pipeline, in whole pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

PROCESS_SIZE = 512
"""Default minimum of the shorter side at which the model runs, in pixels: SD3 was trained at 512."""
PROCESS_SIZE_RANGE = (0, 4096)
_MAX_LONG_SIDE = 4
"""Limit of the enlargement for processing: the longer side stays below this many times the process size."""
SCALE_RANGE = (1.0, 16.0)

Size = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class SizePlan:
    """The sizes of one image in the pipeline, each (height, width) in pixels."""

    target: Size
    """Size of the result."""
    work: Size
    """Size at which the model runs; larger than ``target`` for small images."""
    padded: Size
    """``work`` rounded up to a multiple of the model's patches."""


def plan_size(size: Size, scale: float, multiple: int, process_size: int) -> SizePlan:
    """Target, working and padded size of an image enlarged by ``scale``.

    Args:
        size: (height, width) of the input, at least 1 each.
        scale: from 1 to 16; the target is rounded to the nearest pixel, halves up.
        multiple: the sides of the model's input must be multiples of it (VAE factor times patch size, 16 for SD3).
        process_size: if the shorter side of the target is smaller, the model runs at this size and the result is resized
            to the target; 0 = never.

    >>> plan_size((300, 451), 4, 16, 512)
    SizePlan(target=(1200, 1804), work=(1200, 1804), padded=(1200, 1808))
    >>> plan_size((64, 64), 4, 16, 512)
    SizePlan(target=(256, 256), work=(512, 512), padded=(512, 512))
    """
    return plan_target(target_size(size, scale), multiple, process_size)


def plan_target(target: Size, multiple: int, process_size: int) -> SizePlan:
    """As ``plan_size``, for a given (height, width) of the result."""
    enlarge = process_size / min(target)
    enlarge = max(1.0, min(enlarge, _MAX_LONG_SIDE * process_size / max(target)))
    work = target if enlarge == 1.0 else target_size(target, enlarge)
    return SizePlan(target, work, (_round_up(work[0], multiple), _round_up(work[1], multiple)))


def target_size(size: Size, scale: float) -> Size:
    """``size`` times ``scale``, rounded to the nearest pixel, halves up, at least 1.

    >>> target_size((3, 5), 1.5)
    (5, 8)
    """
    return max(1, math.floor(size[0] * scale + 0.5)), max(1, math.floor(size[1] * scale + 0.5))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
