"""Loads a restorer: the built-in model, a bundle, or a model folder with LoRAs and a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import some
from ..errors import InputError
from ..system.atomic import no_file
from ..system.device import choose_device, choose_dtype
from ..weights import float8, int8
from ..weights.lora import TRANSFORMER_FILE, VAE_FILE, Lora, check_fit, load_lora, merge_lora, weight_shapes
from ..weights.prompt import TOKENS_FILE, PromptEmbeds, load_prompt
from ..weights.reading import is_finite
from . import family_of
from .bundle import BUILTIN, Bundle, read_bundle, vae_weights
from .bundle_header import WRONG_KIND, is_bundle
from .folder import folder_family, load_part
from .record import Config, Family
from .restorer import Restorer

Loras = tuple[Lora, ...]
"""At most one LoRA for each part of a model."""


def load(
    source: str | Path = "builtin", *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
    loras: Path | str | Loras | None = None, prompt: Path | str | PromptEmbeds | None = None, vae: Path | str | None = None,
    lora_strength: float = 1.0, vae_lora_strength: float = 1.0,
) -> Restorer:  # fmt: skip
    """Load the restorer that ``source`` names.

    Args:
        source: "builtin", a bundle (.safetensors), or a model folder in diffusers' layout.
        device: such as "cuda" or "cpu"; "auto" for the first accelerator.
        dtype: "fp32", "fp16" or "bf16"; "auto" for fp16 on accelerators, else fp32.
        loras: with a model folder: the folder of the LoRA files, a LoRA bundle, or LoRAs; ``()`` for the base model alone.
        prompt: with a model folder: the embeddings, their file or their folder; None if they lie beside the LoRAs.
        vae: a folder with an autoencoder in place of the model folder's own.
        lora_strength, vae_lora_strength: strengths of the LoRAs of the transformer and of the VAE's encoder; 1 as published.

    Raises:
        InputError: if something is missing, damaged or does not fit, with its name.

    >>> load("builtin", device="cpu").family.name
    'small'
    """
    device = device if isinstance(device, torch.device) else choose_device(device)
    dtype = dtype if isinstance(dtype, torch.dtype) else choose_dtype(dtype, device)
    strengths = {"transformer": lora_strength, "vae": vae_lora_strength}
    for part, strength in strengths.items():
        if not math.isfinite(strength):
            raise InputError(f"strength {strength} of the {part}'s LoRA: expected a finite number, such as 1")
    path = BUILTIN if source == "builtin" else Path(source)
    if path.is_file():
        given = {"LoRAs": loras, "a prompt": prompt, "a VAE": vae}
        unused = next((name for name, value in given.items() if value is not None), None)
        if unused or set(strengths.values()) != {1.0}:
            raise InputError(f"{source} has LoRAs and prompt merged: {unused or 'LoRA strengths'} go with a model folder only")
        return from_bundle(read_bundle(path, "merged"), device, dtype)
    if not path.is_dir():
        raise InputError(f"{source} {no_file(path)}: expected builtin, a bundle file or a model folder")
    family = folder_family(path)
    if loras is None and not family.base_restores:
        raise InputError(f"{source} needs LoRAs: the base model alone cannot restore images")
    found, embeds = _loras_and_prompt(loras, prompt)
    return from_folder(path, family, found, embeds, strengths, device, dtype, None if vae is None else Path(vae))


def _loras_and_prompt(
    loras: Path | str | Loras | None, prompt: Path | str | PromptEmbeds | None
) -> tuple[Loras, PromptEmbeds]:  # fmt: skip
    if isinstance(loras, str | Path):
        place = None if isinstance(prompt, PromptEmbeds | None) else Path(prompt)
        found, beside = load_loras_and_prompt(Path(loras), place)
        return found, prompt if isinstance(prompt, PromptEmbeds) else beside
    if prompt is None:
        raise InputError("the prompt is missing: expected embeddings, their file or their folder")
    return loras or (), prompt if isinstance(prompt, PromptEmbeds) else load_prompt(Path(prompt))


def load_loras_and_prompt(lora_dir: Path, embedding_dir: Path | None) -> tuple[Loras, PromptEmbeds]:
    """Load the LoRAs and the embeddings from the official folders, or from a LoRA bundle.

    Args:
        lora_dir: folder of the LoRAs, or a LoRA bundle.
        embedding_dir: folder or file of the embeddings; None if ``lora_dir`` has them.

    Raises:
        InputError: if something is missing or damaged, with its name.
    """
    if lora_dir.is_file():
        if not is_bundle(lora_dir):
            raise InputError(f"{lora_dir}: expected a folder with {TRANSFORMER_FILE} and {VAE_FILE}, or a LoRA bundle")
        bundle = read_bundle(lora_dir, "lora")
        return bundle.loras(), bundle.prompt if embedding_dir is None else load_prompt(embedding_dir)
    if not lora_dir.is_dir():
        raise InputError(f"{lora_dir} {no_file(lora_dir)}")
    if embedding_dir is None:
        if not (lora_dir / TOKENS_FILE).is_file():
            raise InputError(f"the folder of the embeddings is needed: {lora_dir} has no {TOKENS_FILE}")
        embedding_dir = lora_dir
    loras = load_lora(lora_dir / TRANSFORMER_FILE, "transformer"), load_lora(lora_dir / VAE_FILE, "vae")
    return loras, load_prompt(embedding_dir)


def from_folder(
    path: Path, family: Family, loras: Loras, prompt: PromptEmbeds, strengths: Mapping[str, float], device: torch.device,
    dtype: torch.dtype, vae: Path | None = None,
) -> Restorer:  # fmt: skip
    """Load a model folder and merge LoRAs into it.

    Args:
        strengths: of the LoRA of each part.
        vae: folder of the autoencoder; None for the model folder's own.

    Raises:
        InputError: if a part is missing, damaged or of another family, or a LoRA does not fit.
    """
    parts = {
        "transformer": load_part(path, "transformer", dtype, family),
        "vae": load_part(vae or path, "vae", torch.float32, family),  # merged before it is rounded
    }
    for lora in loras:
        check_fit(lora, weight_shapes(parts[lora.target]))
    for lora in loras:
        merge_lora(parts[lora.target], lora, strengths[lora.target])
    return Restorer(parts["transformer"], parts["vae"], prompt, device, dtype)


def from_bundle(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Restorer:
    """Build the model of a model bundle; 8-bit and int8 weights are expanded to ``dtype``.

    Raises:
        InputError: for a LoRA bundle, weights that do not match the stored configuration, or exceed the range of ``dtype``.
    """
    if bundle.kind != "merged":
        raise InputError(WRONG_KIND["merged"])
    family = family_of(bundle.configs)
    weights = {"transformer": bundle.transformer_weights(dtype), "vae": bundle.vae}
    casts = bundle.eight_bit or bundle.int8  # else those that have another type
    beyond = [
        name
        for name, stored in weights["transformer"].items()
        if (casts or stored.dtype != dtype) and not is_finite(stored.to(dtype))
    ]
    if beyond:
        raise InputError(
            f"{bundle.source} has weights of the transformer that exceed the range of {dtype} in {some(beyond)}: choose bf16 "
            "or fp32, or make the bundle again"
        )
    try:
        transformer, vae = (
            _from_weights(family, part, bundle.configs[part], weights[part], bundle.folded) for part in ("transformer", "vae")
        )
        return Restorer(transformer, vae, bundle.prompt, device, dtype, bundle.defaults, bundle.notes, bundle.preview)
    except InputError as error:
        raise InputError(f"{bundle.source}: {error}") from error


def load_vae(source: Path) -> Any:
    """Load only the autoencoder of a model folder or a model bundle, in fp32 on the CPU, frozen.

    Raises:
        InputError: if it is missing, damaged or of no known family, or the bundle holds only LoRAs.
    """
    if source.is_dir():
        vae = load_part(source, "vae", torch.float32)
    else:
        bundle = read_bundle(source, "merged")
        try:
            vae = _from_weights(family_of(bundle.configs), "vae", bundle.configs["vae"], bundle.vae)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
    nn.Module.to(vae, torch.device("cpu"), torch.float32)  # diffusers' own .to() warns about every cast
    return vae.requires_grad_(False).eval()


def merged_bundle(
    transformer: Any, vae: Any, prompt: PromptEmbeds, dtype: torch.dtype, defaults: Mapping[str, Any], notes: Mapping[str, str],
    quantised: Literal["float8", "int8"] | None = None, preview: Sequence[Sequence[float]] = (),
) -> Bundle:  # fmt: skip
    """Make a self-contained bundle of a transformer, folded or not, and an autoencoder.

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
    folded = family_of(configs).is_folded(transformer)
    return Bundle(
        "merged", prompt, store(weights["transformer"], dtype), vae_weights(weights["vae"], dtype), configs, defaults, notes,
        preview, folded=folded, eight_bit=quantised == "float8", int8=quantised == "int8",
    )  # fmt: skip


def published_shapes(family: Family, part: str) -> dict[str, tuple[int, ...]]:
    """Weight shapes by module name of the model that a family's published LoRA was made for; no memory is allocated.

    >>> from tsdsr_core.families.sd3 import SD3
    >>> len(published_shapes(SD3, "vae")), published_shapes(SD3, "vae")["encoder.conv_in"]
    (70, (128, 3, 3, 3))
    """
    described = family.parts[part]
    with torch.device("meta"):
        return weight_shapes(described.model_class()(**described.published))


def _from_weights(family: Family, part: str, config: Config, weights: Mapping[str, Tensor], folded: bool = False) -> Any:
    model_class = family.parts[part].model_class()  # imports a package: if that fails, it is no fault of the weights
    try:
        with torch.device("meta"):
            model = model_class.from_config(dict(config))
        if folded and part == "transformer":
            assert family.fold_structure is not None
            family.fold_structure(model)
        model.load_state_dict(weights, strict=True, assign=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError) as error:
        said = " ".join(str(error).split())  # torch lists the weights on lines of their own
        raise InputError(f"the {part} does not match its configuration: {said}") from error
    return model


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}
