"""A loaded restorer: the networks of a family on one device, as the callables of ``pipeline.Model``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..flow import TIMESTEP
from ..pipeline import Model, Options, Progress, restore
from ..system.atomic import reason
from ..system.device import free_memory, free_ram, release_memory
from ..system.memory import ImageDevice, is_out_of_memory
from ..system.precision import fits, half_dtype, run_half
from ..tiles.memory import TileMemory
from ..vae.attention import in_windows
from ..vae.execute import check_memory, plan_and_run
from ..weights.prompt import PromptEmbeds
from . import family_of
from .record import Family, Geometry

log = logging.getLogger("tsdsr")

_POINTWISE = {"encoder": "quant_conv", "decoder": "post_quant_conv"}
"""The additional convolution of each half of an autoencoder, where it has one."""


@dataclass(repr=False)
class Restorer:
    """A loaded restorer: transformer, autoencoder and prompt on one device.

    >>> from tsdsr_core import load
    >>> load("builtin", dtype="fp32").restore(torch.rand(1, 3, 24, 32), scale=2.5).shape
    torch.Size([1, 3, 60, 80])
    """

    transformer: Any
    """Of the family's class, untyped because diffusers' annotations are too narrow."""
    vae: Any
    prompt: PromptEmbeds
    device: torch.device
    dtype: torch.dtype
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Recommended options for this model: ``process_size``, ``wavelet_levels``."""
    notes: Mapping[str, str] = field(default_factory=dict)
    preview: Sequence[Sequence[float]] = ()
    """As in the bundle that the model comes from."""

    vae_tile: int | None = None
    """Maximum side of the VAE's tiles in pixels; None for automatic."""
    vae_attention_window: int | None = None
    """Cells beyond a tile that the VAE's attention sees, an estimate; None for all, which is exact."""
    memory_limit: int | None = None
    """Maximum bytes on an accelerator for weights, activations and tiles together; None for all of its memory."""
    compiled: Any = None
    """The transformer after ``compile``; None before."""
    family: Family = field(init=False)
    _overflowed: set[str] = field(default_factory=set, init=False)
    """Halves of the VAE that overflowed in 16 bits and run in fp32."""

    def __post_init__(self) -> None:
        self.family = family_of({"transformer": self.transformer.config, "vae": self.vae.config})
        self._check_prompt()
        _move(self.transformer.requires_grad_(False).eval(), self.device, self.dtype)
        self.vae.requires_grad_(False).eval()
        for half in self.family.programs:
            if not fits(f"VAE {half}", getattr(self.vae, half).parameters(), self.vae_dtype):
                self._overflowed.add(half)
            self._place_half(half)
        self.prompt = self.prompt.to(self.device, self.dtype)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Type of the VAE: ``dtype``, or fp32 instead of bf16, which has too few digits for the encoder LoRA's small change."""
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def compile(self) -> None:
        """Run the transformer with ``torch.compile``; if compiling fails, a warning is logged and it runs uncompiled."""
        self.compiled = torch.compile(self.transformer)

    def free_memory(self) -> int | None:
        """Bytes available for activations on the model's device now; None on the CPU."""
        return free_memory(self.device, self.memory_limit)

    @property
    def geometry(self) -> Geometry:
        """The sizes that the pipeline follows."""
        return self.family.geometry({"transformer": self.transformer.config, "vae": self.vae.config})

    def options(self, **chosen: Any) -> Options:
        """``Options`` with what is ``chosen``; the model's defaults for the rest.

        Raises:
            InputError: for an unknown option or an impossible value.
        """
        known = [field.name for field in fields(Options)]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}: expected one of {', '.join(known)}")
        return Options(**{**self.defaults, **chosen})

    def restore(
        self, image: Tensor, *, posterior: str = "mode", seed: int = 0, progress: Progress | None = None, **chosen: Any
    ) -> Tensor:
        """Restore and enlarge images with the options of ``Options``, such as ``scale`` and ``strength``.

        Args:
            image: ``(B, 3, H, W)`` in 0..1.
            posterior, seed: as for ``model``.
            progress: told of each finished image and tile batch, as for ``pipeline.restore``.
            chosen: fields of ``Options``; those that are left out are the model's defaults, or else the published ones.

        Returns:
            ``(B, 3, scale H, scale W)`` in 0..1.

        Raises:
            InputError, MemoryError, FloatingPointError: as ``pipeline.restore``.
        """
        options = self.options(**chosen)
        told = {} if progress is None else {"progress": progress}
        with torch.inference_mode():
            return restore(image, self.model(posterior, seed), options, **told)

    def model(self, posterior: str = "mode", seed: int = 0) -> Model:
        """The callables for ``pipeline.restore``.

        Args:
            posterior: "mode" to encode deterministically, or "sample" to draw from the VAE's posterior with ``seed``.

        Raises:
            InputError: for another posterior, or "sample" where the encoder has none.
        """
        if posterior not in ("mode", "sample"):
            raise InputError(f"unknown posterior {posterior!r}: expected mode or sample")
        if posterior == "sample" and not self.family.posterior:
            raise InputError(f"posterior 'sample': the encoder of {self.family.title} gives one latent alone, use mode")
        generator = torch.Generator().manual_seed(seed) if posterior == "sample" else None
        geometry = self.geometry
        return Model(
            encode=lambda pixels: self.encode(pixels, generator),
            velocity=self.velocity,
            decode=self.decode,
            scaling_factor=geometry.scaling_factor,
            vae_factor=geometry.vae_factor,
            patch=geometry.patch,
            longest_side=geometry.longest_side,
            context_tokens=geometry.context_tokens,
            memory=TileMemory(self._tile_bytes, self.free_memory, lambda: release_memory(self.device)),
            check_memory=self._check_memory,
            image_device=ImageDevice(self.device, self.free_memory, lambda: release_memory(self.device)),
        )

    def _check_memory(self, height: int, width: int) -> None:
        check_memory(
            self.family.programs, self.vae, height, width, self.geometry.vae_factor,
            (self._half_dtype("encoder").itemsize, self._half_dtype("decoder").itemsize),
            self.device, self.free_memory(), self.vae_tile, lambda wanted: free_ram(),
        )  # fmt: skip

    def _tile_bytes(self, tile_height: int, tile_width: int) -> int:
        context = self.prompt.tokens.shape[1]
        return self.family.tile_bytes(self.transformer.config, tile_height, tile_width, context, self.dtype.itemsize)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """``E(x)``: encode pixels ``(B, 3, H, W)`` in -1..1 to unscaled latents, the mode or, with a generator, a sample."""
        encoded = self._run_half("encoder", pixels)
        mean, log_variance = encoded.chunk(2, 1) if self.family.posterior else (encoded, encoded)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise

    @torch.inference_mode()
    def velocity(self, z: Tensor) -> Tensor:
        """``v(z, t = 1000)`` with the fixed prompt, for scaled latents on any device; same shape, type and device as ``z``."""
        given = z.to(self.device, self.dtype)
        timestep = torch.full((len(z),), TIMESTEP, device=self.device, dtype=self.dtype)
        return self.family.velocity(self._run_transformer, given, timestep, self.prompt.condition(len(z))).to(z)

    def _run_transformer(self, *args: Any, **given: Any) -> Any:
        if self.compiled is None:
            return self.transformer(*args, **given)
        try:
            return self.compiled(*args, **given)
        except Exception as error:  # compilers fail in many ways; an error of the transformer itself is raised below again
            if is_out_of_memory(error):
                raise
            log.warning("torch.compile failed, continuing without it: %s", reason(error))
            self.compiled = None
        return self.transformer(*args, **given)

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """``D(z)``: decode unscaled latents to pixels ``(B, 3, H, W)`` in about -1..1."""
        return self._run_half("decoder", z)

    def _run_half(self, half: Literal["encoder", "decoder"], x: Tensor) -> Tensor:
        """Run a half of the VAE, in fp32 if fp16 overflows."""

        def run(dtype: torch.dtype) -> Tensor:
            self._place_half(half)  # changes something only after an overflow
            program = in_windows(self.family.programs[half](self.vae), self.vae_attention_window)
            return plan_and_run(
                program, x.to(dtype), self.device, self.free_memory, self.vae_tile, free_ram,
                release=lambda: release_memory(self.device),
            )  # fmt: skip

        return run_half(half, self.vae_dtype, self._overflowed, run).to(x.dtype)

    def _place_half(self, half: str) -> None:
        """Move a half of the VAE to the device, in the type it runs in."""
        for part in filter(None, (getattr(self.vae, half), getattr(self.vae, _POINTWISE[half], None))):
            _move(part, self.device, self._half_dtype(half))

    def _half_dtype(self, half: str) -> torch.dtype:
        return half_dtype(half, self.vae_dtype, self._overflowed)

    def _check_prompt(self) -> None:
        found = self.prompt.tokens.shape[2], self.prompt.pooled.shape[1]
        expected = self.family.prompt_widths(self.transformer.config)
        if found != expected:
            raise InputError(
                f"prompt embeddings of widths {found} do not fit this transformer, which takes {expected}: "
                "use the embeddings made for this model"
            )


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    nn.Module.to(model, device, dtype)  # diffusers' own .to() warns about every cast
