"""Restorers with diffusers' models, loaded from an SD3 folder or a bundle, as the callables of ``pipeline.Model``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import some
from ..errors import InputError
from ..flow import TIMESTEP
from ..pipeline import Model
from ..system.atomic import reason
from ..system.device import free_memory, free_ram, release_memory
from ..system.memory import ImageDevice, is_out_of_memory
from ..system.precision import fits, half_dtype, run_half
from ..tiles.memory import TileMemory, tile_bytes
from ..vae.execute import check_memory, plan_and_run
from ..vae.program import decoder_program, encoder_program, in_windows
from ..weights import float8, int8
from ..weights.bundle import BUILTIN, Bundle, read_bundle, vae_weights
from ..weights.bundle_header import WRONG_KIND
from ..weights.lora import Lora, check_fit, merge_lora, weight_shapes
from ..weights.prompt import PromptEmbeds
from ..weights.reading import is_finite
from .fold import FoldedEmbedding, fold_structure
from .folder import CLASSES, load_part

log = logging.getLogger("tsdsr")

_HALVES = {"encoder": (encoder_program, "quant_conv"), "decoder": (decoder_program, "post_quant_conv")}
"""For each half of an autoencoder: its tiled program, and the name of its additional convolution."""


@dataclass(repr=False)
class DiffusersModel:
    """A loaded restorer: transformer, autoencoder and prompt on one device."""

    transformer: Any
    """``SD3Transformer2DModel``, untyped because diffusers' annotations are too narrow."""
    vae: Any
    """``AutoencoderKL``."""
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
    _overflowed: set[str] = field(default_factory=set, init=False)
    """Halves of the VAE that overflowed in 16 bits and run in fp32."""

    def __post_init__(self) -> None:
        self._check_prompt()
        _move(self.transformer.requires_grad_(False).eval(), self.device, self.dtype)
        self.vae.requires_grad_(False).eval()
        for half in _HALVES:
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

    def restorer(self, posterior: str = "mode", seed: int = 0) -> Model:
        """The callables for ``restore``.

        Args:
            posterior: "mode" to encode deterministically, or "sample" to draw from the VAE's posterior with ``seed``.

        Raises:
            InputError: for another posterior.
        """
        if posterior not in ("mode", "sample"):
            raise InputError(f"unknown posterior {posterior!r}: expected mode or sample")
        generator = torch.Generator().manual_seed(seed) if posterior == "sample" else None
        config = self.transformer.config
        patch, factor = config["patch_size"], 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return Model(
            encode=lambda pixels: self.encode(pixels, generator),
            velocity=self.velocity,
            decode=self.decode,
            scaling_factor=self.vae.config["scaling_factor"],
            vae_factor=factor,
            patch=patch,
            longest_side=(config["pos_embed_max_size"] or config["sample_size"] // patch) * patch,
            memory=TileMemory(self._tile_bytes, self.free_memory, lambda: release_memory(self.device)),
            check_memory=lambda height, width: check_memory(
                self.vae, height, width, factor, (self._half_dtype("encoder").itemsize, self._half_dtype("decoder").itemsize),
                self.device, self.free_memory(), self.vae_tile, lambda wanted: free_ram(),
            ),
            image_device=ImageDevice(self.device, self.free_memory, lambda: release_memory(self.device)),
        )  # fmt: skip

    def _tile_bytes(self, tile_height: int, tile_width: int) -> int:
        patch, context = self.transformer.config["patch_size"], self.prompt.tokens.shape[1]
        width, itemsize = self.transformer.inner_dim, self.dtype.itemsize
        return tile_bytes(tile_height, tile_width, patch, context, width, itemsize)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """``E(x)``: encode pixels ``(B, 3, H, W)`` in -1..1 to unscaled latents, the mode or, with a generator, a sample."""
        mean, log_variance = self._run_half("encoder", pixels).chunk(2, 1)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise

    @torch.inference_mode()
    def velocity(self, z: Tensor) -> Tensor:
        """``v(z, t = 1000)`` with the fixed prompt, for scaled latents on any device; same shape, type and device as ``z``."""
        count = len(z)
        given = {
            "hidden_states": z.to(self.device, self.dtype),
            "timestep": torch.full((count,), TIMESTEP, device=self.device, dtype=self.dtype),
            "encoder_hidden_states": self.prompt.tokens.expand(count, -1, -1),
            "pooled_projections": self.prompt.pooled.expand(count, -1),
            "return_dict": False,
        }
        return self._run_transformer(given)[0].to(z)

    def _run_transformer(self, given: dict[str, Any]) -> Any:
        if self.compiled is None:
            return self.transformer(**given)
        try:
            return self.compiled(**given)
        except Exception as error:  # compilers fail in many ways; an error of the transformer itself is raised below again
            if is_out_of_memory(error):
                raise
            log.warning("torch.compile failed, continuing without it: %s", reason(error))
            self.compiled = None
        return self.transformer(**given)

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """``D(z)``: decode unscaled latents to pixels ``(B, 3, H, W)`` in about -1..1."""
        return self._run_half("decoder", z)

    def _run_half(self, half: Literal["encoder", "decoder"], x: Tensor) -> Tensor:
        """Run a half of the VAE, in fp32 if fp16 overflows."""

        def run(dtype: torch.dtype) -> Tensor:
            self._place_half(half)  # changes something only after an overflow
            program = in_windows(_HALVES[half][0](self.vae), self.vae_attention_window)
            return plan_and_run(
                program, x.to(dtype), self.device, self.free_memory, self.vae_tile, free_ram,
                release=lambda: release_memory(self.device),
            )  # fmt: skip

        return run_half(half, self.vae_dtype, self._overflowed, run).to(x.dtype)

    def _place_half(self, half: str) -> None:
        """Move a half of the VAE to the device, in the type it runs in."""
        for part in filter(None, (getattr(self.vae, half), getattr(self.vae, _HALVES[half][1]))):
            _move(part, self.device, self._half_dtype(half))

    def _half_dtype(self, half: str) -> torch.dtype:
        return half_dtype(half, self.vae_dtype, self._overflowed)

    def _check_prompt(self) -> None:
        config = self.transformer.config
        found = self.prompt.tokens.shape[2], self.prompt.pooled.shape[1]
        expected = config["joint_attention_dim"], config["pooled_projection_dim"]
        if found != expected:
            raise InputError(
                f"prompt embeddings of widths {found} do not fit this transformer, which takes {expected}: "
                "use the embeddings made for this model"
            )


def load_folder(
    path: Path, loras: tuple[Lora, Lora] | None, prompt: PromptEmbeds, device: torch.device, dtype: torch.dtype,
    strength: float = 1.0, vae_strength: float = 1.0,
) -> DiffusersModel:  # fmt: skip
    """Load an SD3 folder (``transformer/`` and ``vae/``, diffusers' layout) and merge the LoRAs.

    Args:
        loras: for the transformer and the VAE, or None to use the base model alone.
        strength, vae_strength: strengths of the two LoRAs; 1 as published.

    Raises:
        InputError: if a part is missing, damaged or of another model family, or a LoRA does not fit.
    """
    transformer = load_part(path, "transformer", dtype)
    vae = load_part(path, "vae", torch.float32)  # merged before it is rounded
    if loras is not None:
        for model, lora in zip((transformer, vae), loras, strict=True):
            check_fit(lora, weight_shapes(model))
        merge_lora(transformer, loras[0], strength)
        merge_lora(vae, loras[1], vae_strength)
    return DiffusersModel(transformer, vae, prompt, device, dtype)


def model_from_bundle(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> DiffusersModel:
    """Build the model of a model bundle; 8-bit and int8 weights are expanded to ``dtype``.

    Raises:
        InputError: for a LoRA bundle, weights that do not match the stored configuration, or exceed the range of ``dtype``.
    """
    if bundle.kind != "merged":
        raise InputError(WRONG_KIND["merged"])
    weights = bundle.transformer_weights(dtype)
    casts = bundle.eight_bit or bundle.int8  # else those that have another type
    beyond = [name for name, stored in weights.items() if (casts or stored.dtype != dtype) and not is_finite(stored.to(dtype))]
    if beyond:
        raise InputError(
            f"{bundle.source} has weights of the transformer that exceed the range of {dtype} in {some(beyond)}: choose bf16 "
            "or fp32, or make the bundle again"
        )
    try:
        transformer = _from_weights("transformer", bundle.configs["transformer"], weights, bundle.folded)
        vae = _from_weights("vae", bundle.configs["vae"], bundle.vae)
        return DiffusersModel(
            transformer, vae, bundle.prompt, device, dtype, bundle.defaults, bundle.notes, bundle.preview
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{bundle.source}: {error}") from error


def load_vae(path: Path) -> Any:
    """Load only the autoencoder of an SD3 folder or a model bundle: ``AutoencoderKL`` in fp32 on the CPU, frozen.

    Raises:
        InputError: if it is missing, damaged or of another model family, or the bundle holds only LoRAs.
    """
    if path.is_dir():
        vae = load_part(path, "vae", torch.float32)
    else:
        bundle = read_bundle(path, "merged")
        try:
            vae = _from_weights("vae", bundle.configs["vae"], bundle.vae)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    _move(vae, torch.device("cpu"), torch.float32)
    return vae.requires_grad_(False).eval()


def load_builtin(device: torch.device, dtype: torch.dtype) -> DiffusersModel:
    """Load the small model that ships with the package.

    >>> from tsdsr_core import Options, restore
    >>> model = load_builtin(torch.device("cpu"), torch.float32)
    >>> options = Options(scale=2.5, **model.defaults)
    >>> restore(torch.rand(1, 3, 24, 32), model.restorer(), options).shape
    torch.Size([1, 3, 60, 80])
    """
    return model_from_bundle(read_bundle(BUILTIN), device, dtype)


def merged_bundle(
    transformer: Any, vae: Any, prompt: PromptEmbeds, dtype: torch.dtype, defaults: Mapping[str, Any], notes: Mapping[str, str],
    quantised: Literal["float8", "int8"] | None = None, preview: Sequence[Sequence[float]] = (),
) -> Bundle:  # fmt: skip
    """Make a self-contained bundle of a diffusers transformer, folded or not, and an autoencoder.

    Args:
        dtype: type of the stored weights; the VAE's are stored as ``vae_weights`` says.
        defaults: recommended options.
        notes: free text to store.
        preview: colours of the latent channels, as in ``Bundle``.
        quantised: what to store the transformer's matrices as, ``float8.quantise`` or ``int8.quantise``, if not in ``dtype``;
            never the VAE's, which would lose the small change made by the encoder LoRA.
    """
    parts = {"transformer": transformer, "vae": vae}
    weights = {name: part.state_dict() for name, part in parts.items()}
    store = {"float8": float8.quantise, "int8": int8.quantise, None: _cast}[quantised]
    configs = {name: {k: v for k, v in part.config.items() if not k.startswith("_")} for name, part in parts.items()}
    prompt = prompt.to("cpu", dtype)
    folded = isinstance(transformer.time_text_embed, FoldedEmbedding)
    return Bundle(
        "merged", prompt, store(weights["transformer"], dtype), vae_weights(weights["vae"], dtype), configs, defaults, notes,
        preview, folded=folded, eight_bit=quantised == "float8", int8=quantised == "int8",
    )  # fmt: skip


def _from_weights(part: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], folded: bool = False) -> Any:
    try:
        with torch.device("meta"):
            model = CLASSES[part].from_config(dict(config))
        if folded:
            fold_structure(model)
        model.load_state_dict(weights, strict=True, assign=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        said = " ".join(str(error).split())  # torch lists the weights on lines of their own
        raise InputError(f"the {part} does not match its configuration: {said}") from error
    return model


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    nn.Module.to(model, device, dtype)  # diffusers' own .to() warns about every cast
