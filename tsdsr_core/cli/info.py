"""Show what a LoRA, bundle, prompt embedding or model folder is, and whether it fits SD3 medium."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..checks import some
from ..errors import InputError
from ..families import FAMILIES, family_of
from ..families.bundle import is_bundle, read_bundle
from ..families.folder import check_folder, folder_configs, folder_family, folder_shapes
from ..families.load import from_bundle, published_shapes
from ..families.record import Family
from ..system.atomic import one_line
from ..weights import float8
from ..weights.kinds import recognise_file
from ..weights.lora import TRANSFORMER_FILE, VAE_FILE, Lora, check_fit, load_lora, misfits
from ..weights.peft_config import PEFT_FILE
from ..weights.prompt import POOLED_FILE, POOLED_KEY, TOKENS_FILE, TOKENS_KEY, PromptEmbeds, load_prompt, pair_of
from ..weights.reading import PICKLED, is_safetensors, tensor_shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr info``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="file or folder to inspect")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="check a LoRA against this SD3 folder, not SD3 medium")
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr info``; the exit code is 1 if the file does not fit."""
    facts = describe(options.file, options.model)
    if options.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(one_line(f"{name:12} {text}"))  # notes of a downloaded file may hold a terminal's commands
    return int(facts.get("fits") is False)


def describe(path: Path, model: Path | None) -> dict[str, Any]:
    """Describe ``path`` as an ordered mapping, to print or to report as JSON.

    Raises:
        InputError: for a missing, damaged or unknown file, or a ``model`` for a file that has no LoRAs.
    """
    if path.is_dir():
        facts = _folder(path, model)
    elif is_bundle(path):
        facts = _bundle(path, model)
    elif path.is_file() and (_is_pair(path) or _is_prompt(path)):
        facts = _prompt(load_prompt(path))
    elif path.is_file() and (kind := recognise_file(path)) and not kind.is_lora:
        facts = {"kind": kind.name.removeprefix("a "), "use": kind.use, "fits": kind.fits, "checked": "the header of the file"}
    else:
        facts = _loras([load_lora(path)], model)
    if model and facts["checked"] != f"against {model}":
        raise InputError(f"--model {model} is for LoRAs, but {path} is a {facts['kind']}: omit it")
    return facts


def _folder(path: Path, model: Path | None) -> dict[str, Any]:
    parts = list(folder_configs(path))
    if parts:
        return _model_folder(path, parts)
    files = {"transformer": path / TRANSFORMER_FILE, "vae": path / VAE_FILE}
    if (path / PEFT_FILE).is_file() and not all(file.is_file() for file in files.values()):
        return _loras([load_lora(path / PEFT_FILE)], model)
    loras = [load_lora(file, part) for part, file in files.items()] if any(f.is_file() for f in files.values()) else []
    facts = _loras(loras, model) if loras else {}
    if (path / TOKENS_FILE).is_file():
        prompt = _prompt(load_prompt(path))
        if not loras:
            return prompt
        facts["embeddings"] = prompt["tokens"]
        facts["fits"] = facts["fits"] and prompt["fits"]
    if not facts:
        raise InputError(
            f"{path} is not a known kind of folder: expected transformer/ and vae/ (SD3 in diffusers' layout), "
            f"{TRANSFORMER_FILE} and {VAE_FILE} (LoRAs), or {TOKENS_FILE} and {POOLED_FILE} (embeddings)"
        )
    return facts


def _model_folder(path: Path, parts: list[str]) -> dict[str, Any]:
    family = folder_family(path)
    facts: dict[str, Any] = {"kind": "model folder in diffusers' layout", "family": family.title, "parts": ", ".join(parts)}
    shapes = {part: folder_shapes(path, part) for part in parts}
    for part in parts:
        facts[part] = f"{len(shapes[part])} weight matrices"
    for part in parts:
        check_folder(path, part)
    facts["fits"] = len(parts) == 2 and all(shapes[part] == published_shapes(family, part) for part in parts)
    facts["checked"] = f"the weight files are complete; shapes against {family.published}"
    return facts


