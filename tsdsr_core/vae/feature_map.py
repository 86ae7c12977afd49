"""Feature maps of one image on its way through a program, and what all passes over it share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .norms import norms_for
from .passes import Place
from .plan import Plan, Region, Step
from .polyphase import saves_time
from .tile_loop import TileLoop
from .transfer import Mover

WeightsOf = Callable[[Any, Tensor], tuple[Any, Any]]
"""Gives weight and bias of a norm or convolution, on the device of a tensor; None for a bias that it does not have."""


@dataclass
class FeatureMap:
    """A full activation ``(1, C, H, W)`` and what the next pass needs to know of it."""

    tensor: Any = None
    """A Tensor, from the first tile on."""
    statistics: list[Any] = field(default_factory=list)
    """Mean and variance of its tiles, if a norm follows."""
    pending_residual: Tensor | None = None
    """What the next pass adds to it while it reads it."""
    compute: Callable[[Region], Tensor] | None = None
    """Computes a region of it, if it is not stored."""
    computed_size: tuple[int, int] = (0, 0)
    """Height and width, if it is not stored."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.computed_size if self.compute else self.tensor.shape[2:]

    def crop(self, region: Region) -> Tensor:
        return self.compute(region) if self.compute else crop(self.tensor, region)


class Workspace:
    """Device, memory layout, norms and tile loop of the passes over one image; allocates feature maps and stores tiles."""

    def __init__(self, x: Tensor, plan: Plan, device: torch.device, weights_of: WeightsOf, tiles: TileLoop) -> None:
        self.plan, self.weights_of, self.tiles, self.dtype = plan, weights_of, tiles, x.dtype
        self.mover = Mover(torch.empty(0, dtype=torch.float32, device=device).device)  # with its index
        channels_last = x.dtype.itemsize == 2 and device.type in ("cuda", "cpu") and not plan.kernels.unfolded
        self.layout = torch.channels_last if channels_last else torch.contiguous_format  # fp32 rounds less in the latter
        self.norms = norms_for(self.mover.device, x.dtype, self.layout)
        self.polyphase = saves_time(device, x.dtype) and not self.norms.adds_late
        """Whether enlarging is part of the convolution after it."""
        self._wide = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=device)

    def allocate(self, step: Step, place: Place, x: Tensor | None) -> Tensor:
        """Memory for the result of a pass: that of the map ``x`` if the result is added to it."""
        spec = step.spec
        if x is not None and spec.kind in ("residual_end", "attention") and spec.out_channels <= x.shape[1]:
            return x[:, : spec.out_channels]  # each tile of x is read before it is written, and no other tile reads it
        shape, device = (1, spec.out_channels, step.height, step.width), self.mover.device if place == "device" else "cpu"
        layout = torch.channels_last if spec.kind == "keys" else self.layout  # attention reads all channels of a pixel at once
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=layout)

    def store(
        self, step: Step, target: FeatureMap, region: Region, tile: Tensor, statistics: list[Any], x: FeatureMap
    ) -> Callable[[], None]:
        """A function that writes ``tile`` to ``region`` of ``target`` and adds its statistics.

        What takes memory is done before it is returned. On the device, a tile that is the whole map becomes the map.
        """
        if target.tensor is None:
            adopted = covers(region, step) and self.plan.maps == "device"
            target.tensor = tile if adopted else self.allocate(step, self.plan.maps, x.tensor)
        if target.tensor is not tile:
            tile = self.mover.ready(target.crop(region), tile)

        def write() -> None:
            if target.tensor is not tile:
                self.mover.write(target.crop(region), tile)
            target.statistics += statistics

        return write

    def scale_shift(self, norm: nn.GroupNorm, source: FeatureMap) -> tuple[Tensor, Tensor]:
        """The norm of a whole map as ``x * scale + shift``, each ``(1, C, 1, 1)``."""
        return self.norms.scale_shift(source.statistics, norm, *self.weights(norm))

    def weights(self, layer: nn.Module) -> tuple[Any, Any]:
        """Weight and bias of a layer, on the device."""
        return self.weights_of(layer, self._wide)


def covers(region: Region, step: Step) -> bool:
    """Whether ``region`` is the whole result of a pass."""
    return (region.height, region.width) == (step.height, step.width)


def crop(tensor: Tensor, region: Region) -> Tensor:
    return tensor[:, :, region.top : region.bottom, region.left : region.right]
