"""Runs a VAE program tile by tile, with the result of the untiled run up to rounding.

Every activation is one full map. A convolution sees its tile with the pixels around it. A norm takes mean and variance of
the whole map, merged from disjoint parts (Chan, Golub, LeVeque 1979). Attention shows all keys to each tile of queries.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..system.heap import own_heap
from ..system.memory import RanOut, check_ram, is_out_of_memory
from . import attention
from .forms import KEY_TILE, Kernels, Place
from .norms import norms_for
from .plan import PLACES, Plan, Region, Step, plan_tiles, reading
from .program import Conv, Keys, Program, Queries, decoder_program, encoder_program
from .tile_loop import Tick, TileLoop
from .transfer import Mover

log = logging.getLogger("tsdsr")

Affine = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""Gives weight and bias of a norm, on the device of a tensor."""
_CUTS = 2
"""How often the tiles of a pass are cut in half before maps go to host memory."""


def plan_and_run(
    program: Program, x: Tensor, device: torch.device, free: Callable[[], int | None], tile: int | None, ram: Callable[[], int],
    affine: Affine = lambda norm, like: (norm.weight, norm.bias),
    tick: Tick = lambda done, total: None, release: Callable[[], None] = lambda: None,
    ran_out: RanOut = is_out_of_memory, kernels: Kernels | None = None,
) -> Tensor:  # fmt: skip
    """``run`` by a plan for the memory there is; where a device's runs out beside the maps, once more with them in host memory.

    Args:
        free: bytes that maps and tiles may take on the device; None where there is no telling.
        tile: greatest side of a tile in pixels; None for what suits the memory.
        ram: free bytes of host memory.
        ran_out: whether an error says that memory ran out.
        kernels: of the device; None for what is known of it.

    Raises:
        MemoryError: where the maps are too large for host memory.
        RuntimeError: where the least tile does not fit into memory.
    """
    forms, kernels = [op.form for op in program], kernels or kernels_of(device)

    def attempt(places: Sequence[tuple[Place, Place]]) -> Tensor | None:
        plan = plan_tiles(forms, x.shape[2], x.shape[3], x.dtype.itemsize, free(), tile, places, kernels)
        check_ram(ram_bytes(plan, device), ram())
        try:
            return run(program, x, plan, device, affine, tick, release, ran_out)
        except RuntimeError as error:
            if not (ran_out(error) and _could_move(plan, device)):
                raise
        return None

    result = attempt(PLACES)
    if result is None:
        log.warning("out of memory with the VAE's maps on the device; going on with them in host memory")
        release()  # here, where the error no longer holds the maps
        result = attempt(PLACES[1:])
    assert result is not None
    return result


