"""Windows over latent tiles and the weighted mean of what the transformer says of each tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import TILE_SIDES, TileMemory, is_out_of_memory, log
from .tile_plan import TilePlan, TileSettings, even_tiles

VARIANCE = 0.01
"""Variance of the Gaussian window, relative to the squared tile side."""

Velocity = Callable[[Tensor], Tensor]
Tick = Callable[[int, int, Callable[[], Tensor]], None]
"""Called with (tiles done, tiles in all, a function that gives the velocity so far, 0 where none is known)."""


def centred_window(tile_height: int, tile_width: int) -> Tensor:
    """Gaussian window ``(tile_height, tile_width)``, symmetric about the middle of the tile, float32, above 0."""
    return torch.outer(_gaussian(tile_height, (tile_height - 1) / 2), _gaussian(tile_width, (tile_width - 1) / 2)).float()


def official_window(tile_height: int, tile_width: int) -> Tensor:
    """The published window: its vertical middle lies half a cell too low."""
    return torch.outer(_gaussian(tile_height, tile_height / 2), _gaussian(tile_width, (tile_width - 1) / 2)).float()


def _gaussian(length: int, middle: float) -> Tensor:
    offset = (torch.arange(length, dtype=torch.float64) - middle) / length
    return torch.exp(-(offset**2) / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)


@dataclass(frozen=True)
class Cutting:
    """How a latent is cut into tiles and put together again."""

    settings: TileSettings
    batch: int | None = None
    """Tiles that run at once; None for as many as fit."""
    tiles: Callable[[int, int, TileSettings], TilePlan] = even_tiles
    window: Callable[[int, int], Tensor] = centred_window


class _TileTooLarge(RuntimeError):
    """One tile does not fit into memory."""


def fitting_velocity(velocity: Velocity, z: Tensor, cutting: Cutting, memory: TileMemory, tick: Tick) -> Tensor:
    """``tiled_velocity``; where one tile does not fit into memory, once more with tiles of half the side.

    Raises:
        RuntimeError: where one tile of the least side does not fit either.
    """
    settings = cutting.settings
    while True:
        plan = cutting.tiles(z.shape[2], z.shape[3], settings)
        batch = cutting.batch or memory.batch(plan.tile_height, plan.tile_width)
        try:
            return tiled_velocity(velocity, z, plan, cutting.window(plan.tile_height, plan.tile_width), batch, tick)
        except _TileTooLarge as error:
            side, least = max(plan.tile_height, plan.tile_width), TILE_SIDES[-1]
            if side <= least:
                raise RuntimeError(
                    f"out of memory with one tile of {side} latent cells, the least there is: close other programs, or run "
                    "on the CPU"
                ) from error.__cause__
            settings = settings.with_tile(max(least, side // 2))
            log.warning("out of memory with one tile of %d latent cells; going on with %d", side, settings.tile)
        memory.release()


def tiled_velocity(velocity: Velocity, z: Tensor, plan: TilePlan, window: Tensor, batch: int, tick: Tick) -> Tensor:
    """Velocity of a whole latent as the window-weighted mean over its tiles.

    Tiles of all images run together in batches of ``batch``; when memory runs out the batch is halved and the run goes
    on, down to one tile; where that does not fit either, an error says so.

    Args:
        velocity: maps ``(N, C, tile_height, tile_width)`` to the same shape.
        z: scaled latents ``(B, C, height, width)``.
        window: ``(tile_height, tile_width)``, above 0.

    Returns:
        ``(B, C, height, width)`` in the dtype of ``z``; sums are kept in fp32.
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
    for some, tiles in _run_batches(velocity, z, plan, jobs, batch):
        for (image, top, left), tile in zip(some, tiles, strict=True):
            total[image, :, top : top + plan.tile_height, left : left + plan.tile_width] += tile.float() * window
        done += len(some)
        tick(done, len(jobs), lambda: total / weight)
    return (total / weight).to(z.dtype)


def _run_batches(
    velocity: Velocity, z: Tensor, plan: TilePlan, jobs: list[tuple[int, int, int]], batch: int
) -> Iterator[tuple[list[tuple[int, int, int]], Tensor]]:
    """Yield (jobs, velocities) batch by batch, halving the batch when memory runs out."""
    start = 0
    while start < len(jobs):
        some = jobs[start : start + batch]
        tiles = torch.stack([z[i, :, y : y + plan.tile_height, x : x + plan.tile_width] for i, y, x in some])
        try:
            result = velocity(tiles)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(some) == 1:
                raise _TileTooLarge(f"out of memory with one tile: {error}") from error
            batch = len(some) // 2
            log.warning("out of memory with %d tiles at once; going on with %d", len(some), batch)
            continue
        yield some, result
        start += len(some)
