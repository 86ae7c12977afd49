"""An SD3 folder in diffusers' layout, or a bundle, as the callables of ``restore.Model``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import eight_bit
from . import lora as lora_module
from .bundle import BUILTIN, Bundle, read_bundle, vae_weights
from .device import free_memory, free_ram, release_memory
from .flow import TIMESTEP
from .fold import NoEmbedding, empty
from .lora import Lora
from .memory import TileMemory, fits_beside, is_out_of_memory, tile_bytes
from .prompt import PromptEmbeds
from .restore import Model
from .vae_program import decoder_program, encoder_program
from .vae_tiled import plan_and_run

log = logging.getLogger("tsdsr")

_CLASSES = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}
_HALVES = {"encoder": (encoder_program, "quant_conv"), "decoder": (decoder_program, "post_quant_conv")}
"""Of an autoencoder: the program of each, and the part that belongs to it."""


@dataclass(repr=False)
class DiffusersModel:
    """A loaded restorer: transformer, autoencoder and prompt on one device."""

    transformer: Any
    """``SD3Transformer2DModel``; diffusers' annotations are narrower than what its models take."""
    vae: Any
    """``AutoencoderKL``."""
    prompt: PromptEmbeds
    device: torch.device
    dtype: torch.dtype
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options that suit this model: ``process_size``, ``wavelet_levels``."""

    vae_tile: int | None = None
    """Greatest side of the VAE's tiles in pixels; None for what suits the memory."""
    memory_limit: int | None = None
    """Bytes that weights, maps and tiles may take on an accelerator in all; None for what it has."""
    compiled: Any = None
    """What ``compile`` made of the transformer."""
    _overflowed: set[str] = field(default_factory=set, init=False)
    """Halves of the VAE that 16 bits were too few for: they stay in fp32."""

    def __post_init__(self) -> None:
        self._check_prompt()
        _move(self.transformer.requires_grad_(False).eval(), self.device, self.dtype)
        _move(self.vae.requires_grad_(False).eval(), self.device, self.vae_dtype)
        self.prompt = self.prompt.to(self.device, self.dtype)

    @property
    def vae_dtype(self) -> torch.dtype:
        """bf16 keeps too few digits for the encoder LoRA's small change of the weights, so the VAE then runs in fp32."""
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def compile(self) -> None:
        """Run the transformer through ``torch.compile``; where that fails, it runs as it is, after one line in the log."""
        self.compiled = torch.compile(self.transformer)

    def free_memory(self) -> int | None:
        """Bytes that activations may take on the model's device now; None on the CPU."""
        return free_memory(self.device, self.memory_limit)

    def place(self, height: int, width: int) -> torch.device:
        """Where a picture is to lie that becomes one of a size in pixels: not on a device of which it would fill much."""
        return self.device if fits_beside(height, width, self.free_memory()) else torch.device("cpu")

    def restorer(self, posterior: str = "mode", seed: int = 0) -> Model:
        """The callables, with the encoder's posterior taken at its ``"mode"`` or as a seeded ``"sample"``."""
        if posterior not in ("mode", "sample"):
            raise ValueError(f"unknown posterior {posterior!r}: expected mode or sample")
        generator = torch.Generator().manual_seed(seed) if posterior == "sample" else None
        config = self.transformer.config
        patch = config["patch_size"]
        return Model(
            encode=lambda pixels: self.encode(pixels, generator),
            velocity=self.velocity,
            decode=self.decode,
            scaling_factor=self.vae.config["scaling_factor"],
            vae_factor=2 ** (len(self.vae.config["block_out_channels"]) - 1),
            patch=patch,
            longest_side=(config["pos_embed_max_size"] or config["sample_size"] // patch) * patch,
            memory=TileMemory(self._tile_bytes, self.free_memory, lambda: release_memory(self.device)),
        )

    def _tile_bytes(self, tile_height: int, tile_width: int) -> int:
        patch, context = self.transformer.config["patch_size"], self.prompt.tokens.shape[1]
        width, itemsize = self.transformer.inner_dim, self.dtype.itemsize
        return tile_bytes(tile_height, tile_width, patch, context, width, itemsize)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """``E(x)``: pixels in -1..1 to unscaled latents, the mode or, with a generator, a sample."""

        mean, log_variance = self._run_half("encoder", pixels).chunk(2, 1)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise

    @torch.inference_mode()
    def velocity(self, z: Tensor) -> Tensor:
        """``v(z, t = 1000)`` under the fixed prompt, wherever ``z`` lies."""
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
        except Exception as error:  # compilers fail in many ways; a fault of the transformer itself shows below again
            if is_out_of_memory(error):
                raise
            log.warning("torch.compile failed, going on without it: %s", str(error).strip().partition("\n")[0])
            self.compiled = None
        return self.transformer(**given)

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """``D(z)``: unscaled latents to pixels in about -1..1."""
        return self._run_half("decoder", z)

    def _run_half(self, half: Literal["encoder", "decoder"], x: Tensor) -> Tensor:
        """Run a half of the VAE; where fp16 overflows, once more in fp32, and from then on in fp32 alone."""
        program, outer = _HALVES[half]

        def run(x: Tensor) -> Tensor:
            return plan_and_run(
                program(self.vae), x, self.device, self.free_memory, self.vae_tile, free_ram,
                release=lambda: release_memory(self.device),
            )  # fmt: skip

        if half not in self._overflowed:
            result = run(x.to(self.vae_dtype))
            if self.vae_dtype == torch.float32 or torch.isfinite(result).all():
                return result.to(x.dtype)
            log.warning("the VAE %s overflowed in %s; running it in fp32 from now on", half, self.vae_dtype)
            self._overflowed.add(half)
        for part in (getattr(self.vae, half), getattr(self.vae, outer)):
            if part is not None:
                _move(part, self.device, torch.float32)  # nothing, from the second time on
        return run(x.float()).to(x.dtype)

    def _check_prompt(self) -> None:
        config = self.transformer.config
        found = self.prompt.tokens.shape[2], self.prompt.pooled.shape[1]
        expected = config["joint_attention_dim"], config["pooled_projection_dim"]
        if found != expected:
            raise ValueError(
                f"prompt embeddings of widths {found} do not fit this transformer, which takes {expected}: "
                "use the embeddings that belong to the model"
            )


def load_folder(
    path: Path, loras: tuple[Lora, Lora] | None, prompt: PromptEmbeds, device: torch.device, dtype: torch.dtype,
    strength: float = 1.0, vae_strength: float = 1.0,
) -> DiffusersModel:  # fmt: skip
    """Load an SD3 folder (``transformer/`` and ``vae/``, diffusers' layout) and merge the LoRAs.

    Args:
        loras: for the transformer and the VAE, or None to run the base model alone.
        strength, vae_strength: of the two LoRAs.

    Raises:
        ValueError: where a part is missing, damaged or of another model family, or a LoRA does not fit.
    """
    transformer = load_part(path, "transformer", dtype)
    vae = load_part(path, "vae", torch.float32)  # merged before it is rounded
    if loras is not None:
        for model, lora in zip((transformer, vae), loras, strict=True):
            lora_module.check_fit(lora, lora_module.weight_shapes(model))
        lora_module.merge(transformer, loras[0], strength)
        lora_module.merge(vae, loras[1], vae_strength)
    return DiffusersModel(transformer, vae, prompt, device, dtype)


def load_bundle(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> DiffusersModel:
    """Build the model of a merged bundle; 8-bit weights become ``dtype``.

    Raises:
        ValueError: for a LoRA bundle, or weights that do not match the stored configuration.
    """
    _check_merged(bundle)
    weights = eight_bit.dequantise(bundle.transformer, dtype) if bundle.eight_bit else bundle.transformer
    transformer = _from_weights("transformer", bundle.configs["transformer"], weights, bundle.folded)
    vae = _from_weights("vae", bundle.configs["vae"], bundle.vae)
    if not isinstance(vae.config["scaling_factor"], int | float):
        raise ValueError(f"the bundle's VAE has the scaling factor {vae.config['scaling_factor']!r}: expected a number")
    return DiffusersModel(transformer, vae, bundle.prompt, device, dtype, bundle.defaults)


def load_vae(path: Path) -> Any:
    """The autoencoder alone of an SD3 folder or a merged bundle: ``AutoencoderKL`` in fp32 on the CPU, frozen.

    Raises:
        ValueError: where it is missing, damaged or of another model family, or the bundle holds only LoRAs.
    """
    if path.is_dir():
        vae = load_part(path, "vae", torch.float32)
    else:
        bundle = read_bundle(path)
        _check_merged(bundle)
        vae = _from_weights("vae", bundle.configs["vae"], bundle.vae)
    _move(vae, torch.device("cpu"), torch.float32)
    return vae.requires_grad_(False).eval()


def load_builtin(device: torch.device, dtype: torch.dtype) -> DiffusersModel:
    """The small model that ships with the package."""
    return load_bundle(read_bundle(BUILTIN), device, dtype)


def merged_bundle(
    transformer: Any, vae: Any, prompt: PromptEmbeds, dtype: torch.dtype, defaults: Mapping[str, Any], notes: Mapping[str, str],
    in_8_bits: bool = False,
) -> Bundle:  # fmt: skip
    """A self-contained bundle of a diffusers transformer, folded or not, and autoencoder with weights in ``dtype``, the VAE's
    as ``vae_weights`` gives them.

    Args:
        in_8_bits: whether the transformer's are as ``eight_bit.quantise`` gives them.  The VAE's never are: they would lose
            the encoder LoRA's small change.
    """
    parts = {"transformer": transformer, "vae": vae}
    weights = {name: part.state_dict() for name, part in parts.items()}
    stored = eight_bit.quantise(weights["transformer"], dtype) if in_8_bits else _cast(weights["transformer"], dtype)
    configs = {name: {k: v for k, v in part.config.items() if not k.startswith("_")} for name, part in parts.items()}
    prompt = prompt.to("cpu", dtype)
    folded = isinstance(transformer.time_text_embed, NoEmbedding)
    vae_stored = vae_weights(weights["vae"], dtype)
    return Bundle("merged", prompt, stored, vae_stored, configs, defaults, notes, folded=folded, eight_bit=in_8_bits)


def folder_shapes(path: Path, part: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes that the configuration of an SD3 folder's "transformer" or "vae" implies; no weight is read."""
    return lora_module.weight_shapes(_folder_model(path, part))


def check_folder(path: Path, part: str) -> None:
    """Raise ``ValueError`` unless the weight files of an SD3 folder's part hold what its configuration asks for.

    Only the headers of the safetensors files are read.
    """
    expected = {name: list(tensor.shape) for name, tensor in _folder_model(path, part).state_dict().items()}
    found: dict[str, list[int]] = {}
    for file in sorted((path / part).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{path / part}: {len(wrong)} weights are missing, unexpected or of other shapes: {', '.join(wrong[:8])}"
        )


def _check_merged(bundle: Bundle) -> None:
    if bundle.kind != "merged":
        raise ValueError("this bundle holds only LoRAs: give an SD3 folder as the model and the bundle as the LoRA")


def _folder_model(path: Path, part: str) -> Any:
    """The model of a folder's configuration on the meta device."""
    config = _read_config(path, part)
    try:
        with torch.device("meta"):
            return _CLASSES[part].from_config(config)
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{path / part / 'config.json'} cannot be used: {error}") from error


def load_part(path: Path, part: str, dtype: torch.dtype) -> Any:
    """The "transformer" or "vae" of an SD3 folder.

    Raises:
        ValueError: where it is missing, damaged or of another model family.
    """
    _read_config(path, part)
    try:
        model, report = _CLASSES[part].from_pretrained(
            path / part, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path / part} cannot be loaded: {error}") from error
    wrong = [f"{name} ({kind})" for kind in ("missing", "unexpected") for name in report[f"{kind}_keys"]]
    if wrong:
        raise ValueError(f"{path / part} does not match its configuration, {len(wrong)} weights: {', '.join(wrong[:8])}")
    return model


def _read_config(path: Path, part: str) -> dict[str, Any]:
    file, expected = path / part / "config.json", _CLASSES[part].__name__
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not an SD3 folder in diffusers' layout: {file}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no configuration: expected the one of {expected}")
    if config.get("_class_name") != expected:
        raise ValueError(f"{file} is for a {config.get('_class_name')}: expected {expected}, as in SD3 medium")
    return config


def _from_weights(part: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], folded: bool = False) -> Any:
    try:
        with torch.device("meta"):
            model = _CLASSES[part].from_config(dict(config))
        if folded:
            empty(model)
        model.load_state_dict(weights, strict=True, assign=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ValueError(f"the bundle's {part} does not match its configuration: {error}") from error
    return model


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    nn.Module.to(model, device, dtype)  # diffusers' own .to() warns of every cast
