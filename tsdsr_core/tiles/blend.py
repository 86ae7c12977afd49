"""Runs the transformer on tiles and blends them: the window-weighted mean of the tiles' velocities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..system.memory import RanOut, is_out_of_memory, is_unclear, log
from ..system.precision import check_finite
from .memory import TILE_SIDES, TileMemory
from .plan import TilePlan, Tiling

VARIANCE = 0.01
"""Variance of the Gaussian window, relative to the squared tile side."""

_ADVICE = (
    "run it in fp32 (--dtype fp32; in ComfyUI start with --fp32-unet), and check that the LoRA and the prompt fit the model"
)

Velocity = Callable[[Tensor], Tensor]
"""Maps scaled latents to their velocity, same shape."""
TileProgress = Callable[[int, int, Callable[[], Tensor]], None]
"""Called with (tiles done, total tiles, a function that returns the velocity so far, with 0 where no tile is done yet)."""


def centred_window(tile_height: int, tile_width: int) -> Tensor:
    """Gaussian window ``(tile_height, tile_width)``, symmetric about the middle of the tile, float32, above 0."""
    return torch.outer(_gaussian(tile_height, (tile_height - 1) / 2), _gaussian(tile_width, (tile_width - 1) / 2)).float()


def official_window(tile_height: int, tile_width: int) -> Tensor:
    """The published window, whose vertical centre is half a cell too low."""
    return torch.outer(_gaussian(tile_height, tile_height / 2), _gaussian(tile_width, (tile_width - 1) / 2)).float()


def _gaussian(length: int, middle: float) -> Tensor:
    offset = (torch.arange(length, dtype=torch.float64) - middle) / length
    return torch.exp(-(offset**2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)


class _TileTooLarge(RuntimeError):
    """One tile does not fit into memory; ``cause`` is the device's error."""

    def __init__(self, cause: RuntimeError) -> None:
        super().__init__(f"out of memory with one tile: {cause}")
        self.cause = cause


def velocity_in_memory(velocity: Velocity, z: Tensor, tiling: Tiling, memory: TileMemory, tick: TileProgress) -> Tensor:
    """``tiled_velocity`` with tiles that fit into memory: if one tile does not, it starts again with half the side.

    Args:
        velocity: maps a batch of tiles to their velocities.
        z: scaled latents ``(B, C, h, w)``.
        memory: chooses the batch size where ``tiling`` has none.
        tick: called after each batch of tiles.

    Raises:
        RuntimeError: if a tile of the minimum side does not fit either.
        FloatingPointError: if a tile's velocity is not finite.
    """
    window = official_window if tiling.official else centred_window
    while True:
        plan = tiling.plan(z.shape[2], z.shape[3])
        batch = tiling.batch or memory.batch(plan.tile_height, plan.tile_width)
        try:
            return tiled_velocity(
                velocity, z, plan, window(plan.tile_height, plan.tile_width), batch, tick, memory.ran_out
            )  # fmt: skip
        except _TileTooLarge as error:
            side, smallest = max(plan.tile_height, plan.tile_width), TILE_SIDES[-1]
            if side <= smallest:
                if is_unclear(error.cause):
                    raise error.cause from None
                raise RuntimeError(
                    f"out of memory with one tile of {side} latent cells, the smallest size: close other programs, or run "
                    "on the CPU"
                ) from error.cause
            tiling = tiling.with_tile(max(smallest, side // 2))
            log.warning("out of memory with one tile of %d latent cells; continuing with %d", side, tiling.tile)
        memory.release()


def tiled_velocity(
    velocity: Velocity, z: Tensor, plan: TilePlan, window: Tensor, batch: int, tick: TileProgress,
    ran_out: RanOut = is_out_of_memory,
) -> Tensor:  # fmt: skip
    """Velocity of a whole latent: the window-weighted mean of its tiles' velocities.

    Tiles of all images run together in even batches of at most ``batch``. If memory runs out, the batch size is halved, down to
    one tile; if one tile does not fit, an error is raised.

    Args:
        velocity: maps ``(N, C, tile_height, tile_width)`` to the same shape.
        z: scaled latents ``(B, C, height, width)``.
        window: ``(tile_height, tile_width)``, above 0.
        tick: called after each batch of tiles.
        ran_out: tells whether an error means that memory ran out.

    Returns:
        ``(B, C, height, width)`` in the dtype of ``z``; sums are in fp32.
    """
    jobs = [(image, top, left) for image in range(len(z)) for top, left in plan.positions]
    if len(plan) == 1:
        window = torch.ones_like(window)
    window = window.to(z.device)
    total = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
    weight = torch.zeros(z.shape[2:], dtype=torch.float32, device=z.device)
    for top, left in plan.positions:
        weight[top : top + plan.tile_height, left : left + plan.tile_width] += window
    done = 0
    for some, tiles in _run_batches(velocity, z, plan, jobs, batch, ran_out):
        for (image, top, left), tile in zip(some, tiles, strict=True):
            total[image, :, top : top + plan.tile_height, left : left + plan.tile_width] += tile.float() * window
        done += len(some)
        tick(done, len(jobs), lambda: total / weight)
    return (total / weight).to(z.dtype)


def _run_batches(
    velocity: Velocity, z: Tensor, plan: TilePlan, jobs: list[tuple[int, int, int]], batch: int, ran_out: RanOut
) -> Iterator[tuple[list[tuple[int, int, int]], Tensor]]:
    """Yield (jobs, velocities) in even batches of at most ``batch``, which is halved when memory runs out."""
    start = 0
    while start < len(jobs):
        left = len(jobs) - start
        some = jobs[start : start + math.ceil(left / math.ceil(left / batch))]  # 17 as 9 + 8, not 16 + 1
        tiles = torch.stack([z[i, :, y : y + plan.tile_height, x : x + plan.tile_width] for i, y, x in some])
        try:
            result = velocity(tiles)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if len(some) == 1:
                raise _TileTooLarge(error) from error
            batch = len(some) // 2
            log.warning("out of memory with %d tiles at once; continuing with %d", len(some), batch)
            continue
        yield some, check_finite(result, "the result of the transformer", _ADVICE)
        start += len(some)
