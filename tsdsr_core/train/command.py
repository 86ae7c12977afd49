"""train a one-step restorer, or prepare, export and check what that takes

``tsdsr train CONFIG.toml`` runs one stage; under ``accelerate launch`` the processes share the batches out.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..device import choose_device
from . import prepare
from .batch import Batch
from .build import Sources, build_networks
from .checkpoint import FILE, read_checkpoint
from .config import Config, from_dict, read_config
from .data import Folder, Mixture, Pairs, batch_numbers, loader
from .degradations import PRESETS
from .dry_run import Estimate, estimate
from .evaluation import SIDE, make_evaluation_set
from .export import export
from .loop import Loop
from .trainers import PretrainTrainer, StudentTrainer, TeacherTrainer, Trainer
from .validation import load_pairs, validate

TRAINERS = {"pretrain": PretrainTrainer, "teacher": TeacherTrainer, "student": StudentTrainer}
"""By stage."""
_SUBCOMMANDS = ("prepare", "evalset", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr train``."""
    parser.add_argument("what", metavar="CONFIG.toml | prepare | evalset | export", help="a run, or a help around runs")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="their options; add --help")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr train``; returns the exit code."""
    logging.getLogger("tsdsr_core").setLevel(logging.INFO)
    name = options.what if options.what in _SUBCOMMANDS else "CONFIG.toml"
    parser = argparse.ArgumentParser(prog=f"tsdsr train {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if name == "prepare":
        prepare.add_arguments(parser)
        return prepare.run(parser.parse_args(options.rest))
    adders = {"evalset": _evalset_arguments, "export": _export_arguments, "CONFIG.toml": _run_arguments}
    actions = {"evalset": _evalset, "export": _export, "CONFIG.toml": _train}
    adders[name](parser)
    chosen = parser.parse_args(options.rest)
    chosen.config = Path(options.what)
    actions[name](chosen)
    return 0


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", nargs="+", metavar="DIR[=WEIGHT]", help="pictures, or prepared folders")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE} and the logs")
    parser.add_argument("--base", type=Path, help="small models: a bundle, or builtin; with adapters: an SD3 folder")
    parser.add_argument("--teacher", type=Path, help="what stage teacher exported: a bundle, or a LoRA")
    parser.add_argument("--embedding-dir", type=Path, help="with adapters: the fixed prompt's embeddings, a folder or file")
    parser.add_argument("--null", type=Path, help="with adapters: the empty prompt's embeddings")
    parser.add_argument("--validation", type=Path, help="evaluation set, as tsdsr train evalset makes it")
    parser.add_argument("--resume", action="store_true", help=f"go on from OUT/{FILE}")
    parser.add_argument("--set", nargs="+", default=[], metavar="TABLE.KEY=VALUE", help="change the configuration")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dry-run", action="store_true", help="count memory and operations of a step of SD3 medium, and stop")


def _train(options: argparse.Namespace) -> None:
    config = override(read_config(options.config), options.set)
    if options.dry_run:
        _print_estimate(estimate(config))
        return
    if options.photos is None or options.out is None:
        raise ValueError("--photos and --out are needed for a run")
    checkpoint_path = options.out / FILE
    checkpoint = read_checkpoint(checkpoint_path) if options.resume else None
    if checkpoint is None and checkpoint_path.exists():
        raise ValueError(f"{checkpoint_path} exists: go on with --resume, or choose another --out")
    accelerator = _accelerator(config, options)
    sources = Sources(options.base, options.teacher, options.embedding_dir, options.null)
    networks = build_networks(config, sources, accelerator.device)
    networks.autocast = lambda: accelerator.autocast()
    trainer: Trainer = TRAINERS[config.stage](networks, config)
    loop = Loop(trainer, config, accelerator, options.out)
    if checkpoint is not None:
        loop.resume(checkpoint)
    pairs = load_pairs(options.validation) if options.validation else []
    levels = config.pretrain.wavelet_levels if config.stage == "pretrain" else config.objective.wavelet_levels

    def check(restore: Any, step: int) -> Any:
        return validate(
            pairs, restore, levels, accelerator.device, lambda name, picture: _show(accelerator, name, picture, step)
        )

    accelerator.init_trackers("tsdsr")
    prompt = {"tokens": networks.prompt.tokens.cpu(), "pooled": networks.prompt.pooled.cpu()}
    loop.run(_batches(config, options.photos, accelerator, loop), prompt, check)
    accelerator.end_training()


def _accelerator(config: Config, options: argparse.Namespace) -> Accelerator:
    options.out.mkdir(parents=True, exist_ok=True)
    precision = {"fp32": "no", "bf16": "bf16"}[config.run.precision]
    cpu = choose_device(options.device).type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=precision, log_with="tensorboard", project_dir=options.out)


def _batches(config: Config, photos: list[str], accelerator: Accelerator, loop: Loop) -> Any:
    """This process's batches from the loop's step on."""
    data, run = config.data, config.run
    presets = () if config.stage == "teacher" else tuple(data.presets.items())  # a teacher sees good pictures alone
    mixture = Mixture(data.crop, data.scale, presets, data.synthetic_share)
    source = Pairs([_folder(text) for text in photos], mixture, run.seed, captions=data.captions)
    place = run.batch, loop.step * loop.samples, accelerator.process_index, accelerator.num_processes
    for numbers, sample in zip(batch_numbers(*place), loader(source, *place, data.workers), strict=True):
        yield Batch.of(sample, numbers, run.seed, accelerator.device)


def _folder(text: str) -> Folder:
    """``DIR`` or ``DIR=WEIGHT``."""
    path, separator, weight = text.rpartition("=")
    if not separator or Path(text).exists():
        return Path(text)
    try:
        return Path(path), float(weight)
    except ValueError as error:
        raise ValueError(f"--photos {text}: expected DIR or DIR=WEIGHT, the weight a number") from error


def override(config: Config, changes: list[str]) -> Config:
    """``config`` with ``TABLE.KEY=VALUE`` texts applied; values as JSON, or words.

    Raises:
        ValueError: for another form, and as ``from_dict``.
    """
    values = asdict(config)
    for change in changes:
        name, separator, text = change.partition("=")
        *tables, key = name.split(".")
        if not separator or len(tables) > 1:
            raise ValueError(f"--set {change}: expected TABLE.KEY=VALUE, such as run.steps=1000")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        target = values.setdefault(tables[0], {}) if tables else values
        target[key] = value
    return from_dict(values)


def _show(accelerator: Accelerator, name: str, picture: Tensor, step: int) -> None:
    tracker: Any = accelerator.get_tracker("tensorboard")
    tracker.log_images({name: picture[None].numpy()}, step, dataformats="NCHW")


def _print_estimate(found: Estimate) -> None:
    rows = {
        "weights": found.weights, "optimiser, gradients, average": found.optimiser, "activations": found.activations,
        "all together": found.peak,
    }  # fmt: skip
    for name, size in rows.items():
        print(f"{name:30} {size / 1e9:8.2f} GB")
    print(f"{'trained parameters':30} {found.trained / 1e6:8.1f} M")
    print(f"{'operations of a step':30} {found.flops / 1e12:8.1f} TFLOP")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the LoRA pair, or a .safetensors bundle")
    parser.add_argument("--base", type=Path, help="small models: what the run began with")
    parser.add_argument("--license", default="Apache-2.0", help="to note in a bundle")


def _export(options: argparse.Namespace) -> None:
    export(read_checkpoint(options.checkpoint), options.output, options.base, {"license": options.license})
    print(options.output)


def _evalset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, help=f"folder of photographs of at least {SIDE}x{SIDE} pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder for hq/ and lq-PRESET/")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["light", "medium"])


def _evalset(options: argparse.Namespace) -> None:
    make_evaluation_set(options.photos, options.out, options.presets)
