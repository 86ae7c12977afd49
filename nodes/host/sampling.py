"""The one step as a ComfyUI sampler, run by the host's own guider.

Sampling through ``CFGGuider`` keeps hooks, wrappers, previews, interruption and memory management.  The host shifts
latents on their way in and out, ``(z - shift) * scale``; TSD-SR uses the scale alone, so the sampler undoes the shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import latent_preview
import torch
import torch.nn.functional as F
from torch import Tensor

from ...tsdsr_core.flow import TIMESTEP, one_step
from ...tsdsr_core.memory import CPU_BATCH, TileMemory
from ...tsdsr_core.restore import pad_to
from ...tsdsr_core.tile_blend import Cutting, fitting_velocity
from ...tsdsr_core.tile_plan import OVERLAP, STRETCH, TILE, TilePlan, TileSettings, even_tiles
from . import folded, running
from .models import check_sd3

PREVIEW_SIDE = 64
"""Latent cells; previews of unfinished pictures are no larger."""


@dataclass(frozen=True)
class StepSettings:
    """What a user chooses about the step."""

    strength: float = 1.0
    tile: int = 0
    """Latent cells; 0 for about the published side, or less where memory is short."""
    overlap: int = OVERLAP
    batch: int = 0
    """0 for as many tiles at once as fit."""


class OneStepSampler(comfy.samplers.Sampler):
    """``z_H = z_L - strength v(z_L, t = 1000)``, tile by tile."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):  # fmt: skip
        """Called by the host within its sampling context; latents come and go in the host's shifted form."""
        patcher, base = model_wrap.model_patcher, model_wrap.inner_model
        check_sigmas(sigmas)
        check_model(patcher)
        check_latents(latent_image, patcher)
        for prompts in model_wrap.conds.values():
            check_prompts(prompts, patcher)
        offset = _shift(base)
        z = latent_image if not latent_image.any() else latent_image + offset  # the host leaves all-zero latents unshifted

        padded = pad_to(z, _padded(z, base))

        def velocity(tiles: Tensor) -> Tensor:
            running.check_interrupted()
            return tiles - model_wrap(tiles, tiles.new_ones(len(tiles)), **extra_args)

        def tick(done: int, total: int, partial: Any) -> None:
            if callback is not None:
                so_far = one_step(z, _crop(partial(), z), self.settings.strength) - offset
                callback(done - 1, so_far if done == total else _thumbnail(so_far), z, total)
            running.check_interrupted()

        memory = _memory(patcher, z.shape[1])
        cutting = Cutting(tile_settings(base, self.settings, memory), self.settings.batch or None)
        v = _crop(fitting_velocity(velocity, padded, cutting, memory, tick), z)
        if denoise_mask is not None:
            v = v * denoise_mask
        return one_step(z, v, self.settings.strength) - offset


def run_one_step(
    model: Any,
    conditioning: Any,
    latents: Tensor,
    settings: StepSettings,
    mask: Tensor | None = None,
    progress: running.Progress | None = None,
) -> Tensor:
    """Run the step on unscaled latents ``(B, 16, h, w)``; returns the same shape in fp32 on the host's device for results.

    Args:
        mask: where the step acts, 0..1, in any size that the host resizes to the latents'; None for everywhere.

    Raises:
        ValueError: for a model, conditioning or latent that does not suit, saying what to connect.
    """
    check_model(model)
    check_conditioning(conditioning, model)
    check_latents(latents, model)
    plan = plan_tiles(latents, model, settings)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    guider.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
    _ask_for_one_batch(guider.model_options, plan, len(latents), settings.batch)
    output = guider.sample(
        torch.zeros_like(latents),
        latents,
        OneStepSampler(settings),
        torch.tensor([1.0, 0.0]),
        denoise_mask=mask,
        callback=_callback(model, progress),
        disable_pbar=True,
        seed=0,
    )
    return output.to(comfy.model_management.intermediate_device())


def plan_tiles(latents: Tensor, model: Any, settings: StepSettings) -> TilePlan:
    """Tiles over ``latents`` where memory is not short: what the host is asked to make room for."""
    base = model.model
    return even_tiles(*_padded(latents, base), tile_settings(base, settings, TileMemory()))


def tile_settings(base: Any, settings: StepSettings, memory: TileMemory) -> TileSettings:
    """The core's settings for the host model ``base``, within what its position table covers."""
    multiple = base.diffusion_model.patch_size
    limit = (base.diffusion_model.pos_embed_max_size or 0) * multiple or None
    side = min(settings.tile or TILE, limit or settings.tile or TILE) // multiple * multiple
    overlap = min(settings.overlap, side - 1) // multiple * multiple
    if settings.tile:
        return TileSettings(side, overlap, multiple, limit)
    return TileSettings(side, overlap, multiple, limit, STRETCH).with_tile(min(side, memory.side()))


def check_model(model: Any) -> None:
    """Raise ``ValueError`` unless ``model`` is an SD3 model with its own timesteps."""
    check_sd3(model)
    timestep = float(model.get_model_object("model_sampling").timestep(torch.tensor(1.0)))
    if abs(timestep - TIMESTEP) > 1e-3:
        raise ValueError(f"the MODEL's sampling was changed (sigma 1 is timestep {timestep:g}, not 1000): remove that node")


