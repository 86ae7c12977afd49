"""Train a one-step restorer: prepare data, run the stages, export the result.

"tsdsr train CONFIG.toml" runs one stage of training. With "accelerate launch", the batches are distributed over the processes.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..colour import WAVELET_LEVELS
from ..errors import InputError
from ..families.bundle import bundle_path
from ..system.atomic import check_target
from ..system.device import choose_device
from ..train.checkpoint import FILE, Checkpoint, read_checkpoint
from ..train.config import Config, differences
from ..train.config_file import from_dict, read_config
from ..train.data.batch import Batch
from ..train.data.dataset import Folder, Mixture, Pairs
from ..train.data.degradations import PRESET_NAMES
from ..train.data.loader import batch_numbers, loader
from ..train.data.photos import find_colour_images
from ..train.dry_run import Estimate, estimate
from ..train.evaluation_set import SIDE, make_evaluation_set
from ..train.export import export
from ..train.logs import NAME as LOGS
from ..train.logs import without_thread_traces, writing_logs
from ..train.loop import Loop
from ..train.networks.build import Sources, build_networks
from ..train.networks.roles import Networks
from ..train.objectives.perceptual import check_distance
from ..train.trainers import PretrainTrainer, StudentTrainer, TeacherTrainer, Trainer
from ..train.validation import Pair, load_pairs, references, validate
from ..weights.reading import parse_json
from . import prepare
from .help import HelpFormatter

log = logging.getLogger(__name__)

_ADVICE = {
    "run": (
        "try a smaller run.batch with a larger run.accumulate, a smaller data.crop, run.precision=bf16 or "
        "model.gradient_checkpointing=true; --dry-run counts the memory of a step of SD3 medium"
    ),
    "prepare": "try a smaller --crop, or --device cpu", "evalset": "try smaller photographs", "export": "close programs",
}  # fmt: skip
"""Advice for each subcommand when memory runs out."""


def with_subcommand(arguments: list[str]) -> list[str]:
    """Insert the subcommand ``run`` into the arguments of ``tsdsr train`` if they start with a configuration instead."""
    known = {*_SUBCOMMANDS, "-h", "--help"}
    return arguments if arguments[:1] and arguments[0] in known else ["run", *arguments]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr train``."""
    parser.usage = "tsdsr train CONFIG.toml ... | prepare ... | evalset ... | export ..."
    subparsers = parser.add_subparsers(required=True, metavar="SUBCOMMAND", prog="tsdsr train")
    for name, (summary, add, act) in _SUBCOMMANDS.items():
        sub = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=HelpFormatter
        )
        add(sub)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
        sub.set_defaults(subcommand=act, advice=_ADVICE[name])


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr train``; returns the exit code."""
    logging.getLogger("tsdsr_core").setLevel(logging.INFO)
    if os.environ.get("RANK", "0") != "0":  # messages that are the same in all processes come from the first one
        for module in (__name__, find_colour_images.__module__):
            logging.getLogger(module).setLevel(logging.ERROR)
    return options.subcommand(options) or 0


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="configuration of the run")
    parser.add_argument(
        "--photos", nargs="+", metavar="DIR[=WEIGHT]", help="folders of images or prepared folders, with relative weights"
    )
    parser.add_argument("-o", "--out", type=Path, help=f"folder for {FILE} and the logs")
    parser.add_argument("--base", type=bundle_path, help="small models: a bundle, or builtin; with adapters: an SD3 folder")
    parser.add_argument("--teacher", type=bundle_path, help="export of stage teacher: a bundle, or a LoRA")
    parser.add_argument("--embedding-dir", type=Path, help="with adapters: embeddings of the fixed prompt, a folder or file")
    parser.add_argument("--null", type=Path, help="with adapters: embeddings of the empty prompt")
    parser.add_argument(
        "--perceptual-weights", type=Path, metavar="FILE", help="weights of LPIPS and DISTS, to train without pyiqa"
    )
    parser.add_argument("--validation", type=Path, help="evaluation set made by tsdsr train evalset")
    parser.add_argument("--resume", action="store_true", help=f"continue from OUT/{FILE}")
    parser.add_argument("--set", nargs="+", default=[], metavar="TABLE.KEY=VALUE", help="change settings of the configuration")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dry-run", action="store_true", help="count memory and operations of a step of SD3 medium, and stop")


def _train(options: argparse.Namespace) -> None:
    config = override(read_config(options.config), options.set)
    if options.dry_run:
        _print_estimate(estimate(config))
        return
    if options.photos is None or options.out is None:
        raise InputError("--photos and --out are needed for training")
    checkpoint = _checkpoint(config, options)
    if config.perceptual:
        check_distance(config.perceptual, options.perceptual_weights)
    source = _source(config, options.photos)
    pairs = _validation(config, options.validation)
    accelerator = _accelerator(config, options)
    sources = Sources(options.base, options.teacher, options.embedding_dir, options.null)
    networks = build_networks(config, sources, accelerator.device)
    networks.check_side("data.crop", config.data.crop)
    networks.check_side("longest side of --validation", max((max(pair.high.shape) for pair in pairs), default=0))
    networks.autocast = lambda: accelerator.autocast()
    trainer = _trainer(config, networks, options.perceptual_weights)
    loop = Loop(trainer, config, accelerator, options.out)
    if checkpoint is not None:
        loop.resume(checkpoint)
    prompt = {"tokens": networks.prompt.tokens.cpu(), "pooled": networks.prompt.pooled.cpu()}
    source.check_model(networks.autoencoder, {name: tensor.shape[1:] for name, tensor in prompt.items()})

    def check(restore: Any, step: int) -> Any:
        return validate(
            pairs, restore, config.wavelet_levels or WAVELET_LEVELS, accelerator.device,
            lambda name, image: _log_image(accelerator, options.out, name, image, step),
        )  # fmt: skip

    options.out.mkdir(parents=True, exist_ok=True)
    with without_thread_traces():
        with writing_logs(options.out):
            accelerator.init_trackers(LOGS)
        if accelerator.is_main_process and pairs:
            loop.log({f"validation/reference/{name}": value for name, value in references(pairs).items()})
        loop.run(_batches(config, source, accelerator, loop.seen), prompt, check)
        with writing_logs(options.out):
            accelerator.end_training()


def _validation(config: Config, folder: Path | None) -> list[Pair]:
    """The evaluation set to validate with; empty without a folder."""
    if folder is None:
        return []
    if config.stage == "teacher":
        raise InputError("--validation does not apply to stage 'teacher', which restores no images: omit it")
    return load_pairs(folder)


def _checkpoint(config: Config, options: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint to resume from; None for a new run."""
    path = options.out / FILE
    for file in (path, options.out / LOGS / "events"):
        check_target(file)
    if not options.resume:
        if path.exists():
            raise InputError(f"{path} exists: continue it with --resume, or choose another --out")
        return None
    checkpoint = read_checkpoint(path)
    changed = differences(checkpoint.config, config)
    if changed:
        log.warning("continuing with other settings than before: %s", "; ".join(changed))
    return checkpoint


