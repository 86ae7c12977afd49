"""One safetensors file for a restorer: LoRAs or merged weights, prompt embeddings and JSON metadata.

Layout, version 1, 2 where the transformer is folded, or 3 where it holds 8-bit weights.  The metadata entry
``tsdsr_bundle`` holds JSON: ``version``, ``kind``, ``defaults`` (options that suit the model), ``notes`` and, for merged
weights, ``transformer_config`` and ``vae_config`` in diffusers' terms; optionally ``preview``, how a latent looks,
``folded`` and ``eight_bit``.
Tensors: ``prompt_embeds``, ``pooled_prompt_embeds`` and, by kind,

- ``lora``: ``transformer.<module>.lora_A.weight`` ... and ``vae.<module>.lora_A.weight`` ...; needs a base model;
- ``merged``: ``transformer.<weight>`` and ``vae.<weight>`` in diffusers' layout, with ``transformer.<weight>_scale`` for an
  8-bit one; needs nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import eight_bit
from .files import write_tensors
from .lora import Lora, load_lora, parse_lora
from .prompt import POOLED_KEY, TOKENS_KEY, PromptEmbeds

BUILTIN = Path(__file__).parent / "assets" / "builtin.safetensors"
"""The small model that ships with the package."""
VERSION = 3
METADATA_KEY = "tsdsr_bundle"
KINDS = ("lora", "merged")
DEFAULTS = {"process_size": (0, 4096), "wavelet_levels": (1, 10)}
"""Options a bundle may set, whole numbers, and their limits."""
FLAGS = ("folded", "eight_bit")
"""What may be true of merged weights."""


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory."""

    kind: str
    prompt: PromptEmbeds
    transformer: Mapping[str, Tensor]
    """LoRA factors or weights by key, without the leading ``transformer.``."""
    vae: Mapping[str, Tensor]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``transformer`` and ``vae`` configuration of merged weights."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """Free text: source, licence, how it was made."""
    preview: Sequence[Sequence[float]] = ()
    """Red, green and blue, in -1..1, of each unscaled latent channel, and what is added; empty where the VAE is SD3's."""
    folded: bool = False
    """Whether the transformer takes this prompt alone (``fold``)."""
    eight_bit: bool = False
    """Whether the transformer's weights are as ``eight_bit.quantise`` gives them."""

    def loras(self) -> tuple[Lora, Lora]:
        """The transformer's and the VAE's LoRA of a ``lora`` bundle.

        Raises:
            ValueError: for a merged bundle.
        """
        if self.kind != "lora":
            raise ValueError("this bundle holds merged weights, no LoRAs: load it as the model, without a LoRA")
        return parse_lora(self.transformer), parse_lora(self.vae)


def bundle_path(text: str) -> Path:
    """The path that a person gives; "builtin" is that of the built-in model."""
    return BUILTIN if text == "builtin" else Path(text)


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a safetensors file with bundle metadata; never raises for a file of another kind."""
    try:
        return METADATA_KEY in _header(path)
    except ValueError:
        return False


def find_lora(path: Path, target: str) -> Lora:
    """The LoRA for "transformer" or "vae" from its own file, or from a LoRA bundle.

    Raises:
        ValueError: as ``lora.load_lora`` and ``read_bundle``.
    """
    if not is_bundle(path):
        return load_lora(path, target)
    transformer, vae = read_bundle(path).loras()
    return transformer if target == "transformer" else vae


def vae_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """An autoencoder's weights as a bundle in ``dtype`` stores them, all in one type.

    bf16 has too few digits for the encoder LoRA's small change of them, so they are fp16 instead; fp32 where one of them is
    beyond 16 bits.
    """
    narrow = torch.float16 if dtype == torch.bfloat16 else dtype
    stored = {name: weight.to(narrow) for name, weight in weights.items()}
    if all(torch.isfinite(weight).all() for weight in stored.values()):
        return stored
    return {name: weight.to(torch.float32) for name, weight in weights.items()}


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write ``bundle`` to ``path``, all or nothing."""
    description = {
        "version": 3 if bundle.eight_bit else 2 if bundle.folded else 1,
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
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(description, sort_keys=True)})


def read_bundle(path: Path) -> Bundle:
    """Read a bundle onto the CPU; nothing in the file is executed.

    Raises:
        ValueError: for a missing, damaged, truncated or foreign file or one of a newer version, naming it.
    """
    description = read_description(path)
    groups: dict[str, dict[str, Tensor]] = {"transformer": {}, "vae": {}}
    single: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                part, _, rest = key.partition(".")
                (groups[part] if part in groups and rest else single)[rest or key] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if set(single) != {TOKENS_KEY, POOLED_KEY} or not all(groups.values()):
        raise ValueError(f"{path} lacks the prompt embeddings, the transformer or the VAE, or has more: it is damaged")
    try:
        prompt = PromptEmbeds(single[TOKENS_KEY], single[POOLED_KEY])
        if description.get("eight_bit"):
            eight_bit.check(groups["transformer"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    configs = {part: description[f"{part}_config"] for part in groups} if description["kind"] == "merged" else {}
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
    )


def read_description(path: Path) -> dict[str, Any]:
    """The checked JSON metadata of a bundle, without reading its tensors.

    Raises:
        ValueError: as ``read_bundle``.
    """
    header = _header(path)
    if METADATA_KEY not in header:
        raise ValueError(f"{path} is not a TSD-SR bundle (no {METADATA_KEY!r} metadata): make one with tsdsr bundle")
    try:
        description = json.loads(header[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has damaged bundle metadata: {error}") from error
    version = description.get("version") if isinstance(description, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} has damaged bundle metadata: no version")
    if version > VERSION:
        raise ValueError(f"{path} is a bundle of version {version}, this program reads up to {VERSION}: update it")
    _check_description(path, description)
    return description


def _check_description(path: Path, description: dict[str, Any]) -> None:
    kind = description.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{path} is a bundle of kind {kind!r}: expected one of {', '.join(KINDS)}")
    needed = ["defaults", "notes"] + (["transformer_config", "vae_config"] if kind == "merged" else [])
    for name in needed:
        if not isinstance(description.get(name), dict):
            raise ValueError(f"{path} has damaged bundle metadata: {name} is missing")
    for name, value in description["defaults"].items():
        low, high = DEFAULTS.get(name, (1, 0))
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{path} has damaged bundle metadata: default {name} = {value!r}")
    for name in FLAGS:
        if description.get(name, False) not in ((False, True) if kind == "merged" else (False,)):
            raise ValueError(f"{path} has damaged bundle metadata: {name} = {description[name]!r} in a bundle of kind {kind}")
    if "preview" in description and not _is_preview(description):
        raise ValueError(f"{path} has damaged bundle metadata: preview is not a row of 3 numbers for each latent channel and 1")


def _is_preview(description: dict[str, Any]) -> bool:
    rows, channels = description["preview"], description.get("vae_config", {}).get("latent_channels")
    if not isinstance(rows, list) or not isinstance(channels, int) or len(rows) != channels + 1:
        return False
    return all(isinstance(row, list) and len(row) == 3 and all(type(v) in (int, float) for v in row) for row in rows)


def _header(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, truncated or not a safetensors file: {error}") from error
