"""Runs a VAE program tile by tile, with the result of the untiled run up to rounding.

Every activation is one full feature map. A convolution reads its tile with a halo of neighbouring pixels. A norm uses mean and
variance of the whole map, merged from its tiles (Chan, Golub, LeVeque 1979). In attention, each tile of queries sees all keys.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..system.heap import own_heap
from ..system.memory import RanOut, check_ram, is_out_of_memory
from .attention import attend, project_keys_and_values
from .convolution import convolve
from .feature_map import FeatureMap, WeightsOf, Workspace
from .passes import Kernels, Place
from .plan import PLACES, Plan, plan_tiles
from .program import Conv, KeyValue, Program
from .tile_loop import Tick, TileLoop

log = logging.getLogger("tsdsr")

_MAX_HALVINGS = 2
"""How often the tiles of a pass are halved before maps go to host memory."""


def plan_and_run(
    program: Program, x: Tensor, device: torch.device, free: Callable[[], int | None], tile: int | None, ram: Callable[[], int],
    weights_of: WeightsOf = lambda layer, like: (layer.weight, layer.bias),
    tick: Tick = lambda done, total: None, release: Callable[[], None] = lambda: None,
    ran_out: RanOut = is_out_of_memory, kernels: Kernels | None = None,
) -> Tensor:  # fmt: skip
    """Plan for the available memory and ``run``; if the device runs out of memory, once more with the maps in host memory.

    Args:
        free: bytes that maps and tiles may take on the device; None if unknown.
        tile: maximum side of a tile in pixels; None for automatic.
        ram: free bytes of host memory.
        ran_out: whether an error is an out-of-memory error.
        kernels: of the device; None for automatic.

    Raises:
        MemoryError: if the maps are too large for host memory.
        RuntimeError: if the smallest tile does not fit into memory.
    """
    specs, kernels = [op.spec for op in program], kernels or kernels_of(device)

    def attempt(places: Sequence[tuple[Place, Place]]) -> Tensor | None:
        plan = plan_tiles(specs, x.shape[2], x.shape[3], x.dtype.itemsize, free(), tile, places, kernels)
        check_ram(ram_bytes(plan, device), ram())
        try:
            return run(program, x, plan, device, weights_of, tick, release, ran_out)
        except RuntimeError as error:
            if not (ran_out(error) and _could_move(plan, device)):
                raise
        return None

    result = attempt(PLACES)
    if result is None:
        log.warning("out of memory with the VAE's maps on the device; continuing with them in host memory")
        release()  # here, since the error no longer refers to the maps
        result = attempt(PLACES[1:])
    assert result is not None
    return result


def check_memory(
    programs: Mapping[str, Callable[..., Program]], vae: nn.Module, height: int, width: int, factor: int,
    itemsizes: tuple[int, int], device: torch.device, free: int | None,
    tile: int | None, ram: Callable[[int], int], kernels: Kernels | None = None, patched: bool = False,
    decodes: bool = True,
) -> None:  # fmt: skip
    """Raise ``MemoryError``, before any work, if ``plan_and_run`` would for one half of an autoencoder.

    Args:
        programs: make the program of the "encoder" and of the "decoder" of ``vae``.
        height, width: in pixels.
        factor: pixels per latent cell.
        itemsizes: bytes of one value in the encoder and in the decoder.
        ram: free bytes of host memory, given the number that is needed.
        patched: as for the programs.
        decodes: whether the decoder will be used too.
    """
    kernels = kernels or kernels_of(device)
    encoder = [op.spec for op in programs["encoder"](vae, patched)]
    plans = [plan_tiles(encoder, height, width, itemsizes[0], free, tile, kernels=kernels)]
    if decodes:
        decoder = [op.spec for op in programs["decoder"](vae, patched)]
        plans.append(plan_tiles(decoder, height // factor, width // factor, itemsizes[1], free, tile, kernels=kernels))
    needed = max(ram_bytes(plan, device) for plan in plans)
    check_ram(needed, ram(needed))


def kernels_of(device: torch.device) -> Kernels:
    """How the kernels of ``device`` use memory; if unknown, they count as using much."""
    if device.type == "cpu":
        return Kernels("fused", unfolded=not torch.backends.mkldnn.is_available())
    nvidia = device.type == "cuda" and torch.version.cuda is not None  # AMD's devices are of this type too
    fused = nvidia and torch.backends.cuda.mem_efficient_sdp_enabled()  # no other kernel of torch's takes a head of 512
    cudnn = nvidia and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return Kernels("fused" if fused else "streamed", unfolded=not cudnn)


def ram_bytes(plan: Plan, device: torch.device) -> int:
    """Bytes of host memory that a run with ``plan`` needs."""
    return plan.device_bytes if device.type == "cpu" else plan.host_bytes


def _could_move(plan: Plan, device: torch.device) -> bool:
    """Whether the maps are on a device and could be in host memory instead."""
    return plan.maps == "device" and device.type != "cpu"


@torch.inference_mode()
def run(
    program: Program, x: Tensor, plan: Plan, device: torch.device,
    weights_of: WeightsOf = lambda layer, like: (layer.weight, layer.bias),
    tick: Tick = lambda done, total: None, release: Callable[[], None] = lambda: None,
    ran_out: RanOut = is_out_of_memory,
) -> Tensor:  # fmt: skip
    """Run a decoder's or encoder's program over a batch, image by image; nothing of the autoencoder is changed.

    Args:
        x: ``(B, C, plan.height, plan.width)`` in the autoencoder's type; ideally where the maps are.
        device: where the modules compute.
        weights_of: for hosts that keep the weights of layers elsewhere or in another type.
        release: frees cached memory after an out-of-memory error.
        ran_out: whether an error is an out-of-memory error.

    Returns:
        ``(B, C', H', W')`` in the type and on the device of ``x``.

    Raises:
        InputError: if the plan was made for something else.
        RuntimeError: if the smallest tile does not fit into memory; if the maps could be in host memory instead, already
            if a tile that was halved twice does not.
    """
    expected, last = (plan.steps[0].spec.in_channels, plan.height, plan.width), plan.steps[-1]
    if tuple(x.shape[1:]) != expected or [op.spec for op in program] != [step.spec for step in plan.steps]:
        raise InputError(f"input of shape {tuple(x.shape)}: the plan is for another program, or for images of {expected}")
    result = x.new_empty(len(x), last.spec.out_channels, last.height, last.width)
    max_halvings = _MAX_HALVINGS if _could_move(plan, device) else None
    after = own_heap().check if device.type == "cpu" else lambda: None
    tiles = TileLoop(plan.tiles * len(x), tick, release, ran_out, max_halvings, after)
    with _no_search():
        for index in range(len(x)):
            image = x[index : index + 1]
            _run_image(program, FeatureMap(image), result[index : index + 1], Workspace(image, plan, device, weights_of, tiles))
    return result


@contextlib.contextmanager
def _no_search() -> Iterator[None]:
    """Keep cuDNN from trying all its algorithms for each tile shape, since there are many shapes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _run_image(program: Program, x: FeatureMap, result: Tensor, work: Workspace) -> None:
    """Write what ``program`` makes of one image into ``result``."""
    hidden, keys, values = FeatureMap(), FeatureMap(), FeatureMap()
    for op, following, step in zip(program, (*program[1:], None), work.plan.steps, strict=True):
        eps = following.norm.eps if step.spec.measured and following and following.norm else None
        if isinstance(op, Conv):
            source = hidden if op.spec.kind == "residual_end" else x
            target = FeatureMap(result if op is program[-1] else None)
            convolve(work, op, step, source, x, target, eps, following is not None and following.spec.rescale == "up")
            if op.spec.kind == "residual_start":
                hidden = target
            else:
                x, hidden = target, FeatureMap()
            del source, target  # a map that is read no more must not keep its memory
        elif isinstance(op, KeyValue):
            keys, values = project_keys_and_values(work, op, step, x)
        else:
            x = attend(work, op, step, x, keys, values, eps)
            keys, values = FeatureMap(), FeatureMap()
        work.mover.flush()