def _accelerator(config: Config, options: argparse.Namespace) -> Accelerator:
    precision = {"fp32": "no", "bf16": "bf16"}[config.run.precision]
    device = choose_device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate uses the current device
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, log_with="tensorboard", project_dir=options.out)


def _trainer(config: Config, networks: Networks, perceptual_weights: Path | None) -> Trainer:
    if config.stage == "teacher":
        return TeacherTrainer(networks, config)
    kind = PretrainTrainer if config.stage == "pretrain" else StudentTrainer
    return kind(networks, config, perceptual_weights)


def _source(config: Config, photos: list[str]) -> Pairs:
    """The training images of a stage."""
    data = config.data
    presets = () if config.stage == "teacher" else tuple(data.presets.items())  # a teacher is trained on good images only
    mixture = Mixture(
        data.crop,
        data.scale,
        presets,
        data.synthetic_share,
        data.candidates,
        data.contrast,
        data.permute_channels,
        data.smaller_scales,
    )
    folders, latents = [_folder(text) for text in photos], config.stage != "pretrain"
    return Pairs(folders, mixture, config.run.seed, captions=data.captions, latents=latents)


def _batches(config: Config, source: Pairs, accelerator: Accelerator, start: int) -> Iterator[Batch]:
    """The batches of this process, from sample number ``start``."""
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
        raise InputError(f"--photos {text}: expected DIR or DIR=WEIGHT with a number as weight") from error


