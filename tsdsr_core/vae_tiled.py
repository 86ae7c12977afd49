"""Runs a VAE program tile by tile, with the result of the untiled run up to rounding.

Every activation is one full map. A convolution sees its tile with the pixels around it. A norm takes mean and variance of
the whole map, merged from disjoint parts (Chan, Golub, LeVeque 1979). Attention shows all keys to each tile of queries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import check_ram, is_out_of_memory
from .vae_mover import Mover
from .vae_plan import KEY_TILE, LEAST_TILE, PLACES, Place, Plan, Region, Step, plan_tiles, reading
from .vae_program import Conv, Keys, Program, Queries

log = logging.getLogger("tsdsr")

Affine = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""Gives weight and bias of a norm, on the device of a tensor."""
Tick = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) after each tile; may raise to end the run."""
Part = tuple[int, Tensor, Tensor]
"""A part of a map: pixels, and the mean and summed squared deviation of each channel, in fp32 or better."""
_CHUNK = 2**21
"""Elements that the CPU measures at once, so that they are still near when they are read again."""


def plan_and_run(
    program: Program, x: Tensor, device: torch.device, free: Callable[[], int | None], tile: int | None, ram: Callable[[], int],
    affine: Affine = lambda norm, like: (norm.weight, norm.bias),
    tick: Tick = lambda done, total: None, release: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """``run`` by a plan for the memory there is; where a device's runs out beside the maps, once more with them in host memory.

    Args:
        free: bytes that maps and tiles may take on the device; None where there is no telling.
        tile: greatest side of a tile in pixels; None for what suits the memory.
        ram: free bytes of host memory.

    Raises:
        MemoryError: where the maps are too large for host memory.
        RuntimeError: where the least tile does not fit into memory.
    """
    forms = [op.form for op in program]

    def attempt(plan: Plan) -> Tensor:
        check_ram(plan.device_bytes if device.type == "cpu" else plan.host_bytes, ram())
        return run(program, x, plan, device, affine, tick, release)

    plan = plan_tiles(forms, x.shape[2], x.shape[3], x.dtype.itemsize, free(), tile)
    try:
        return attempt(plan)
    except RuntimeError as error:
        if not (is_out_of_memory(error) and _could_move(plan, device)):
            raise
        log.warning("out of memory with the VAE's maps on the device; going on with them in host memory")
    release()  # here, where the error no longer holds the maps
    return attempt(plan_tiles(forms, x.shape[2], x.shape[3], x.dtype.itemsize, free(), tile, PLACES[1:]))


def _could_move(plan: Plan, device: torch.device) -> bool:
    """Whether the maps take memory of a device that host memory could spare it."""
    return plan.maps == "device" and device.type != "cpu"


@torch.inference_mode()
def run(
    program: Program, x: Tensor, plan: Plan, device: torch.device,
    affine: Affine = lambda norm, like: (norm.weight, norm.bias),
    tick: Tick = lambda done, total: None, release: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Run a decoder's or encoder's program over a batch, image by image; nothing of the autoencoder is changed.

    Args:
        x: ``(B, C, plan.height, plan.width)`` in the autoencoder's type; best in host memory where the maps are.
        device: where the modules compute.
        affine: for hosts that keep the weights of norms elsewhere or in another type.
        release: gives cached memory back, after running out.

    Returns:
        ``(B, C', H', W')`` in the type and on the device of ``x``.

    Raises:
        ValueError: where the plan was made for something else.
        RuntimeError: where the least tile does not fit into memory, or any beside maps that could lie in host memory instead.
    """
    expected, last = (plan.steps[0].form.reads, plan.height, plan.width), plan.steps[-1]
    if tuple(x.shape[1:]) != expected or [op.form for op in program] != [step.form for step in plan.steps]:
        raise ValueError(f"input of shape {tuple(x.shape)}: the plan is for another program, or for images of {expected}")
    result = x.new_empty(len(x), last.form.writes, last.height, last.width)
    tiles = _Tiles(plan.tiles * len(x), tick, release, cut=not _could_move(plan, device))
    for index in range(len(x)):
        _Picture(x[index : index + 1], plan, device, affine, tiles).run(program, result[index : index + 1])
    return result


