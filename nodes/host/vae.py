"""Encoding and decoding of any size through the modules of the host's own VAE object: exact tiles, image by image."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor

from ...tsdsr_core.system.precision import half_dtype, run_half
from ...tsdsr_core.vae import execute
from ...tsdsr_core.vae.passes import Kernels
from ...tsdsr_core.vae.plan import HEADROOM, PLACES, plan_tiles
from ...tsdsr_core.vae.program import Program, decoder_program, encoder_program, plain
from ..checks import check_latents
from ..types import Vae
from . import running

UNITS = 16
"""What one image counts for in progress on its way through the encoder or the decoder."""
_SHARE = 0.9
"""Of the memory of a device; the rest is for what other programs take."""
_PROGRAMS = {"encoder": encoder_program, "decoder": decoder_program}
_overflowed: MutableMapping[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""Halves of each VAE that 16 bits were too few for: they stay in fp32."""


def factor_of(vae: Vae) -> int:
    """Pixels per latent cell."""
    return int(vae.spacial_compression_encode())


def encode(vae: Vae, pixels: Tensor, progress: running.NodeProgress, tile: int | None = None) -> Tensor:
    """Pixels ``(B, 3, H, W)`` in -1..1, sides multiples of the factor, to unscaled latents there ``(B, C, h, w)`` in fp32.

    Args:
        tile: maximum side of a tile in pixels; None for what suits the memory.

    Raises:
        FloatingPointError: where the VAE overflows in fp32 too.
    """
    return _run_half(vae, "encoder", pixels, progress, tile).chunk(2, 1)[0].float()


def decode(vae: Vae, latents: Tensor, progress: running.NodeProgress, tile: int | None = None) -> Tensor:
    """Unscaled latents ``(B, C, h, w)`` to pixels ``(B, 3, H, W)`` in -1..1, fp32, on their device.

    Raises:
        ValueError: as ``check_latents``.
        FloatingPointError: where the VAE overflows in fp32 too.
    """
    check_latents(latents, vae.latent_channels, "connect the VAE that it was encoded with")
    return _run_half(vae, "decoder", latents, progress, tile).float()


def _run_half(vae: Vae, half: str, x: Tensor, progress: running.NodeProgress, tile: int | None) -> Tensor:
    """Run a half of the VAE; in fp32 where 16 bits overflow, with its weights cast as they are used."""
    overflowed = _overflowed.setdefault(vae.first_stage_model, set())
    counted = 0

    def run(dtype: torch.dtype) -> Tensor:
        nonlocal counted
        tick = _ticker(progress, len(x), counted)
        counted = UNITS * len(x)
        return _run(vae, _PROGRAMS[half], x.to(dtype), tick, tile)

    return run_half(half, vae.vae_dtype, overflowed, run)


def check_unchanged(vae: Vae) -> None:
    """Raise ``ValueError`` where another node replaced methods of ``vae`` or parts of its model, which run nowhere here.

    The host puts such parts into the model when it loads the copy of the VAE that asks for them, and leaves them there until it
    loads another: they are taken out first, so that the VAE that shares the model with the copy is itself.
    """
    model, patcher = vae.first_stage_model, vae.patcher
    for each in (patcher, *(loaded.model for loaded in comfy.model_management.current_loaded_models)):
        if each is not None and each.model is model and each.object_patches_backup:
            each.unpatch_model(unpatch_weights=False)
    replaced = [name for name in ("encode", "decode") if name in vars(vae)]
    replaced += [name for name, part in patcher.object_patches.items() if not _is_part(model, name, part)]
    if replaced:
        raise ValueError(changed_by_others(f"its {replaced[0]} was replaced"))


def changed_by_others(what: str) -> str:
    """The message for a VAE that another node changed."""
    return (
        f"another node changed the VAE, which TSD-SR runs part by part ({what}): leave that node out, such as one for seamless "
        "tiling or for faster kernels"
    )


def _is_part(model: torch.nn.Module, name: str, part: Any) -> bool:
    """Whether ``part`` is what ``model`` has under ``name``, compiled or not."""
    try:
        return plain(part) is plain(comfy.utils.get_attr(model, name))
    except AttributeError:
        return False


