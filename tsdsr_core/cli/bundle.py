"""Make a bundle: one file with LoRAs and prompt embeddings, or with a whole model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..errors import InputError
from ..families.bundle import Bundle, write_bundle
from ..families.load import load_loras_and_prompt, merged_bundle
from ..images.jobs import check_existing
from ..system.atomic import check_target
from ..system.device import DTYPES
from .arguments import add_source_arguments, has_strengths, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr bundle``."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--merge", action="store_true", help="store the whole model with merged LoRAs; needs --model")
    parser.add_argument("--fold", action="store_true", help="with --merge: a third smaller, for this prompt only")
    quantised = parser.add_mutually_exclusive_group()
    quantised.add_argument(
        "--eight-bit", dest="quantised", action="store_const", const="float8",
        help="with --merge: store the transformer's matrices in 8 bits, as float8_e4m3fn",
    )  # fmt: skip
    quantised.add_argument(
        "--int8", dest="quantised", action="store_const", const="int8",
        help="with --merge: store them as rotated int8; ComfyUI 0.27 and newer computes in int8 on GPUs that support it",
    )  # fmt: skip
    add_source_arguments(parser, default_model="")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="number type to store; a merged VAE is never bf16")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="text to store, such as license=...")
    parser.add_argument("--existing", choices=("error", "overwrite"), default="error", help="what to do if OUT exists")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr bundle``; returns the exit code."""
    if options.output.suffix != ".safetensors":
        raise InputError(f"-o {options.output}: expected a name that ends in .safetensors")
    check_existing([options.output], options.existing)
    check_target(options.output)
    dtype = DTYPES[options.dtype]
    notes = _notes(options.note)
    if options.fold and not options.merge:
        raise InputError("--fold needs --merge: LoRAs must be merged before folding")
    if options.quantised and not options.merge:
        name = "--int8" if options.quantised == "int8" else "--eight-bit"
        raise InputError(f"{name} needs --merge: LoRAs must be merged before rounding to 8 bits")
    bundle = _merged(options, dtype, notes) if options.merge else _loras(options, dtype, notes)
    write_bundle(options.output, bundle)
    print(f"{options.output}  {bundle.kind} bundle, {options.output.stat().st_size / 1e6:.1f} MB")
    return 0


def _merged(options: argparse.Namespace, dtype: torch.dtype, notes: dict[str, str]) -> Bundle:
    if not options.model:
        raise InputError("--merge needs --model: the model folder to merge the LoRAs into")
    if not Path(options.model).is_dir() and not (options.fold or options.quantised):
        raise InputError(f"--model {options.model}: expected a model folder; the built-in model and bundles are merged already")
    model = load_model(options, torch.device("cpu"), torch.float32)
    if options.fold:
        family = model.family
        if family.fold is None:
            raise InputError(f"--fold: {family.title} has nothing to fold")
        if family.is_folded(model.transformer):
            raise InputError(f"--model {options.model} is folded already")
        family.fold(model.transformer, model.prompt.pooled)
    notes = {**model.notes, **notes}
    return merged_bundle(
        model.transformer, model.vae, model.prompt, dtype, model.defaults, notes, options.quantised, model.preview
    )  # fmt: skip


def _loras(options: argparse.Namespace, dtype: torch.dtype, notes: dict[str, str]) -> Bundle:
    if options.model or options.lora_dir is None:
        raise InputError("expected --lora-dir, or --model with --merge for a self-contained bundle")
    if has_strengths(options):
        raise InputError("LoRA strengths need --merge; for a LoRA bundle, choose them when it is used")
    loras, prompt = load_loras_and_prompt(options.lora_dir, options.embedding_dir)
    tensors = [{key: t if key.endswith(".alpha") else t.to(dtype) for key, t in lora.state_dict().items()} for lora in loras]
    return Bundle("lora", prompt.to("cpu", dtype), tensors[0], tensors[1], notes=notes)


def _notes(entries: list[str]) -> dict[str, str]:
    notes = {}
    for entry in entries:
        key, separator, text = entry.partition("=")
        if not separator or not key:
            raise InputError(f"--note {entry!r}: expected KEY=TEXT")
        if key in notes:
            raise InputError(f"--note {entry!r}: {key} is given twice")
        notes[key] = text
    return notes
