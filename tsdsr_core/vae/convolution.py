"""A convolution over a whole feature map, tile by tile; its norm, SiLU, rescaling and residual are part of the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .feature_map import FeatureMap, Workspace, covers, crop
from .plan import Region, Step, input_region
from .polyphase import PolyphaseConvolution
from .program import Conv


def convolve(
    work: Workspace, op: Conv, step: Step, source: FeatureMap, x: FeatureMap, target: FeatureMap, eps: float | None,
    doubled_next: bool,
) -> FeatureMap:  # fmt: skip
    """Run ``op`` and return ``target`` with its result.

    Args:
        source: the map to read: x, or the hidden map at the end of a residual block.
        x: the map that the result is added to at the end of a residual block.
        target: with a tensor, or without one to have memory allocated.
        eps: of the norm that follows; None for no statistics.
        doubled_next: whether the next pass enlarges the result.
    """
    adds_x = op.spec.kind == "residual_end"
    scale_shift = None if op.norm is None else work.scale_shift(op.norm, source)
    enlarges = op.spec.rescale == "up" and work.polyphase
    polyphase = PolyphaseConvolution(*work.weights(op.module), work.dtype) if enlarges else None
    may_defer = doubled_next and work.norms.adds_late and work.plan.maps == "device"
    if step.stored and target.tensor is None and not (step.whole and work.plan.maps == "device"):
        target.tensor = work.allocate(step, work.plan.maps, x.tensor)  # here, since smaller tiles would not help a map to fit

    def compute(region: Region) -> Tensor:
        return _convolved(work, op, region, source, scale_shift, polyphase)

    def process(region: Region) -> Callable[[], None]:
        tile, residual = compute(region), None
        if adds_x:
            residual = work.mover.read(x.crop(region))
            if op.shortcut is not None:
                residual = op.shortcut(residual.contiguous(memory_format=work.layout))
            if may_defer and covers(region, step):
                target.pending_residual, residual = residual, None
        return work.store(step, target, region, *work.norms.add(tile, residual, eps), x)

    def measure(region: Region) -> Callable[[], None]:
        statistics = work.norms.add(compute(region), None, eps)[1]
        return lambda: target.statistics.extend(statistics)

    if step.runs:
        work.tiles.each(step.regions, process if step.stored else measure)
    if not step.stored:
        target.compute, target.computed_size = compute, (step.height, step.width)
    return target


def _convolved(
    work: Workspace, op: Conv, region: Region, source: FeatureMap, scale_shift: tuple[Tensor, Tensor] | None,
    polyphase: PolyphaseConvolution | None,
) -> Tensor:  # fmt: skip
    """The convolution's result for ``region``."""
    needed = input_region(op.spec, region, *source.size)
    tile = work.mover.read(source.crop(needed.area))
    tile = tile.contiguous(memory_format=work.layout) if scale_shift is None else work.norms.apply(tile, *scale_shift, True)
    if op.spec.rescale == "up" and not polyphase:
        residual = source.pending_residual
        tile = work.norms.double(tile, None if residual is None else crop(residual, needed.area))
    elif any(needed.pad):
        tile = F.pad(tile, (0, needed.pad[1], 0, needed.pad[0]))
    tile = (polyphase or op.module)(tile)[:, :, needed.skip[0] :, needed.skip[1] :]
    return tile[:, :, : region.height, : region.width]
