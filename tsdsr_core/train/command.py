"""train a one-step restorer, or prepare, export and check what that takes

``tsdsr train CONFIG.toml`` runs one stage; under ``accelerate launch`` the processes share the batches out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..bundle import bundle_path
from ..colour import WAVELET_LEVELS
from ..device import choose_device
from . import prepare
from .batch import Batch
from .build import Sources, build_networks
from .checkpoint import FILE, Checkpoint, read_checkpoint
from .config import Config, differences, from_dict, read_config
from .data import Folder, Mixture, Pairs
from .degradations import PRESETS
from .dry_run import Estimate, estimate
from .evaluation import SIDE, make_evaluation_set
from .export import export
from .loader import batch_numbers, loader
from .loop import Loop
from .perceptual import check_distance
from .sources import colour_pictures
from .trainers import PretrainTrainer, StudentTrainer, TeacherTrainer, Trainer
from .validation import Pair, load_pairs, references, validate

log = logging.getLogger(__name__)

TRAINERS = {"pretrain": PretrainTrainer, "teacher": TeacherTrainer, "student": StudentTrainer}
"""By stage."""
_SUBCOMMANDS = ("prepare", "evalset", "export")
_TRAIN_ADVICE = (
    "try a smaller run.batch, with run.accumulate, or data.crop, run.precision=bf16 or model.gradient_checkpointing=true; "
    "--dry-run counts what a step of SD3 medium takes"
)
_ADVICE = {"prepare": "try a smaller --crop, or --device cpu", "evalset": "try smaller photographs", "export": "close programs"}
"""Where memory runs out, of the subcommands."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr train``."""
    parser.add_argument("what", metavar="CONFIG.toml | prepare | evalset | export", help="a run, or a help around runs")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="their options; add --help")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr train``; returns the exit code."""
    logging.getLogger("tsdsr_core").setLevel(logging.INFO)
    if os.environ.get("RANK", "0") != "0":  # what every process would say alike, the first says
        for module in (__name__, colour_pictures.__module__):
            logging.getLogger(module).setLevel(logging.ERROR)
    options.advice = _ADVICE.get(options.what, _TRAIN_ADVICE)
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
    parser.add_argument("--base", type=bundle_path, help="small models: a bundle, or builtin; with adapters: an SD3 folder")
    parser.add_argument("--teacher", type=bundle_path, help="what stage teacher exported: a bundle, or a LoRA")
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
    checkpoint = _checkpoint(config, options)
    if config.stage == "student":
        check_distance(config.objective.perceptual)
    source = _source(config, options.photos)
    pairs = _validation(config, options.validation)
    accelerator = _accelerator(config, options)
    sources = Sources(options.base, options.teacher, options.embedding_dir, options.null)
    networks = build_networks(config, sources, accelerator.device)
    networks.autocast = lambda: accelerator.autocast()
    trainer: Trainer = TRAINERS[config.stage](networks, config)
    loop = Loop(trainer, config, accelerator, options.out)
    if checkpoint is not None:
        loop.resume(checkpoint)
    prompt = {"tokens": networks.prompt.tokens.cpu(), "pooled": networks.prompt.pooled.cpu()}
    source.check_model(networks.autoencoder, {name: tensor.shape[1:] for name, tensor in prompt.items()})

    def check(restore: Any, step: int) -> Any:
        return validate(
            pairs, restore, config.wavelet_levels or WAVELET_LEVELS, accelerator.device,
            lambda name, picture: _show(accelerator, name, picture, step),
        )  # fmt: skip

    options.out.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("tsdsr")
    if accelerator.is_main_process and pairs:
        accelerator.log({f"validation/reference/{name}": value for name, value in references(pairs).items()}, loop.step)
    loop.run(_batches(config, source, accelerator, loop.seen), prompt, check)
    accelerator.end_training()


def _validation(config: Config, folder: Path | None) -> list[Pair]:
    """What the run is judged by; nothing without a folder."""
    if folder is None:
        return []
    if config.stage == "teacher":
        raise ValueError("--validation: stage 'teacher' restores nothing that could be judged; leave it out")
    return load_pairs(folder)


def _checkpoint(config: Config, options: argparse.Namespace) -> Checkpoint | None:
    """What the run goes on from."""
    path = options.out / FILE
    if not options.resume:
        if path.exists():
            raise ValueError(f"{path} exists: go on with --resume, or choose another --out")
        return None
    checkpoint = read_checkpoint(path)
    changed = differences(checkpoint.config, config)
    if changed:
        log.warning("going on with other settings than before: %s", "; ".join(changed))
    return checkpoint


def _accelerator(config: Config, options: argparse.Namespace) -> Accelerator:
    precision = {"fp32": "no", "bf16": "bf16"}[config.run.precision]
    device = choose_device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, log_with="tensorboard", project_dir=options.out)


def _source(config: Config, photos: list[str]) -> Pairs:
    """The training pictures of a stage."""
    data = config.data
    presets = () if config.stage == "teacher" else tuple(data.presets.items())  # a teacher sees good pictures alone
    mixture = Mixture(
        data.crop, data.scale, presets, data.synthetic_share, data.candidates, data.contrast, data.permute_channels
    )
    folders, latents = [_folder(text) for text in photos], config.stage != "pretrain"
    return Pairs(folders, mixture, config.run.seed, captions=data.captions, latents=latents)


def _batches(config: Config, source: Pairs, accelerator: Accelerator, start: int) -> Iterator[Batch]:
    """This process's batches from sample number ``start`` on."""
    run = config.run
    place = run.batch, start, accelerator.process_index, accelerator.num_processes
    for numbers, sample in zip(batch_numbers(*place), loader(source, *place, config.data.workers), strict=True):
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
        if not isinstance(target, dict):
            raise ValueError(f"--set {change}: {tables[0]} is no table")
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
    parser.add_argument("--base", type=bundle_path, help="small models: what the run began with, or builtin")
    parser.add_argument("--license", default="Apache-2.0", help="to note in a bundle")
    parser.add_argument("--existing", choices=("error", "overwrite"), default="error", help="where there are such files")


def _export(options: argparse.Namespace) -> None:
    notes = {"license": options.license}
    export(read_checkpoint(options.checkpoint), options.output, options.base, notes, options.existing)
    print(options.output)


def _evalset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, help=f"folder of photographs of at least {SIDE}x{SIDE} pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder for hq/ and lq-PRESET/")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["light", "medium"])


def _evalset(options: argparse.Namespace) -> None:
    make_evaluation_set(options.photos, options.out, options.presets)
