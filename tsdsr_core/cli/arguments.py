"""Options that choose a model, device and memory limit, shared by the subcommands; loads the model they name."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..families.bundle_header import read_description
from ..families.folder import folder_family
from ..families.load import load
from ..system.atomic import no_file
from ..system.device import DEVICES, DTYPES, held_memory
from ..system.imports import hidden, without_compiler
from ..weights.lora import TRANSFORMER_FILE, VAE_FILE

if TYPE_CHECKING:
    from ..families.restorer import Restorer

_UNUSED = ("accelerate", "peft", "scipy", "transformers", "torch.distributed.fsdp")
"""What diffusers takes if it is there, and no bundle needs: seconds of each start."""


def add_source_arguments(parser: argparse.ArgumentParser, default_model: str | None) -> None:
    """Add ``--model`` and the options for the official LoRAs and embeddings."""
    parser.add_argument(
        "--model",
        default=default_model,
        required=default_model is None,
        metavar="builtin|BUNDLE|FOLDER",
        help="the built-in model, a bundle (.safetensors) or a model folder in diffusers' layout",
    )
    parser.add_argument(
        "--lora-dir",
        type=Path,
        metavar="DIR",
        help=f"with a model folder: folder with {TRANSFORMER_FILE} and {VAE_FILE}, or a LoRA bundle",
    )
    parser.add_argument(
        "--embedding-dir",
        type=Path,
        metavar="DIR",
        help="with a model folder: folder with prompt_embeds.pt and pool_embeds.pt, or a single file",
    )
    parser.add_argument(
        "--vae", type=Path, metavar="DIR", help="with a model folder: folder of another autoencoder of the same family"
    )
    parser.add_argument("--lora-strength", type=float, default=1.0, help="strength of the transformer's LoRA")
    parser.add_argument("--vae-lora-strength", type=float, default=1.0, help="strength of the VAE encoder's LoRA")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype`` and ``--device``."""
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="number type of the model; auto: fp16 on a GPU, else fp32"
    )
    parser.add_argument(
        "--device", default="auto", metavar="|".join(DEVICES), help="device to run on, also one of several such as cuda:1"
    )


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--memory``."""
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="GPU memory to plan for, weights included (default: all that is free)",
    )


def memory_limit(options: argparse.Namespace, device: torch.device) -> int | None:
    """The limit given by ``--memory`` in bytes; None without the option.

    Raises:
        InputError: for an invalid number, or if the device is the CPU.
    """
    if options.memory is None:
        return None
    if not (math.isfinite(options.memory) and options.memory > 0):
        raise InputError(f"--memory {options.memory:g}: expected a number of GB above 0, such as 8")
    if device.type == "cpu":
        raise InputError(f"--memory {options.memory:g} applies to GPUs only: omit it on the CPU")
    return int(options.memory * 1e9)


def limit_memory(model: Restorer, limit: int | None, beside: int = 0) -> None:
    """Limit ``model`` to ``limit`` bytes of its device.

    Args:
        beside: bytes on the device that belong to another model and do not count.

    Raises:
        InputError: if the weights alone exceed the limit.
    """
    if limit is None:
        return
    if limit <= (held := held_memory(model.device) - beside):
        raise InputError(
            f"--memory {limit / 1e9:g}: the weights alone take {held / 1e9:.1f} GB; allow more, or use "
            "--dtype fp16 or a folded bundle"
        )
    model.memory_limit = limit + beside


def load_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Restorer:
    """Load the model that the options name.

    Raises:
        InputError: if it is missing, damaged or does not fit, with the option to change.
    """
    check_strengths(options)
    path = Path(options.model)
    if options.model == "builtin" or path.is_file():
        if options.model != "builtin":
            read_description(path, "merged")  # first says what the file is, before which options it takes
        if options.lora_dir or options.embedding_dir or options.vae or has_strengths(options):
            raise InputError(
                f"--lora-dir, --embedding-dir, --vae and LoRA strengths need a model folder as --model, not {options.model}"
            )
        with _quickly(options):
            return load(options.model, device=device, dtype=dtype)
    if not path.is_dir():
        raise InputError(f"--model {options.model} {no_file(path)}: expected builtin, a bundle file or a model folder")
    if options.lora_dir is None and not folder_family(path).base_restores:
        raise InputError(f"--model {options.model} needs --lora-dir: the base model alone cannot restore images")
    return load(
        path, device=device, dtype=dtype, loras=options.lora_dir, prompt=options.embedding_dir, vae=options.vae,
        lora_strength=options.lora_strength, vae_lora_strength=options.vae_lora_strength,
    )  # fmt: skip


@contextmanager
def _quickly(options: argparse.Namespace) -> Iterator[None]:
    """Hides what diffusers can do without, in a process that runs this command alone: a host of ours may need it later."""
    with ExitStack() as stack:
        if getattr(options, "alone", False) and "diffusers" not in sys.modules:
            stack.enter_context(hidden(*_UNUSED))
            if not getattr(options, "compile", False):
                stack.enter_context(without_compiler())
        yield


def check_strengths(options: argparse.Namespace) -> None:
    """Raise ``InputError`` for a LoRA strength that is not a finite number."""
    for name, value in (("--lora-strength", options.lora_strength), ("--vae-lora-strength", options.vae_lora_strength)):
        if not math.isfinite(value):
            raise InputError(f"{name} {value}: expected a finite number, such as 1")


def has_strengths(options: argparse.Namespace) -> bool:
    """Whether a LoRA strength other than 1 is given."""
    return options.lora_strength != 1 or options.vae_lora_strength != 1
