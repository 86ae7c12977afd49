"""The one step as a ComfyUI sampler, run by the host's own guider.

Sampling through ``CFGGuider`` keeps hooks, wrappers, previews, interruption and memory management.  The host shifts
latents on their way in and out, ``(z - shift) * scale``; TSD-SR uses the scale alone, so the sampler undoes the shift.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...tsdsr_core.checks import check_number
from ...tsdsr_core.families.sd3 import PROMPT_TOKENS
from ...tsdsr_core.flow import TIMESTEP, one_step
from ...tsdsr_core.pipeline import Options, pad_to
from ...tsdsr_core.tiles.blend import velocity_in_memory
from ...tsdsr_core.tiles.memory import CPU_BATCH, TileMemory
from ...tsdsr_core.tiles.plan import TilePlan, Tiling
from ..checks import check_latents, check_mask, check_prompt
from ..types import Conditioning, HostModel, Patcher
from . import layers, padded_latents, previews, running
from .models import check_sd3

log = logging.getLogger("tsdsr")


@dataclass
class TilesUsed:
    """What the tiles of a run came to, also where memory ran out on the way."""

    height: int = 0
    """Latent cells, as ``width``."""
    width: int = 0
    batch: int = 0
    """The most tiles of this size that ran at once."""
    count: int = 0
    """Tiles of all images, over all runs."""

    def note(self, tiles: Tensor) -> None:
        """Count a batch ``(N, C, h, w)`` that fitted into memory."""
        if tiles.shape[2:] != (self.height, self.width):
            self.height, self.width, self.batch = tiles.shape[2], tiles.shape[3], 0
        self.batch = max(self.batch, len(tiles))


class OneStepSampler(comfy.samplers.Sampler):
    """``z_H = z_L - strength v(z_L, t = 1000)``, tile by tile."""

    def __init__(self, options: Options, used: TilesUsed | None = None, mask_fits: bool = False) -> None:
        """Take strength and tiles of ``options``; ``used`` is filled with what the tiles came to.

        Args:
            mask_fits: whether the noise mask lies on the images of padded latents, rather than being stretched over them.
        """
        self.options = options
        self.used = used or TilesUsed()
        self.mask_fits = mask_fits

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
        latent_image: Tensor | None = None, denoise_mask: Tensor | None = None, disable_pbar: bool = False,
    ) -> Tensor:  # fmt: skip
        """Called by the host within its sampling context; latents come and go in the host's shifted form."""
        assert latent_image is not None  # the host's guiders always give one
        patcher, base = model_wrap.model_patcher, model_wrap.inner_model
        check_sigmas(sigmas)
        check_model(patcher)
        _check_latents(latent_image, patcher)
        for prompts in model_wrap.conds.values():
            check_prompts(prompts, patcher)
        offset = _shift(base)
        z = latent_image if not latent_image.any() else latent_image + offset  # the host leaves all-zero latents unshifted

        show = None if callback is None else previews.guarded(callback)
        padded = pad_to(z, _padded(z, base))

        velocity = _velocity(model_wrap, extra_args, self.used)
        before = self.used.count

        def tick(done: int, total: int, partial: Any) -> None:
            self.used.count = before + total
            if show is not None:
                show(done - 1, one_step(z, _crop(partial(), z), self.options.strength) - offset, z, total)
            running.check_interrupted()

        memory = _memory(patcher, z.shape[1])
        v = _crop(velocity_in_memory(velocity, padded, host_tiling(base, self.options, memory), memory, tick), z)
        padded_latents.follow(z, v)
        if denoise_mask is not None:
            mask = check_mask(denoise_mask)
            v = v * (mask if self.mask_fits else padded_latents.fitted_mask(mask, z, stretched=True))
        return one_step(z, v, self.options.strength) - offset


def _velocity(model_wrap: Any, extra_args: dict[str, Any], used: TilesUsed) -> Callable[[Tensor], Tensor]:
    """The velocity of a batch of tiles ``(N, C, h, w)``.

    Nodes that change the MODEL may look at a whole latent and fail on several: from then on the tiles go one at a time.
    """
    alone = False

    def step(tiles: Tensor) -> Tensor:
        v = tiles - model_wrap(tiles, tiles.new_ones(len(tiles)), **extra_args)
        used.note(tiles)
        return v

    def velocity(tiles: Tensor) -> Tensor:
        nonlocal alone
        running.check_interrupted()
        if not alone or len(tiles) == 1:
            try:
                return step(tiles)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                if len(tiles) == 1 or running.ran_out(error):
                    raise
                log.info("TSD-SR: %d tiles at once failed (%s), going on with one at a time", len(tiles), error)
        v = torch.cat([step(tile) for tile in tiles.split(1)])
        alone = True
        return v

    return velocity