def measure(tile: Tensor) -> list[Part]:
    """A tile ``(1, C, H, W)`` in parts."""
    wide = _wide(tile.dtype)
    if tile.device.type != "cpu":
        variance, mean = torch.var_mean(tile.to(wide), (0, 2, 3), correction=0)
        return [(tile[0, 0].numel(), mean, variance * tile[0, 0].numel())]
    parts = []  # torch.var_mean is slow here
    for rows in tile.split(max(1, _CHUNK // (tile.shape[1] * tile.shape[3])), 2):
        mean = rows.mean((0, 2, 3), dtype=wide)
        off = rows - mean[:, None, None]
        mean += off.mean((0, 2, 3))  # what rounding lost
        parts.append((rows.shape[2] * rows.shape[3], mean, off.square_().sum((0, 2, 3))))
    return parts


def merge(parts: list[Part], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(groups,)`` of each group of channels over disjoint parts: variance within and between them."""
    counts, means, squares = zip(*parts, strict=True)
    mean, square = (torch.stack(values).unflatten(1, (groups, -1)) for values in (means, squares))
    share = torch.tensor(counts, dtype=mean.dtype, device=mean.device)[:, None, None] / (sum(counts) * mean.shape[2])
    near = mean[0, :, 0]  # sums of differences from it are exact where a map is constant
    whole = near + (share * (mean - near[:, None])).sum((0, 2))
    return whole, (square / (sum(counts) * mean.shape[2]) + share * (mean - whole[:, None]).square()).sum((0, 2))


class _Tiles:
    """Goes over the tiles of all passes: counts them, and with ``cut`` makes them smaller after memory ran out."""

    def __init__(self, total: int, tick: Tick, release: Callable[[], None], cut: bool) -> None:
        self.done, self.total, self.cuts, self.tick, self.release, self.cut = 0, total, 0, tick, release, cut

    def each(self, regions: Iterable[Region], work: Callable[[Region], Callable[[], None]]) -> None:
        """Call ``work`` on each region, and then what it returns, which writes the result and takes no memory."""
        for region in regions:
            self._one(region, work, 0)
            self.done += 1
            self.tick(self.done, self.total)

    def _one(self, region: Region, work: Callable[[Region], Callable[[], None]], depth: int) -> None:
        side = max(region.height, region.width)
        if depth < self.cuts and side > LEAST_TILE:
            for part in region.grid(-(-region.height // 2), -(-region.width // 2)):
                self._one(part, work, depth + 1)
            return
        try:
            write = work(region)
        except RuntimeError as error:
            if not self.cut or not is_out_of_memory(error):
                raise
            if side <= LEAST_TILE:
                advice = "close other programs, or run on the CPU"
                raise RuntimeError(f"out of memory with one VAE tile of {side} pixels, the least there is: {advice}") from error
            self.cuts = depth + 1
            log.warning("out of memory with one VAE tile of %d pixels; going on with half of that", side)
        else:
            write()
            return
        self.release()
        self._one(region, work, depth)


@dataclass
class _Map:
    """A full activation and, where a norm follows, its statistics."""

    tensor: Any = None  # a Tensor from its first tile on
    parts: list[Part] = field(default_factory=list)

    def part(self, region: Region) -> Tensor:
        return self.tensor[:, :, region.top : region.bottom, region.left : region.right]


class _Picture:
    """One image on its way through a program."""

    def __init__(self, x: Tensor, plan: Plan, device: torch.device, affine: Affine, tiles: _Tiles) -> None:
        self.plan, self.affine, self.tiles = plan, affine, tiles
        self.mover = Mover(torch.empty(0, device=device).device)  # with its index
        last = x.dtype.itemsize == 2 and device.type in ("cuda", "cpu")  # faster; fp32 rounds less the other way
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.x, self.h, self.keys, self.values = _Map(x), _Map(), _Map(), _Map()

    def run(self, program: Program, result: Tensor) -> None:
        """Write the outcome of ``program`` into ``result``."""
        for op, step in zip(program, self.plan.steps, strict=True):
            if isinstance(op, Conv):
                self._convolve(op, step, _Map(result if op is program[-1] else None))
            elif isinstance(op, Keys):
                self._take_keys(op, step)
            else:
                self._attend(op, step)
            self.mover.flush()

    def _convolve(self, op: Conv, step: Step, target: _Map) -> None:
        form, closes = op.form, op.form.kind == "close"
        source = self.h if closes else self.x
        scale_shift = None if op.norm is None else self._scale_shift(op.norm, source)

        def work(region: Region) -> Callable[[], None]:
            need = reading(form, region, *source.tensor.shape[2:])
            tile = self.mover.read(source.part(need.area))
            tile = tile.contiguous(memory_format=self.layout) if scale_shift is None else _normal(tile, *scale_shift, True)
            if form.rescale == "up":
                tile = F.interpolate(tile, scale_factor=2.0, mode="nearest")
            elif any(need.pad):
                tile = F.pad(tile, (0, need.pad[1], 0, need.pad[0]))
            tile = op.module(tile)[:, :, need.skip[0] :, need.skip[1] :]
            tile = tile[:, :, : region.height, : region.width]
            if closes:
                x = self.mover.read(self.x.part(region))
                tile += x if op.shortcut is None else op.shortcut(x.contiguous(memory_format=self.layout))
            return self._written(step, target, region, tile)

        self.tiles.each(step.regions, work)
        if form.kind == "open":
            self.h = target
        else:
            self.x, self.h = target, _Map()

    def _written(self, step: Step, target: _Map, region: Region, tile: Tensor) -> Callable[[], None]:
        """What writes ``tile`` and counts its statistics in."""
        parts = measure(tile) if step.form.measured else []
        if target.tensor is None:
            whole = (region.height, region.width) == (step.height, step.width)
            target.tensor = tile if whole and self.plan.maps == "device" else self._space(step, self.plan.maps)
        if target.tensor is not tile:
            tile = self.mover.ready(target.part(region), tile)

        def write() -> None:
            if target.tensor is not tile:
                self.mover.write(target.part(region), tile)
            target.parts += parts

        return write

    def _space(self, step: Step, place: Place) -> Tensor:
        """Memory for the result of a pass: that of x where it is added to x."""
        form, x = step.form, self.x.tensor
        if form.kind in ("close", "queries") and form.writes <= x.shape[1]:
            return x[:, : form.writes]  # each tile of x is read before it is written, and no other tile reads it
        shape, device = (1, form.writes, step.height, step.width), self.mover.device if place == "device" else "cpu"
        layout = torch.channels_last if form.kind == "keys" else self.layout  # attention wants the channels of a pixel together
        return torch.empty(shape, dtype=x.dtype, device=device, memory_format=layout)

    def _scale_shift(self, norm: nn.GroupNorm, source: _Map) -> tuple[Tensor, Tensor]:
        """The norm of a whole map as ``x * scale + shift``, each ``(1, C, 1, 1)``."""
        mean, variance = merge(source.parts, norm.num_groups)
        weight, bias = (value.to(mean).unflatten(0, (norm.num_groups, -1)) for value in self.affine(norm, mean))
        scale = weight * (variance + norm.eps).rsqrt()[:, None]
        shift = bias - mean[:, None] * scale
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)

    def _take_keys(self, op: Keys, step: Step) -> None:
        scale_shift = self._scale_shift(op.norm, self.x)
        self.keys, self.values = (_Map(self._space(step, self.plan.keys)) for _ in range(2))

        def work(region: Region) -> Callable[[], None]:
            tile = _normal(self.mover.read(self.x.part(region)), *scale_shift, False)
            key, value = _project(op.key, tile), _project(op.value, tile)
            del tile  # its memory serves what follows
            key, value = self.mover.ready(self.keys.part(region), key), self.mover.ready(self.values.part(region), value)

            def write() -> None:
                self.mover.write(self.keys.part(region), key)
                self.mover.write(self.values.part(region), value)

            return write

        self.tiles.each(step.regions, work)

    def _attend(self, op: Queries, step: Step) -> None:
        scale_shift = self._scale_shift(op.norm, self.x)
        target, whole = _Map(), Region(0, 0, step.height, step.width)

        def work(region: Region) -> Callable[[], None]:
            x = self.mover.read(self.x.part(region))
            tile = _project(op.query, _normal(x, *scale_shift, False))
            tile = self._said(_tokens(tile), whole).reshape(1, region.height, region.width, -1).permute(0, 3, 1, 2)
            tile = _project(op.out, tile).add_(x).contiguous(memory_format=self.layout)
            return self._written(step, target, region, tile)

        self.tiles.each(step.regions, work)
        self.x, self.keys, self.values = target, _Map(), _Map()

    def _said(self, query: Tensor, whole: Region) -> Tensor:
        """What all keys say to some queries; from host memory they come in tiles (online softmax, Milakov 2018), in fp32."""
        if self.plan.keys == "device":
            return F.scaled_dot_product_attention(query, _tokens(self.keys.part(whole)), _tokens(self.values.part(whole)))
        wide = _wide(query.dtype)
        q = query[0, 0].to(wide) * query.shape[-1] ** -0.5
        most = q.new_full((len(q), 1), -torch.inf)
        total, said = torch.zeros_like(most), torch.zeros_like(q)
        for region in whole.grid(KEY_TILE, KEY_TILE):
            key, value = (_tokens(self.mover.read(kept.part(region)))[0, 0].to(wide) for kept in (self.keys, self.values))
            score = q @ key.T  # (queries, keys of the tile)
            top = torch.maximum(most, score.amax(1, keepdim=True))
            fade = (most - top).exp_()
            score.sub_(top).exp_()
            total.mul_(fade).add_(score.sum(1, keepdim=True))
            said.mul_(fade).addmm_(score, value)
            most = top
        return said.div_(total).to(query.dtype)[None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normal(tile: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
    """``tile * scale + shift``, then SiLU if wanted, in fp32, rounded once."""
    wide = torch.addcmul(shift, tile, scale)
    return (F.silu(wide, inplace=True) if activate else wide).to(tile.dtype)


def _project(module: nn.Module, tile: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution of ``(1, C, H, W)``."""
    return module(tile.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(module, nn.Linear) else module(tile)


def _tokens(tile: Tensor) -> Tensor:
    """``(1, C, H, W)`` as one head's ``(1, 1, H * W, C)``, the channels together: else attention makes all scores at once."""
    return tile.permute(0, 2, 3, 1).contiguous().flatten(1, 2)[:, None]
