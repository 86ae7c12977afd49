"""The parts of ``tsdsr bench --gpu`` beside the comparison: exactness, attention, profiles, and smaller cards."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile

from ...families.restorer import Restorer
from ...pipeline import restore
from ...system.atomic import reason
from ...system.device import free_memory, free_ram, held_memory, release_memory
from ...system.memory import is_out_of_memory
from ...system.peak import peak_memory
from ...vae import attention
from ...vae.execute import plan_and_run
from ...vae.feature_map import crop
from ...vae.passes import KEY_TILE
from ...vae.plan import Region
from ...vae.program import decoder_program, encoder_program
from .benchmark import SCALE, Contender, synchronise
from .command import Trial

HEAD = 512
"""Channels of the one head of SD3's autoencoder."""
KERNELS = 12
"""Kernels named in a profile."""
_LAUNCH, _WAIT, _COPY = "LaunchKernel", "Synchronize", "Memcpy HtoD"
"""Parts of the names that the profiler gives to launches, waits and copies to the device."""

Row = dict[str, Any]


def exactness(config: dict[str, Any], side: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Errors of the untiled (diffusers) and the tiled autoencoder with random weights, against fp64 without tiles.

    Args:
        config: of the autoencoder.
        side: of the picture in pixels; tiles have a third of it.

    Returns:
        For each half and type of number: ``half``, ``dtype``, ``untiled`` and ``tiled``, the largest error relative to the
        largest value.
    """
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**config).eval().requires_grad_(False)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    given = {
        "encoder": torch.rand(1, 3, side, side) * 2 - 1,
        "decoder": torch.randn(1, config["latent_channels"], side // factor, side // factor),
    }
    rows = []
    with _full_precision(), torch.inference_mode():
        for kind in dict.fromkeys((torch.float32, dtype)):
            rounded = nn.Module.to(copy.deepcopy(vae), device, kind)
            for half, x in given.items():
                x = x.to(device, kind)
                exact = _untiled(nn.Module.double(copy.deepcopy(rounded)), half, x.double())
                program = (encoder_program if half == "encoder" else decoder_program)(rounded)
                tiled = plan_and_run(program, x, device, lambda: free_memory(device), side // 3, free_ram)
                found = {"untiled": _untiled(rounded, half, x), "tiled": tiled}
                errors = {name: float((y.double() - exact).abs().max() / exact.abs().max()) for name, y in found.items()}
                rows.append({"half": half, "dtype": str(kind), **errors})
    return rows


def _untiled(vae: Any, half: str, x: Tensor) -> Tensor:
    return vae.encode(x).latent_dist.parameters if half == "encoder" else vae.decode(x, return_dict=False)[0]


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 means fp32: TF32 keeps ten bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def difference(contenders: Sequence[Contender], side: int, device: torch.device) -> Row:
    """How far the two procedures' results are apart in levels of 255, with the same sizes and tiles for both."""
    image = torch.rand(1, 3, side // SCALE, side // SCALE, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        options = replace(contenders[-1].options, colour_fix="none")
        first, second = (restore(image, found.model, options) for found in contenders)
    apart = (first - second).abs() * 255
    return {"side": side, "maximum": float(apart.max()), "mean": float(apart.mean())}


def attention_rows(sides: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Seconds, and bytes beyond queries, keys and values, of one head of 512 over the latent cells of images of given sides."""
    rows = []
    for side in sides:
        cells = side // 8
        query, key, value = (
            torch.randn(1, HEAD, cells, cells, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for _ in range(3)
        )
        tiles = Region(0, 0, cells, cells).grid(KEY_TILE, KEY_TILE)
        pairs = [(crop(key, tile), crop(value, tile)) for tile in tiles]
        ways: dict[str, Callable[[], Tensor]] = {
            "torch's kernel": lambda q=query, k=key, v=value: attention.fused(q, k, v),
            "over tiles of keys": lambda q=query, p=pairs: attention.streamed(q, p),
        }
        for name, work in ways.items():
            row: Row = {"side": side, "tokens": cells**2, "way": name}
            try:
                row["seconds"], row["beyond_bytes"] = measured(work, device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row["error"] = reason(error)
            release_memory(device)
            rows.append(row)
    return rows


@torch.inference_mode()
def measured(work: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds and peak bytes of ``work``, the second time that it runs."""
    work()
    synchronise(device)
    release_memory(device)
    with peak_memory(device) as memory:
        start = time.perf_counter()
        result = work()
        synchronise(device)
        seconds = time.perf_counter() - start
        found = memory.growth
    del result
    return seconds, found


def profiles(model: Restorer, side: int, device: torch.device) -> dict[str, Row]:
    """Where the time of one tile of the step and of decoding a picture of ``side`` pixels goes: ``profiled`` for each."""
    found = model.model()
    cells = side // found.vae_factor
    channels = model.vae.config["latent_channels"]
    tile, latent = (torch.randn(1, channels, n, n, device=device) for n in (min(64, cells), cells))
    return {
        "step": profiled(lambda: found.velocity(tile), device),
        "decode": profiled(lambda: found.decode(latent), device),
    }


@torch.inference_mode()
def profiled(work: Callable[[], Any], device: torch.device) -> Row:
    """The kernels in which ``work`` spends most time.

    Returns:
        ``milliseconds`` of all kernels; ``launches``, ``waits`` and ``copies`` to the device; and ``kernels``, the
        ``KERNELS`` with most time: ``name``, ``calls`` and ``milliseconds``.  On the CPU torch's operations take their place.
    """
    work()
    synchronise(device)
    with profile() as recorded:
        work()
        synchronise(device)
    events: Any = recorded.key_averages()
    spent = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    kernels = [event for event in events if device.type == "cpu" or event.device_type != DeviceType.CPU]
    kernels.sort(key=lambda event: getattr(event, spent), reverse=True)
    count = {part: sum(event.count for event in events if part in event.key) for part in (_LAUNCH, _WAIT, _COPY)}
    return {
        "milliseconds": sum(getattr(event, spent) for event in kernels) / 1e3,
        "launches": count[_LAUNCH], "waits": count[_WAIT], "copies": count[_COPY],
        "kernels": [
            {"name": event.key, "calls": event.count, "milliseconds": getattr(event, spent) / 1e3}
            for event in kernels[:KERNELS]
        ],
    }  # fmt: skip


def held(ours: Contender, side: int, gigabytes: int, device: torch.device) -> Row:
    """Our procedure at ``side`` on a card of ``gigabytes``: the rest of this one is filled, so that plans and allocator see it.

    What the driver itself takes (some hundred MB) is not part of the ``gigabytes``.
    """
    named = {"gigabytes": gigabytes, "side": side}
    ballast = filling(int(gigabytes * 1e9), free_memory(device), 0 if device.type == "cpu" else held_memory(device))
    if ballast is None:
        return {**named, "skipped": "needs a GPU with more memory"}
    filled = torch.empty(ballast, dtype=torch.uint8, device=device)
    trial = Trial(ours, side, device)
    try:
        trial.time()
    finally:
        del filled
        release_memory(device)
    return {**named, **trial.row()}


def filling(limit: int, free: int | None, taken: int) -> int | None:
    """Bytes to fill so that weights and all that comes have ``limit`` bytes; None where there are fewer, or on the CPU.

    >>> filling(8, free=20, taken=3), filling(24, free=20, taken=3), filling(8, free=None, taken=0)
    (15, None, None)
    """
    ballast = -1 if free is None else free + taken - limit
    return ballast if ballast >= 0 else None
