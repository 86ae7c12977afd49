"""Group norms of maps that are seen in tiles: statistics, and scale, shift and SiLU in one go.

``WideNorms`` runs everywhere, in fp32. For 16 bits on CUDA (and ROCm, which torch calls so too) two others read a map once for
its statistics and make no fp32 copy of it for that: ``TritonNorms`` where Triton compiles, else ``TorchNorms``, by the kernels
that torch has for synchronised batch norms. Each is compared with ``WideNorms`` once before it is used.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..system.atomic import reason
from . import statistics

log = logging.getLogger("tsdsr")

_SATURATED = 100.0
"""Above it ``softplus_backward`` takes a sigmoid for 1, which it is in fp32."""


class Norms(Protocol):
    """What the executor needs; tiles are ``(1, C, H, W)``, statistics a list to which those of other tiles may be added."""

    adds_late: bool
    """Whether ``double`` had better add the residual than ``add`` before it."""

    def add(self, tile: Tensor, x: Tensor | None, eps: float | None) -> tuple[Tensor, list[Any]]:
        """``tile + x``, where there is an x, and its statistics.

        Args:
            tile: may be overwritten.
            eps: of the norm that the statistics are for; None for no statistics.
        """
        ...

    def scale_shift(self, parts: list[Any], norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of a whole map as ``x * scale + shift``, fp32 or better, each ``(1, C, 1, 1)``."""
        ...

    def apply(self, tile: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
        """``tile * scale + shift``, then SiLU if wanted, rounded once."""
        ...

    def double(self, tile: Tensor, x: Tensor | None) -> Tensor:
        """``tile + x``, where there is an x, with each pixel four times, ``(1, C, 2 H, 2 W)``."""
        ...


class WideNorms:
    """In fp32, by operators that every device has."""

    adds_late = False

    def add(self, tile: Tensor, x: Tensor | None, eps: float | None) -> tuple[Tensor, list[Any]]:
        if x is not None:
            tile += x
        return tile, [] if eps is None else statistics.measure(tile)

    def scale_shift(self, parts: list[Any], norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = statistics.merge(parts, norm.num_groups)
        return affine(mean, (variance + norm.eps).rsqrt_(), weight.to(mean), bias.to(mean))

    def apply(self, tile: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
        on_cpu = tile.device.type == "cpu"  # where addcmul takes twice as long
        wide = torch.mul(tile, scale).add_(shift) if on_cpu else torch.addcmul(shift, tile, scale)
        return (F.silu(wide, inplace=True) if activate else wide).to(tile.dtype)

    def double(self, tile: Tensor, x: Tensor | None) -> Tensor:
        return F.interpolate(tile if x is None else tile + x, scale_factor=2.0, mode="nearest")


class TorchNorms(WideNorms):
    """For 16 bits on CUDA."""

    def __init__(self, layout: torch.memory_format) -> None:
        self.layout = layout

    def add(self, tile: Tensor, x: Tensor | None, eps: float | None) -> tuple[Tensor, list[Any]]:
        if x is not None:
            tile += x
        if eps is None:
            return tile, []
        tile = tile.contiguous(memory_format=self.layout)  # of a cut-out the kernel would make a copy of its own
        return tile, [(tile[0, 0].numel(), *torch.batch_norm_stats(tile, eps))]

    def scale_shift(self, parts: list[Any], norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The parts and the channels of a group are to the kernel what devices are to a synchronised batch norm."""
        counts, means, inverses = zip(*parts, strict=True)
        mean, inverse = (_by_group(values, norm.num_groups) for values in (means, inverses))
        shares = _shares(counts, len(mean) // len(parts), mean.device)
        return affine(
            *torch.batch_norm_gather_stats_with_counts(mean, mean, inverse, None, None, 0.0, norm.eps, shares), weight, bias
        )  # fmt: skip

    def apply(self, tile: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
        wide = torch.addcmul(shift, tile, scale)
        if not activate:
            return wide.to(tile.dtype)
        result = torch.empty_like(wide, dtype=tile.dtype)
        # y * sigmoid(y): of torch's kernels for it the only one that rounds to another type as it writes
        return torch.ops.aten.softplus_backward.grad_input(wide, wide, 1.0, _SATURATED, grad_input=result)


def affine(mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift ``(1, C, 1, 1)`` of a norm by mean and inverse standard deviation ``(groups,)``."""
    weight, bias = (value.unflatten(0, (len(mean), -1)) for value in (weight, bias))
    scale = weight * inverse[:, None]
    shift = torch.addcmul(bias, mean[:, None], scale, value=-1)
    return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)


def _by_group(values: tuple[Tensor, ...], groups: int) -> Tensor:
    """One value for each channel of each part, ``(C,)``, as ``(parts * channels of a group, groups)``."""
    if len(values) == 1:
        return values[0].view(groups, -1).t()
    return torch.stack(values).unflatten(1, (groups, -1)).transpose(1, 2).flatten(0, 1)


@functools.lru_cache(256)
def _shares(counts: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """The pixels of each part, once for each channel of a group; kept on the device, since image sizes repeat."""
    if len(counts) == 1:
        return torch.ones(channels, dtype=torch.float32, device=device)
    return torch.tensor(counts, dtype=torch.float32, device=device).repeat_interleave(channels)


def norms_for(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Norms:
    """The quickest norms for maps on ``device`` (with its index) in ``dtype`` and ``layout`` that work there."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return WideNorms()
    return _quickest(device, dtype, layout)


@functools.cache
def _quickest(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Norms:
    if layout == torch.channels_last and importlib.util.find_spec("triton") is not None:
        try:
            from .triton_norms import TritonNorms

            if _agrees(TritonNorms(), device, dtype, layout):
                return TritonNorms()
            log.warning("Triton's norms of the VAE differ from torch's on this device: not using them")
        except Exception as error:  # without a compiler, for an older device or driver, it fails in many ways
            log.info("no Triton for the norms of the VAE: %s", reason(error))
    if _agrees(TorchNorms(layout), device, dtype, layout):
        return TorchNorms(layout)
    log.warning("the norms of the VAE in 16 bits differ from those in fp32 on this device: running them in fp32")
    return WideNorms()


def _agrees(norms: Norms, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> bool:
    """Whether ``norms`` gives what fp32 gives, for a map of two parts of which one is a cut-out."""
    norm = nn.GroupNorm(4, 32, eps=1e-6)
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(32, generator=draw, dtype=torch.float32).to(device, dtype) for _ in range(2))
    levels = torch.arange(32, dtype=torch.float32)[:, None, None]
    maps = torch.randn(3, 32, 40, 24, generator=draw, dtype=torch.float32).add_(levels).to(device, dtype)
    first, second, x = (part.contiguous(memory_format=layout) for part in maps.split(1))
    found = []
    for kind in (norms, WideNorms()):
        added, parts = kind.add(first.clone(), x, norm.eps)
        _, others = kind.add(second.clone()[:, :, 1:, 2:], None, norm.eps)
        scale, shift = kind.scale_shift(parts + others, norm, weight, bias)
        lone, _ = kind.scale_shift(parts, norm, weight, bias)
        normal = kind.apply(added[:, :, :-1, 3:], scale, shift, True)
        found.append((scale, shift, lone, normal.float(), kind.double(second.clone()[:, :, 2:], x[:, :, :-2]).float()))
    step = torch.finfo(dtype).eps
    near = zip(found[0], found[1], (1e-4, 1e-4, 1e-4, 2 * step, 2 * step), strict=True)
    return all(bool(((ours - theirs).abs() <= most * (1 + theirs.abs())).all()) for ours, theirs, most in near)