def run_one_step(
    model: HostModel,
    conditioning: Conditioning,
    latents: Tensor,
    options: Options,
    mask: Tensor | None = None,
    progress: running.NodeProgress | None = None,
    used: TilesUsed | None = None,
) -> Tensor:
    """Run the step on unscaled latents ``(B, 16, h, w)``; returns the same shape in fp32 on the host's device for results.

    Args:
        mask: where the step acts, 0..1, in any size, over the images of the latents; None for everywhere.
        used: filled with what the tiles came to.

    Raises:
        ValueError: for a model, conditioning or latent that does not suit, saying what to connect.
    """
    check_model(model)
    check_conditioning(conditioning, model)
    _check_latents(latents, model)
    latents = latents.float()
    if mask is not None:
        mask = padded_latents.fitted_mask(check_mask(mask).reshape(-1, 1, *mask.shape[-2:]), latents)
    plan = plan_transformer_tiles(latents, model, options)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    guider.model_options = comfy.model_patcher.create_model_options_clone(model.model_options)
    _ask_for_one_batch(guider.model_options, plan, len(latents), options.tile_batch)
    output = guider.sample(
        torch.zeros_like(latents),
        latents,
        OneStepSampler(options, used, mask_fits=True),
        torch.tensor([1.0, 0.0], dtype=torch.float32),
        denoise_mask=mask,
        callback=_callback(model, progress),
        disable_pbar=True,
        seed=0,
    )
    return output.to(comfy.model_management.intermediate_device())


def plan_transformer_tiles(latents: Tensor, model: Any, options: Options) -> TilePlan:
    """Tiles over ``latents`` where memory is not short: what the host is asked to make room for."""
    return host_tiling(model.model, options, TileMemory()).plan(*_padded(latents, model.model))


def host_tiling(base: Any, options: Options, memory: TileMemory) -> Tiling:
    """The tiling of ``options`` for the host model ``base``, within what its position table covers."""
    patch = base.diffusion_model.patch_size
    return options.tiling(patch, (base.diffusion_model.pos_embed_max_size or 0) * patch or None, PROMPT_TOKENS, memory)


def check_model(model: HostModel) -> None:
    """Raise ``ValueError`` unless ``model`` is an SD3 model with its own timesteps."""
    check_sd3(model)
    timestep = float(model.get_model_object("model_sampling").timestep(torch.tensor(1.0, dtype=torch.float32)))
    if abs(timestep - TIMESTEP) > 1e-3:
        raise ValueError(
            f"another node changed the sampling of the MODEL (sigma 1 is timestep {timestep:g}, not 1000): remove that node"
        )
    cache = model.model_options.get("transformer_options", {}).get("easycache")
    if getattr(cache, "name", "") == "LazyCache":  # it takes the tiles for steps, and uses the result of one for others
        raise ValueError("LazyCache re-uses results of earlier steps, but TSD-SR has one step only: remove that node")


def check_conditioning(conditioning: Conditioning, model: HostModel) -> None:
    """Raise ``ValueError`` unless ``conditioning`` is a prompt for ``model``."""
    if not conditioning:
        raise ValueError("the conditioning is empty: connect TSD-SR Load Prompt, or CLIP Text Encode with SD3's text encoders")
    check_prompts([{**extra, "cross_attn": tokens} for tokens, extra in conditioning], model)


