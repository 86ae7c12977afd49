"""What a model family is: one record with everything that the rest of the project asks of it.

A new family is a folder with its record and one line in ``FAMILIES``; CONTRIBUTING shows one from end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..vae.program import Program, decoder_program, encoder_program
from ..weights.prompt import Condition

Config = Mapping[str, Any]
"""Configuration of one part in diffusers' terms: ``config.json``, or an entry of a bundle's header."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by their names."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that the pipeline and its tiles follow."""

    scaling_factor: float
    """Scaled latents are the autoencoder's times this."""
    vae_factor: int
    """Pixels a side of one latent cell."""
    patch: int
    """Latent cells a side of one token; latents are padded to multiples of it."""
    longest_side: int | None
    """Longest latent side that the network sees at once; None for no limit."""
    context_tokens: int
    """Tokens that each tile costs besides its own, such as a prompt's."""


@dataclass(frozen=True)
class Part:
    """The transformer or the autoencoder of a family."""

    class_name: str
    """As ``config.json`` has it in ``_class_name``."""
    model_class: Callable[[], Any]
    """Imports and returns the class: a diffusers model, or one with its ``from_config``, ``from_pretrained`` and ``config``."""
    whole_numbers: Mapping[str, tuple[int, int]]
    """Numbers that a configuration must have, with their least and greatest values: checked before a model is built."""
    published: Config = field(default_factory=dict)
    """Configuration of the weights that the family's published LoRA was made for; empty if there is none."""
    lora_targets: list[str] | str | None = None
    """Modules that a LoRA adapts, as ``peft.LoraConfig.target_modules``; None if the family has no LoRA for this part."""
    folder: str = ""
    """Subfolder in diffusers' layout, where it is not the part's name."""


@dataclass(frozen=True)
class Family:
    """A model family.  Its functions take configurations by part ("transformer" and "vae")."""

    name: str
    """As bundles store it."""
    title: str
    """As messages show it."""
    matches: Callable[[Mapping[str, Config]], bool]
    """Whether these configurations, those of a folder or of a bundle, are of this family."""
    parts: Mapping[str, Part]
    """The "transformer" and the "vae"."""
    geometry: Callable[[Mapping[str, Config]], Geometry]
    velocity: Callable[[Callable[..., Any], Tensor, Tensor, Condition], Tensor]
    """``v(z, t)`` from (network, scaled latents ``(B, C, h, w)``, timesteps ``(B,)`` of 0..1000, condition of B samples)."""
    tile_bytes: Callable[[Config, int, int, int, int], int]
    """Activation bytes of a tile from (transformer's configuration, height and width in latent cells, tokens of the prompt,
    bytes of one value)."""
    prompt_widths: Callable[[Config], tuple[int, int]]
    """Widths of tokens and pooled embedding that the transformer takes."""
    bundle_version: int = 5
    """Of the bundles with its merged weights, at least: programs that read only earlier versions do not know the family."""
    published: str = ""
    """The model that its published LoRA was made for; empty if there is none."""
    check_configs: Callable[[Mapping[str, Config]], None] = lambda configs: None
    """Raises ``InputError`` for configurations of a bundle that do not fit each other."""
    check_weights: Callable[[Mapping[str, Config], Shapes], list[str]] = lambda configs, shapes: []
    """What is wrong with the shapes of a bundle's tensors, in words, before a model of the configured sizes is built."""
    programs: Mapping[str, Callable[..., Program]] = field(
        default_factory=lambda: {"encoder": encoder_program, "decoder": decoder_program}
    )
    """The halves of the autoencoder for the exact tiled run."""
    posterior: bool = True
    """Whether the encoder gives mean and log-variance, or latents alone."""
    base_restores: bool = False
    """Whether the network restores without a LoRA."""
    fold: Callable[[Any, Tensor], None] | None = None
    """Folds a transformer for one pooled embedding, in place; None if the family cannot be folded."""
    fold_structure: Callable[[Any], None] | None = None
    """Gives a new transformer the modules of a folded one, before folded weights are loaded."""
    is_folded: Callable[[Any], bool] = lambda transformer: False