def _loras(loras: list[Lora], model: Path | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "LoRA for the " + " and the ".join(lora.target for lora in loras)}
    facts["fits"] = True
    family = folder_family(model) if model else _family_of_lora(loras)
    facts["checked"] = f"against {model or family.published}"
    for lora in loras:
        ranks = sorted({pair.rank for pair in lora.pairs.values()})
        facts[lora.target] = f"{len(lora.pairs)} modules of rank {', '.join(map(str, ranks))}"
        facts[f"{lora.target} alpha"] = (
            f"{_several(lora, 'alpha')} ({lora.alpha_source or 'the rank, since the file gives none'})"
        )
        facts[f"{lora.target} strength"] = f"{_several(lora, 'scale')} (alpha / rank)"
        shapes = folder_shapes(model, lora.target) if model else published_shapes(family, lora.target)
        try:
            check_fit(lora, shapes)
        except InputError as error:
            facts["fits"] = False
            facts[f"{lora.target} misfit"] = str(error)
    return facts


def _family_of_lora(loras: list[Lora]) -> Family:
    """The first family whose published model the LoRAs fit, or else the first that has LoRAs."""
    adapted = [family for family in FAMILIES if family.published]
    for family in adapted:
        if not any(misfits(lora, published_shapes(family, lora.target)) for lora in loras):
            return family
    return adapted[0]


def _several(lora: Lora, name: str) -> str:
    """The values of an attribute of the pairs, each once."""
    return some([f"{value:.6g}" for value in sorted({getattr(pair, name) for pair in lora.pairs.values()})])


def _bundle(path: Path, model: Path | None) -> dict[str, Any]:
    bundle = read_bundle(path)
    stored = {**bundle.transformer, **bundle.vae}
    count = sum(tensor.numel() for key, tensor in stored.items() if not key.endswith(float8.SCALE))
    facts: dict[str, Any] = {"kind": f"{bundle.kind} bundle"}
    if bundle.configs:
        facts["family"] = family_of(bundle.configs).title
    if bundle.kind == "lora":
        facts |= {name: value for name, value in _loras(list(bundle.loras()), model).items() if name != "kind"}
    else:
        from_bundle(bundle, torch.device("cpu"), torch.float32)  # raises if weights do not match the configuration
        facts["fits"] = True
        facts["checked"] = "weights against the stored configuration"
        if bundle.eight_bit:
            facts["weights"] = "8-bit (float8_e4m3fn) in the transformer's attention and feed-forward layers"
        if bundle.int8:
            facts["weights"] = "int8 (rotated, one scale per row) in the transformer's attention and feed-forward layers"
    facts |= {"parameters": count, "size": f"{path.stat().st_size / 1e6:.1f} MB"}
    facts |= {"tokens": tuple(bundle.prompt.tokens.shape), "pooled": tuple(bundle.prompt.pooled.shape)}
    return facts | {"defaults": dict(bundle.defaults), "notes": dict(bundle.notes)}


def _prompt(prompt: PromptEmbeds) -> dict[str, Any]:
    tokens, pooled = tuple(prompt.tokens.shape), tuple(prompt.pooled.shape)
    adapted = [family for family in FAMILIES if family.published]
    fitting = [f for f in adapted if f.prompt_widths(f.parts["transformer"].published) == (tokens[2], pooled[1])]
    checked = f"against {(fitting or adapted)[0].published}"
    return {"kind": "prompt embeddings", "tokens": tokens, "pooled": pooled, "fits": bool(fitting), "checked": checked}


def _is_pair(path: Path) -> bool:
    return path.suffix.lower() == PICKLED and pair_of(path) is not None


def _is_prompt(path: Path) -> bool:
    return is_safetensors(path) and tensor_shapes(path).keys() == {TOKENS_KEY, POOLED_KEY}