def check_memory(
    vae: nn.Module, height: int, width: int, factor: int, itemsizes: tuple[int, int], device: torch.device, free: int | None,
    tile: int | None, ram: Callable[[int], int], kernels: Kernels | None = None, patched: bool = False,
) -> None:  # fmt: skip
    """Raise ``MemoryError``, before any work, where ``plan_and_run`` would for one half of an autoencoder.

    Args:
        height, width: in pixels.
        factor: pixels per latent cell.
        itemsizes: bytes of one value in the encoder and in the decoder.
        ram: free bytes of host memory, told how many are wanted.
        patched: as for the programs.
    """
    kernels = kernels or kernels_of(device)
    encoder, decoder = ([op.form for op in half(vae, patched)] for half in (encoder_program, decoder_program))
    plans = (
        plan_tiles(encoder, height, width, itemsizes[0], free, tile, kernels=kernels),
        plan_tiles(decoder, height // factor, width // factor, itemsizes[1], free, tile, kernels=kernels),
    )
    needed = max(ram_bytes(plan, device) for plan in plans)
    check_ram(needed, ram(needed))


def kernels_of(device: torch.device) -> Kernels:
    """How the kernels of ``device`` work: those that are not known to take little memory count as taking much."""
    if device.type == "cpu":
        return Kernels("fused", unfolded=not torch.backends.mkldnn.is_available())
    nvidia = device.type == "cuda" and torch.version.cuda is not None  # AMD's devices are of this type too
    fused = nvidia and torch.backends.cuda.mem_efficient_sdp_enabled()  # no other kernel of torch's takes a head of 512
    cudnn = nvidia and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return Kernels("fused" if fused else "streamed", unfolded=not cudnn)


def ram_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of host memory that a run by ``plan`` takes."""
    return plan.device_bytes if device.type == "cpu" else plan.host_bytes


def _could_move(plan: Plan, device: torch.device) -> bool:
    """Whether the maps take memory of a device that host memory could spare it."""
    return plan.maps == "device" and device.type != "cpu"


@torch.inference_mode()
def run(
    program: Program, x: Tensor, plan: Plan, device: torch.device,
    affine: Affine = lambda norm, like: (norm.weight, norm.bias),
    tick: Tick = lambda done, total: None, release: Callable[[], None] = lambda: None,
    ran_out: RanOut = is_out_of_memory,
) -> Tensor:  # fmt: skip
    """Run a decoder's or encoder's program over a batch, image by image; nothing of the autoencoder is changed.

    Args:
        x: ``(B, C, plan.height, plan.width)`` in the autoencoder's type; best in host memory where the maps are.
        device: where the modules compute.
        affine: for hosts that keep the weights of norms elsewhere or in another type.
        release: gives cached memory back, after running out.
        ran_out: whether an error says that memory ran out.

    Returns:
        ``(B, C', H', W')`` in the type and on the device of ``x``.

    Raises:
        InputError: where the plan was made for something else.
        RuntimeError: where the least tile does not fit into memory; beside maps that could lie in host memory instead, where
            a tile cut in half twice does not.
    """
    expected, last = (plan.steps[0].form.reads, plan.height, plan.width), plan.steps[-1]
    if tuple(x.shape[1:]) != expected or [op.form for op in program] != [step.form for step in plan.steps]:
        raise InputError(f"input of shape {tuple(x.shape)}: the plan is for another program, or for images of {expected}")
    result = x.new_empty(len(x), last.form.writes, last.height, last.width)
    most_cuts = _CUTS if _could_move(plan, device) else None
    after = own_heap().check if device.type == "cpu" else lambda: None
    tiles = TileLoop(plan.tiles * len(x), tick, release, ran_out, most_cuts, after)
    with _no_search():
        for index in range(len(x)):
            _Picture(x[index : index + 1], plan, device, affine, tiles).run(program, result[index : index + 1])
    return result


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """Keeps cuDNN from timing all its algorithms for each shape of tiles, of which there are many."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass
class _Map:
    """A full activation and, where a norm follows, its statistics."""

    tensor: Any = None  # a Tensor from its first tile on
    parts: list[Any] = field(default_factory=list)
    addend: Tensor | None = None
    """What is still to be added to it, where the next pass does that as it reads."""
    compute: Callable[[Region], Tensor] | None = None
    """Computes a part of it, where it is not kept."""
    size: tuple[int, int] = (0, 0)
    """Height and width, where it is not kept."""

    @property
    def sides(self) -> tuple[int, int]:
        return self.size if self.compute else self.tensor.shape[2:]

    def part(self, region: Region) -> Tensor:
        return self.compute(region) if self.compute else _part(self.tensor, region)


class _Picture:
    """One image on its way through a program."""

    def __init__(self, x: Tensor, plan: Plan, device: torch.device, affine: Affine, tiles: TileLoop) -> None:
        self.plan, self.affine, self.tiles = plan, affine, tiles
        self.mover = Mover(torch.empty(0, device=device).device)  # with its index
        self.dtype = x.dtype
        last = x.dtype.itemsize == 2 and device.type in ("cuda", "cpu") and not plan.kernels.unfolded
        self.layout = torch.channels_last if last else torch.contiguous_format  # faster; fp32 rounds less the other way
        self.wide = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=device)
        self.norms = norms_for(self.mover.device, x.dtype, self.layout)
        self.x, self.h, self.keys, self.values = _Map(x), _Map(), _Map(), _Map()

    def run(self, program: Program, result: Tensor) -> None:
        """Write the outcome of ``program`` into ``result``."""
        for op, following, step in zip(program, (*program[1:], None), self.plan.steps, strict=True):
            eps = following.norm.eps if step.form.measured and following and following.norm else None
            if isinstance(op, Conv):
                doubled = following is not None and following.form.rescale == "up"
                self._convolve(op, step, _Map(result if op is program[-1] else None), eps, doubled)
            elif isinstance(op, Keys):
                self._take_keys(op, step)
            else:
                self._attend(op, step, eps)
            self.mover.flush()

    def _convolve(self, op: Conv, step: Step, target: _Map, eps: float | None, doubled: bool) -> None:
        """``doubled``: whether the next pass enlarges the result."""
        form, closes = op.form, op.form.kind == "close"
        source = self.h if closes else self.x
        scale_shift = None if op.norm is None else self._scale_shift(op.norm, source)
        late = doubled and self.norms.adds_late and self.plan.maps == "device"
        if step.kept and target.tensor is None and not (step.whole and self.plan.maps == "device"):
            target.tensor = self._space(step, self.plan.maps)  # here, where running out does not make tiles smaller

        def compute(region: Region) -> Tensor:
            need = reading(form, region, *source.sides)
            tile = self.mover.read(source.part(need.area))
            if scale_shift is None:
                tile = tile.contiguous(memory_format=self.layout)
            else:
                tile = self.norms.apply(tile, *scale_shift, True)
            if form.rescale == "up":
                x = source.addend
                tile = self.norms.double(tile, None if x is None else _part(x, need.area))
            elif any(need.pad):
                tile = F.pad(tile, (0, need.pad[1], 0, need.pad[0]))
            tile = op.module(tile)[:, :, need.skip[0] :, need.skip[1] :]
            return tile[:, :, : region.height, : region.width]

        def work(region: Region) -> Callable[[], None]:
            tile, x = compute(region), None
            if closes:
                x = self.mover.read(self.x.part(region))
                x = x if op.shortcut is None else op.shortcut(x.contiguous(memory_format=self.layout))
                if late and (region.height, region.width) == (step.height, step.width):
                    target.addend, x = x, None
            return self._written(step, target, region, *self.norms.add(tile, x, eps))

        def measure(region: Region) -> Callable[[], None]:
            parts = self.norms.add(compute(region), None, eps)[1]
            return lambda: target.parts.extend(parts)

        if step.runs:
            self.tiles.each(step.regions, work if step.kept else measure)
        if not step.kept:
            target.compute, target.size = compute, (step.height, step.width)
        if form.kind == "open":
            self.h = target
        else:
            self.x, self.h = target, _Map()

    def _written(self, step: Step, target: _Map, region: Region, tile: Tensor, parts: list[Any]) -> Callable[[], None]:
        """What writes ``tile`` and counts its statistics in."""
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
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=layout)

    def _scale_shift(self, norm: nn.GroupNorm, source: _Map) -> tuple[Tensor, Tensor]:
        """The norm of a whole map as ``x * scale + shift``, each ``(1, C, 1, 1)``."""
        weight, bias = self.affine(norm, self.wide)
        return self.norms.scale_shift(source.parts, norm, weight, bias)

    def _take_keys(self, op: Keys, step: Step) -> None:
        scale_shift = self._scale_shift(op.norm, self.x)
        self.keys, self.values = (_Map(self._space(step, self.plan.keys)) for _ in range(2))

        def work(region: Region) -> Callable[[], None]:
            tile = self.norms.apply(self.mover.read(self.x.part(region)), *scale_shift, False)
            key, value = _project(op.key, tile), _project(op.value, tile)
            del tile  # its memory serves what follows
            key, value = self.mover.ready(self.keys.part(region), key), self.mover.ready(self.values.part(region), value)

            def write() -> None:
                self.mover.write(self.keys.part(region), key)
                self.mover.write(self.values.part(region), value)

            return write

        self.tiles.each(step.regions, work)

    def _attend(self, op: Queries, step: Step, eps: float | None) -> None:
        scale_shift = self._scale_shift(op.norm, self.x)
        target, whole = _Map(), Region(0, 0, step.height, step.width)

        def work(region: Region) -> Callable[[], None]:
            x = self.mover.read(self.x.part(region))
            tile = _project(op.query, self.norms.apply(x, *scale_shift, False))
            tile = _project(op.out, self._said(tile, whole)).contiguous(memory_format=self.layout)
            return self._written(step, target, region, *self.norms.add(tile, x, eps))

        self.tiles.each(step.regions, work)
        self.x, self.keys, self.values = target, _Map(), _Map()

    def _said(self, query: Tensor, whole: Region) -> Tensor:
        """What all keys say to a tile of queries."""
        if not self.plan.streamed:
            return attention.fused(query, self.keys.part(whole), self.values.part(whole))
        pairs = (
            (self.mover.read(self.keys.part(region)), self.mover.read(self.values.part(region)))
            for region in whole.grid(KEY_TILE, KEY_TILE)
        )
        return attention.streamed(query, pairs)


def _part(tensor: Tensor, region: Region) -> Tensor:
    return tensor[:, :, region.top : region.bottom, region.left : region.right]


def _project(module: nn.Module, tile: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution of ``(1, C, H, W)``."""
    return module(tile.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if isinstance(module, nn.Linear) else module(tile)