def check_prompts(prompts: list[dict[str, Any]], model: HostModel) -> None:
    """Raise ``ValueError`` unless each of ``prompts``, as the host's sampling has them, suits ``model``."""
    own = model.get_attachment(layers.POOLED)
    for prompt in prompts:
        tokens, pooled = prompt.get("cross_attn"), prompt.get("pooled_output")
        if tokens is None or pooled is None:
            raise ValueError(
                "the conditioning has no pooled output, which SD3 needs: connect TSD-SR Load Prompt, or CLIP Text Encode "
                "with SD3's text encoders (clip_l and clip_g)"
            )
        for key in ("area", "mask", "control", "gligen"):
            if prompt.get(key) is not None:
                raise ValueError(
                    f"the conditioning has {key!r}, which is not supported with tiled inference: remove the node that adds it"
                )
        check_prompt("the conditioning", tokens, pooled)
        expected = model.model.diffusion_model.context_embedder.in_features, _pooled_width(model)
        if (tokens.shape[-1], pooled.shape[-1]) != expected:
            raise ValueError(
                f"the conditioning has widths {tokens.shape[-1]} and {pooled.shape[-1]}, but the MODEL expects "
                f"{expected[0]} and {expected[1]}: connect the conditioning that belongs to this MODEL"
            )
        if own is not None and not torch.equal(pooled.cpu().float(), own):
            raise ValueError(
                "this checkpoint is folded and works only with the prompt it was made with: connect the CONDITIONING "
                "output of its loader"
            )
        if (count := max(len(tokens), len(pooled))) > 1:
            raise ValueError(
                f"the conditioning is a batch of {count} prompts: expected one prompt, which is used for all tiles"
            )
        for name in ("start_percent", "end_percent"):
            if name in prompt:
                check_number(f"{name} of the conditioning", prompt[name], 0, 1)
        check_number("the strength of the conditioning", prompt.get("strength", 1.0), 0)
    used = [prompt for prompt in prompts if prompt.get("start_percent", 0) <= 0 < prompt.get("end_percent", 1)]
    if prompts and not used:
        raise ValueError(
            "the timestep range of the conditioning leaves out the start, which is the only step of TSD-SR: remove the range"
        )
    if prompts and not any(prompt.get("strength", 1.0) > 0 for prompt in used):  # the host would divide by nothing: flat grey
        raise ValueError(
            "the strength of the conditioning is 0, so that nothing says what to do: remove ConditioningSetAreaStrength, or "
            "set it to 1; to do less, lower the strength of the TSD-SR node"
        )


def _check_latents(latents: Tensor, model: HostModel) -> None:
    check_latents(latents, model.model.latent_format.latent_channels, "use TSD-SR Encode")


def check_sigmas(sigmas: Tensor) -> None:
    """Raise ``ValueError`` unless ``sigmas`` are one step from 1 to 0."""
    values = [round(float(sigma), 4) for sigma in sigmas]
    if len(values) != 2 or not (abs(values[0] - 1) <= 1e-3 and abs(values[1]) <= 1e-3):  # so that NaN is refused too
        raise ValueError(
            f"sigmas {values[:5]}: expected one step from 1 to 0; set BasicScheduler to the scheduler simple, 1 step and "
            "denoise 1 (ddim_uniform and kl_optimal give other sigmas with one step)"
        )


def _memory(patcher: Patcher, channels: int) -> TileMemory:
    """Sizes tiles by the host's own estimate of what its model takes."""
    return TileMemory(
        tile_bytes=lambda height, width: int(patcher.model.memory_required([1, channels, height, width])),
        free=lambda: running.free_memory(patcher),
        release=running.release_memory,
        ran_out=running.ran_out,
    )


def _ask_for_one_batch(model_options: dict[str, Any], plan: TilePlan, images: int, batch: int | None) -> None:
    """Let the host make room for one batch of tiles, not for the whole latent."""
    tiles = min(batch or CPU_BATCH, len(plan) * images)

    def prepare(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(model, [tiles, noise_shape[1], plan.tile_height, plan.tile_width], *args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    comfy.patcher_extension.add_wrapper_with_key(kind, "tsdsr", prepare, model_options, is_model_options=True)


def _callback(model: HostModel, progress: running.NodeProgress | None) -> Any:
    """The host's preview callback, counting into ``progress`` where the node has more stages than this."""
    if progress is None:
        return latent_preview.prepare_callback(model, 1)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    before = 0

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        nonlocal before
        count, before = step + 1 - before, step + 1
        progress.update(count)  # also where the preview fails
        if previewer:
            progress.update(0, previewer.decode_latent_to_preview_image("JPEG", previews.small(x0)))

    return callback


def _pooled_width(model: HostModel) -> int:
    """Width of the pooled prompt that ``model`` takes."""
    own = model.get_attachment(layers.POOLED)
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