def check_memory(vae: Vae, height: int, width: int, tile: int | None = None, decodes: bool = True) -> None:
    """Raise ``MemoryError``, before any work, where pixels of a size cannot be encoded or decoded in the host memory there is.

    Args:
        tile: as for ``encode`` and ``decode``.
        decodes: whether the decoder will be used too.
    """
    device, overflowed = vae.patcher.load_device, _overflowed.get(vae.first_stage_model, set())
    encoder, decoder = (half_dtype(half, vae.vae_dtype, overflowed).itemsize for half in _PROGRAMS)
    execute.check_memory(
        _PROGRAMS, vae.first_stage_model, height, width, factor_of(vae), (encoder, decoder), device, _obtainable(vae), tile,
        running.free_ram, _kernels(device), patched=bool(vae.patcher.patches), decodes=decodes,
    )  # fmt: skip


def _run(vae: Vae, half: Callable[..., Program], x: Tensor, tick: Callable[[int, int], None], tile: int | None) -> Tensor:
    program = half(vae.first_stage_model, patched=bool(vae.patcher.patches))  # patches come in with the loading, below
    device = vae.patcher.load_device
    kernels = _kernels(device)
    shape = [op.spec for op in program], x.shape[2], x.shape[3], x.dtype.itemsize
    wanted = plan_tiles(*shape, _free(vae), tile, kernels=kernels)
    if wanted.maps == "host":  # other models make room before the maps leave the device
        wanted = plan_tiles(*shape, _obtainable(vae), tile, kernels=kernels)
    last = plan_tiles(*shape, None, tile, PLACES[-1:], kernels)  # for where the device's memory runs out all the same
    in_ram = max(execute.ram_bytes(plan, device) for plan in (wanted, last))
    casting = _casting(vae.first_stage_model, x.dtype != vae.vae_dtype)
    with uncompiled(vae.first_stage_model), _current(device), casting:
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=wanted.device_bytes / HEADROOM)
        return execute.plan_and_run(
            program, x, device, lambda: running.free_memory(vae.patcher), tile, lambda: running.free_ram(in_ram), _weights_of,
            tick, running.release_memory, running.ran_out, kernels,
        )  # fmt: skip


def _kernels(device: torch.device) -> Kernels:
    """What is known of a device's kernels; of an accelerator's attention, what the host has chosen."""
    known = execute.kernels_of(device)
    if device.type == "cpu":
        return known
    if not comfy.model_management.pytorch_attention_enabled_vae():
        return replace(known, attention="streamed")
    return replace(known, attention="fused" if known.attention == "fused" else "scored")


def _free(vae: Vae) -> int | None:
    """Memory of the VAE's device that is free now, but for its weights."""
    free = running.free_memory(vae.patcher)
    return None if free is None else max(0, free - vae.model_size())


def _obtainable(vae: Vae) -> int | None:
    """Memory of the VAE's device but for its weights: the host unloads other models for what it is asked for."""
    if running.free_memory(vae.patcher) is None:
        return None
    total = comfy.model_management.get_total_memory(vae.patcher.load_device)
    return int(_SHARE * total) - vae.model_size()


def _weights_of(layer: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer on the device and in the type of ``like``, wherever the host keeps them."""
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    found = weight.clone(), None if bias is None else bias.clone()
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return found


@contextlib.contextmanager
def _casting(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Let the host's layers cast their weights to the type of what they are given, where that is another than theirs."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "comfy_cast_weights")] if wanted else []
    before = [layer.comfy_cast_weights for layer in layers]
    for layer in layers:
        layer.comfy_cast_weights = True
    try:
        yield
    finally:
        for layer, cast in zip(layers, before, strict=True):
            layer.comfy_cast_weights = cast


def _ticker(progress: running.NodeProgress, images: int, counted: int) -> Callable[[int, int], None]:
    """Counts a run's tiles as ``UNITS`` for each image, but for those ``counted`` before; Cancel ends the run."""

    def tick(done: int, total: int) -> None:
        nonlocal counted
        running.check_interrupted()
        reached = done * UNITS * images // total
        if reached > counted:
            progress.update(reached - counted)
            counted = reached

    return tick


def _current(device: torch.device) -> Any:
    """Makes ``device`` the current one, where the host knows several."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return contextlib.nullcontext() if context is None else context(device)


@contextlib.contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Within it, the parts of ``model`` are what they were: compiling changes the names by which the host finds weights."""
    found = [
        (owner, name, child) for owner in model.modules() for name, child in owner.named_children() if plain(child) is not child
    ]
    for owner, name, child in found:
        setattr(owner, name, plain(child))
    try:
        yield
    finally:
        for owner, name, child in found:
            setattr(owner, name, child)