def override(config: Config, changes: list[str]) -> Config:
    """Apply changes of the form ``TABLE.KEY=VALUE`` to ``config``; values are JSON, or plain words.

    Raises:
        InputError: for another form, and as ``from_dict``.

    >>> override(Config(), ["run.steps=10", "objective.name=vsd"]).run.steps
    10
    """
    values = asdict(config)
    for change in changes:
        name, separator, text = change.partition("=")
        *tables, key = name.split(".")
        if not separator or len(tables) > 1:
            raise InputError(f"--set {change}: expected TABLE.KEY=VALUE, such as run.steps=1000")
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        target = values.setdefault(tables[0], {}) if tables else values
        if not isinstance(target, dict):
            raise InputError(f"--set {change}: {tables[0]} is not a table")
        target[key] = value
    return from_dict(values)


def _log_image(accelerator: Accelerator, out: Path, name: str, image: Tensor, step: int) -> None:
    tracker: Any = accelerator.get_tracker("tensorboard")
    with writing_logs(out):
        tracker.log_images({name: image[None].numpy()}, step, dataformats="NCHW")


def _print_estimate(found: Estimate) -> None:
    rows = {
        "weights": found.weights, "optimiser, gradients, average": found.optimiser, "activations": found.activations,
        "total": found.peak,
    }  # fmt: skip
    for name, size in rows.items():
        print(f"{name:30} {size / 1e9:8.2f} GB")
    print(f"{'trained parameters':30} {found.trained / 1e6:8.1f} M")
    print(f"{'operations per step':30} {found.flops / 1e12:8.1f} TFLOP")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=f"{FILE} of a run")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the LoRA pair, or a .safetensors bundle")
    parser.add_argument("--base", type=bundle_path, help="small models: what the run started with, a bundle or builtin")
    parser.add_argument("--license", default="Apache-2.0", help="licence to note in a bundle")
    parser.add_argument("--existing", choices=("error", "overwrite"), default="error", help="what to do if files exist")


def _export(options: argparse.Namespace) -> None:
    notes = {"license": options.license}
    export(read_checkpoint(options.checkpoint), options.output, options.base, notes, options.existing)
    print(options.output)


def _evalset_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, help=f"folder of photographs of at least {SIDE}x{SIDE} pixels")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for hq/ and lq-PRESET/")
    parser.add_argument(
        "--presets", nargs="+", choices=PRESET_NAMES, default=["light", "medium"], metavar="PRESET",
        help=f"degradations to apply: {', '.join(PRESET_NAMES)}",
    )  # fmt: skip


def _evalset(options: argparse.Namespace) -> int:
    failed = make_evaluation_set(options.photos, options.out, options.presets)
    for error in failed:
        log.warning("left out: %s", error)
    return int(bool(failed))


_SUBCOMMANDS = {
    "run": ("run one stage of training; the word 'run' may be omitted", _run_arguments, _train),
    "prepare": ("encode photographs and captions once, to train faster", prepare.add_arguments, prepare.run),
    "evalset": ("make an evaluation set of good images and their degraded versions", _evalset_arguments, _evalset),
    "export": ("make a bundle or LoRA files from a checkpoint", _export_arguments, _export),
}
"""Summary, options and action of each subcommand."""
