"""The options that choose a model, shared by the subcommands that need one."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..bundle import is_bundle, read_bundle
from ..device import DEVICES, DTYPES, held_memory
from ..diffusers_models import DiffusersModel, load_builtin, load_bundle, load_folder
from ..lora import TRANSFORMER_FILE, VAE_FILE, Lora, load_lora
from ..prompt import TOKENS_FILE, PromptEmbeds, load_prompt


def add_source_arguments(parser: argparse.ArgumentParser, default_model: str | None) -> None:
    """``--model`` and the official folders."""
    parser.add_argument(
        "--model",
        default=default_model,
        required=default_model is None,
        metavar="builtin|BUNDLE|FOLDER",
        help="the built-in model, a bundle (.safetensors) or an SD3 folder in diffusers' layout",
    )
    parser.add_argument(
        "--lora-dir", type=Path, metavar="DIR", help=f"folder with {TRANSFORMER_FILE} and {VAE_FILE}, or a LoRA bundle"
    )
    parser.add_argument(
        "--embedding-dir", type=Path, metavar="DIR", help="folder with prompt_embeds.pt and pool_embeds.pt, or a file"
    )
    parser.add_argument("--lora-strength", type=float, default=1.0, help="strength of the transformer's LoRA")
    parser.add_argument("--vae-lora-strength", type=float, default=1.0, help="strength of the VAE encoder's LoRA")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--dtype`` and ``--device``."""
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="number type of the model")
    parser.add_argument("--device", default="auto", metavar="|".join(DEVICES), help="where to run; cuda:1 works too")


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    """``--memory``."""
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="what weights, maps and tiles may take of a GPU, if not all that is free",
    )


def memory_limit(options: argparse.Namespace, device: torch.device) -> int | None:
    """Bytes that ``--memory`` allows on ``device``.

    Raises:
        ValueError: where it is no amount of memory, or the device has none of its own.
    """
    if options.memory is None:
        return None
    if not (math.isfinite(options.memory) and options.memory > 0):
        raise ValueError(f"--memory {options.memory:g}: expected a number of GB above 0, such as 8")
    if device.type == "cpu":
        raise ValueError(f"--memory {options.memory:g}: goes with a GPU; on the CPU leave it out")
    return int(options.memory * 1e9)


def limit_memory(model: DiffusersModel, limit: int | None, beside: int = 0) -> None:
    """Hold ``model`` to ``limit`` bytes of its device.

    Args:
        beside: bytes on the device that are another model's and do not count.

    Raises:
        ValueError: where the weights leave nothing for pictures.
    """
    if limit is None:
        return
    if limit <= (held := held_memory(model.device) - beside):
        raise ValueError(
            f"--memory {limit / 1e9:g}: the weights alone take {held / 1e9:.1f} GB; give more, or take "
            "--dtype fp16 or a folded bundle"
        )
    model.memory_limit = limit + beside


def load_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> DiffusersModel:
    """The model that the options name.

    Raises:
        ValueError: where it is missing, damaged or does not fit, saying which option to change.
    """
    path = Path(options.model)
    check_strengths(options)
    if options.model == "builtin" or path.is_file():
        if options.lora_dir or options.embedding_dir or has_strengths(options):
            raise ValueError(
                f"--lora-dir, --embedding-dir and LoRA strengths go with an SD3 folder, not with --model {options.model}"
            )
        return load_builtin(device, dtype) if options.model == "builtin" else load_bundle(read_bundle(path), device, dtype)
    if not path.is_dir():
        raise ValueError(f"--model {options.model}: expected builtin, a bundle file or an SD3 folder; there is none")
    if options.lora_dir is None:
        raise ValueError("--model with an SD3 folder needs --lora-dir: the base model alone does not restore")
    loras, prompt = load_official(options.lora_dir, options.embedding_dir)
    return load_folder(path, loras, prompt, device, dtype, options.lora_strength, options.vae_lora_strength)


def check_strengths(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` for a LoRA strength that is no finite number."""
    for name, value in (("--lora-strength", options.lora_strength), ("--vae-lora-strength", options.vae_lora_strength)):
        if not math.isfinite(value):
            raise ValueError(f"{name} {value}: expected a finite number, such as 1")


def has_strengths(options: argparse.Namespace) -> bool:
    """Whether a LoRA strength other than 1 was asked for."""
    return options.lora_strength != 1 or options.vae_lora_strength != 1


def load_official(lora_dir: Path, embedding_dir: Path | None) -> tuple[tuple[Lora, Lora], PromptEmbeds]:
    """The two LoRAs and the embeddings from the official folders, or from a LoRA bundle.

    Raises:
        ValueError: as ``load_model``.
    """
    if lora_dir.is_file():
        if not is_bundle(lora_dir):
            raise ValueError(f"--lora-dir {lora_dir}: expected the folder with {TRANSFORMER_FILE} and {VAE_FILE}, or a bundle")
        bundle = read_bundle(lora_dir)
        return bundle.loras(), bundle.prompt if embedding_dir is None else load_prompt(embedding_dir)
    if not lora_dir.is_dir():
        raise ValueError(f"--lora-dir {lora_dir}: there is no such folder")
    if embedding_dir is None:
        if not (lora_dir / TOKENS_FILE).is_file():
            raise ValueError(f"--embedding-dir is needed: {lora_dir} has no {TOKENS_FILE}")
        embedding_dir = lora_dir
    loras = load_lora(lora_dir / TRANSFORMER_FILE, "transformer"), load_lora(lora_dir / VAE_FILE, "vae")
    return loras, load_prompt(embedding_dir)