def check_conditioning(conditioning: Any, model: Any) -> None:
    """Raise ``ValueError`` unless ``conditioning`` is a prompt for ``model``."""
    if not conditioning:
        raise ValueError("the conditioning is empty: connect TSD-SR Load Prompt or CLIP Text Encode of SD3")
    check_prompts([{**extra, "cross_attn": tokens} for tokens, extra in conditioning], model)


def check_prompts(prompts: list[dict[str, Any]], model: Any) -> None:
    """Raise ``ValueError`` unless each of ``prompts``, as the host's sampling has them, suits ``model``."""
    own = model.get_attachment(folded.POOLED)
    for prompt in prompts:
        tokens, pooled = prompt.get("cross_attn"), prompt.get("pooled_output")
        if tokens is None or pooled is None:
            raise ValueError(
                "the conditioning has no pooled output, which SD3 needs: connect TSD-SR Load Prompt, or CLIP Text Encode "
                "with SD3's text encoders (clip_l and clip_g)"
            )
        for key in ("area", "mask", "control", "gligen"):
            if prompt.get(key) is not None:
                raise ValueError(f"the conditioning has a {key!r}, which the tiles of TSD-SR cannot follow: remove that node")
        expected = model.model.diffusion_model.context_embedder.in_features, _pooled_width(model)
        if (tokens.shape[-1], pooled.shape[-1]) != expected:
            raise ValueError(
                f"the conditioning is {tokens.shape[-1]} and {pooled.shape[-1]} wide, this MODEL takes {expected[0]} and "
                f"{expected[1]}: connect the conditioning from the loader of this MODEL"
            )
        if own is not None and not torch.equal(pooled.cpu().float(), own):
            raise ValueError(
                "this checkpoint is folded: it takes the one prompt it was made with; connect the conditioning from its loader"
            )
        if len(tokens) > 1:
            raise ValueError(f"the conditioning holds a batch of {len(tokens)} prompts: TSD-SR takes one for all tiles")
    if prompts and all(prompt.get("start_percent", 0) > 0 or prompt.get("end_percent", 1) <= 0 for prompt in prompts):
        raise ValueError("the conditioning does not hold at the start, where TSD-SR's one step is: remove its timestep range")


def check_latents(latents: Tensor, model: Any) -> None:
    """Raise ``ValueError`` unless ``latents`` are the model's: 4-dimensional, finite, not empty, of its channels."""
    wanted = model.model.latent_format.latent_channels
    if latents.ndim != 4 or 0 in latents.shape or latents.shape[1] != wanted:
        raise ValueError(
            f"the latent has the shape {tuple(latents.shape)}: expected (batch, {wanted}, height, width); encode with SD3's VAE"
        )
    if not torch.isfinite(latents).all():
        raise ValueError("the latent has NaN or infinite values: check the picture and the VAE's precision before it")


def check_sigmas(sigmas: Tensor) -> None:
    """Raise ``ValueError`` unless ``sigmas`` are one step from 1 to 0."""
    values = [round(float(sigma), 4) for sigma in sigmas]
    if len(values) != 2 or abs(values[0] - 1) > 1e-3 or abs(values[1]) > 1e-3:
        raise ValueError(f"sigmas {values[:5]}: TSD-SR takes one step from 1 to 0; set the scheduler to 1 step, denoise 1")


def _memory(patcher: Any, channels: int) -> TileMemory:
    """Sizes tiles by the host's own estimate of what its model takes."""
    return TileMemory(
        tile_bytes=lambda height, width: int(patcher.model.memory_required([1, channels, height, width])),
        free=lambda: running.free_memory(patcher),
        release=running.release_memory,
    )


def _ask_for_one_batch(model_options: dict[str, Any], plan: TilePlan, images: int, batch: int) -> None:
    """Let the host make room for one batch of tiles, not for the whole latent."""
    tiles = min(batch or CPU_BATCH, len(plan) * images)

    def prepare(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(model, [tiles, noise_shape[1], plan.tile_height, plan.tile_width], *args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    comfy.patcher_extension.add_wrapper_with_key(kind, "tsdsr", prepare, model_options, is_model_options=True)


def _callback(model: Any, progress: running.Progress | None) -> Any:
    """The host's preview callback, counting into ``progress`` where the node has more stages than this."""
    if progress is None:
        return latent_preview.prepare_callback(model, 1)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    before = 0

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        nonlocal before
        preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
        progress.update(step + 1 - before, preview)
        before = step + 1

    return callback


def _pooled_width(model: Any) -> int:
    """Width of the pooled prompt that ``model`` takes."""
    own = model.get_attachment(folded.POOLED)
    return model.model.diffusion_model.y_embedder.mlp[0].in_features if own is None else own.shape[-1]


def _shift(base: Any) -> float:
    form = base.latent_format
    return form.scale_factor * form.shift_factor


def _padded(latents: Tensor, base: Any) -> tuple[int, int]:
    """Height and width in whole patches; the host itself would pad by wrapping around."""
    patch = base.diffusion_model.patch_size
    return -(-latents.shape[2] // patch) * patch, -(-latents.shape[3] // patch) * patch


def _crop(padded: Tensor, latents: Tensor) -> Tensor:
    return padded[:, :, : latents.shape[2], : latents.shape[3]]


def _thumbnail(latents: Tensor) -> Tensor:
    """Smaller latents, since a previewer may decode them after every batch of tiles."""
    longest = max(latents.shape[2:])
    if longest <= PREVIEW_SIDE:
        return latents
    size = [max(1, side * PREVIEW_SIDE // longest) for side in latents.shape[2:]]
    return F.interpolate(latents, size, mode="area")
