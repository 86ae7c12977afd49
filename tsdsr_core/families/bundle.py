"""Bundles: a restorer in one safetensors file, with LoRAs or merged weights, prompt embeddings and JSON metadata.

The format has version 1, or 2 with a folded transformer, 3 with 8-bit weights, 4 with int8 weights, or that of the
family (``Family.bundle_version``) where it is higher.  The metadata entry
``tsdsr_bundle`` holds JSON: ``version``, ``kind``, ``defaults`` (recommended options), ``notes`` and, for merged weights,
``transformer_config`` and ``vae_config`` in diffusers' terms; optionally ``preview`` (colours of latent channels),
``folded``, and ``eight_bit`` or ``int8``.  Tensors: ``prompt_embeds``, ``pooled_prompt_embeds`` and, depending on the kind,

- ``lora``: ``transformer.<module>.lora_A.weight`` ... and ``vae.<module>.lora_A.weight`` ...; needs a base model;
- ``merged``: ``transformer.<weight>`` and ``vae.<weight>`` in diffusers' layout, with ``transformer.<weight>_scale`` for each
  8-bit or int8 weight; needs nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import some
from ..errors import InputError
from ..system.atomic import write_tensors
from ..weights import float8, int8
from ..weights.lora import Lora, load_lora, parse_lora
from ..weights.prompt import POOLED_KEY, TOKENS_KEY, PromptEmbeds
from ..weights.reading import check_weights, is_finite, open_tensors
from . import family_of
from .bundle_header import FLAGS, METADATA_KEY, PARTS, WRONG_KIND, is_bundle, read_description

BUILTIN = Path(__file__).parents[1] / "assets" / "builtin.safetensors"
"""The small model that ships with the package."""


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory."""

    kind: str
    """ "lora" or "merged"."""
    prompt: PromptEmbeds
    transformer: Mapping[str, Tensor]
    """LoRA factors or weights by key, without the prefix ``transformer.``."""
    vae: Mapping[str, Tensor]
    """The same for the VAE, without the prefix ``vae.``."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Configurations "transformer" and "vae" of merged weights."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Recommended options: ``process_size`` and ``wavelet_levels``."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Free text: source, licence, how it was made."""
    preview: Sequence[Sequence[float]] = ()
    """Linear map from latents to preview colours: red, green and blue in -1..1 for each unscaled latent channel, and the bias;
    empty for SD3's VAE."""
    folded: bool = False
    """Whether the transformer is folded (``Family.fold``), so that it works with this prompt only."""
    eight_bit: bool = False
    """Whether the transformer's matrices are stored in 8 bits (``float8.quantise``)."""
    int8: bool = False
    """Whether they are stored in int8 (``int8.quantise``); not both."""
    source: str = field(default="the bundle", compare=False)
    """The file that it was read from, for messages."""

    def transformer_weights(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The transformer's weights without scales: quantised ones in ``dtype``, others as they are stored."""
        if self.eight_bit:
            return float8.dequantise(self.transformer, dtype)
        return int8.dequantise(self.transformer, dtype) if self.int8 else self.transformer

    def loras(self) -> tuple[Lora, Lora]:
        """The transformer's and the VAE's LoRA of a ``lora`` bundle.

        Raises:
            InputError: for a model bundle.
        """
        if self.kind != "lora":
            raise InputError(WRONG_KIND["lora"])
        return parse_lora(self.transformer), parse_lora(self.vae)


def bundle_path(text: str) -> Path:
    """The path that a user gives, or that of the built-in model for "builtin"."""
    return BUILTIN if text == "builtin" else Path(text)


def find_lora(path: Path, target: str) -> Lora:
    """Load the LoRA for "transformer" or "vae" from its own file, or from a LoRA bundle without reading the rest of it.

    Raises:
        InputError: as ``lora.load_lora`` and ``read_bundle``.
    """
    if not is_bundle(path):
        return load_lora(path, target)
    read_description(path, "lora")
    tensors = _read(path, target)[target]
    try:
        return parse_lora(tensors)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def vae_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """An autoencoder's weights in the type in which a bundle of type ``dtype`` stores them.

    Instead of bf16, which has too few digits for the small change made by the encoder LoRA, it is fp16; if a weight exceeds
    the range of fp16, it is fp32.
    """
    narrow = torch.float16 if dtype == torch.bfloat16 else dtype
    stored = {name: weight.to(narrow) for name, weight in weights.items()}
    if all(map(is_finite, stored.values())):
        return stored
    return {name: weight.to(torch.float32) for name, weight in weights.items()}


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle, all or nothing.

    Raises:
        InputError: for infinite and NaN values, which a smaller type may have made of larger ones.
        OSError: if it cannot be written.
    """
    weights = 4 if bundle.int8 else 3 if bundle.eight_bit else 2 if bundle.folded else 1
    description = {
        "version": max(weights, family_of(bundle.configs).bundle_version if bundle.configs else 1),
        "kind": bundle.kind,
        "defaults": dict(bundle.defaults),
        "notes": dict(bundle.notes),
    }
    description.update({f"{part}_config": dict(config) for part, config in bundle.configs.items()})
    description.update({name: True for name in FLAGS if getattr(bundle, name)})
    if bundle.preview:
        description["preview"] = [list(row) for row in bundle.preview]
    tensors = {TOKENS_KEY: bundle.prompt.tokens, POOLED_KEY: bundle.prompt.pooled}
    tensors.update({f"transformer.{key}": tensor for key, tensor in bundle.transformer.items()})
    tensors.update({f"vae.{key}": tensor for key, tensor in bundle.vae.items()})
    beyond = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if beyond:
        kind = str(tensors[beyond[0]].dtype).removeprefix("torch.")
        raise InputError(f"{path}: {some(beyond)} would be infinite or NaN in {kind}: choose another dtype, fp32 or bf16")
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(description, sort_keys=True)})


def read_bundle(path: Path, kind: str | None = None) -> Bundle:
    """Read a bundle to the CPU; nothing in the file is executed.

    Args:
        kind: "lora" or "merged" to accept only that kind; the tensors of the other are not read.

    Raises:
        InputError: for a missing, damaged or unknown file, a newer version, invalid metadata, NaN or infinite values, or the
            wrong kind; the message names the file.
    """
    description = read_description(path, kind)
    groups = _read(path, in_int8=description.get("int8", False))
    try:
        prompt = PromptEmbeds(groups[TOKENS_KEY][""], groups[POOLED_KEY][""])
        if description.get("eight_bit"):
            float8.check_scales(groups["transformer"])
        if description.get("int8"):
            int8.check_scales(groups["transformer"])
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    configs = {part: description[f"{part}_config"] for part in PARTS} if description["kind"] == "merged" else {}
    return Bundle(
        description["kind"],
        prompt,
        groups["transformer"],
        groups["vae"],
        configs,
        description["defaults"],
        description["notes"],
        description.get("preview", ()),
        description.get("folded", False),
        description.get("eight_bit", False),
        description.get("int8", False),
        str(path),
    )


def _read(path: Path, part: str | None = None, in_int8: bool = False) -> dict[str, dict[str, Tensor]]:
    """The tensors of a bundle, or of one part, as ``{first part of the key: {rest of the key: tensor}}``.

    Args:
        in_int8: whether the transformer may have int8 weights, which ``int8.check_scales`` checks.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    with open_tensors(path) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            first, _, rest = key.partition(".")
            if part in (None, first):
                groups.setdefault(first, {})[rest] = file.get_tensor(key)
    for first, tensors in groups.items():
        stored = int8.STORED if in_int8 and first == "transformer" else None
        check_weights(path, {rest or first: tensor for rest, tensor in tensors.items() if tensor.dtype != stored})
    return groups
