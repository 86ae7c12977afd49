"""Prepare a training set: crops of images with cached latents, degradations and text embeddings.

Running it again continues where it stopped: existing samples are kept, even if a caption has changed, and new images are
added.  Images too small for --crop, and grey ones, are left out.  With --captions, --null or --prompt, OUT also gets
null.safetensors, the embeddings of the empty prompt; with --prompt also prompt.safetensors.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import InputError
from ..families.bundle import bundle_path
from ..families.load import load_vae
from ..system.atomic import check_target
from ..system.device import DEVICES, DTYPES, choose_device
from ..train.data.degradations import PRESET_NAMES, degrade
from ..train.data.photos import find_colour_images, read_pixels
from ..train.data.prepared import (
    INDEX,
    NULL_FILE,
    PROMPT_FILE,
    SAMPLES,
    SURROUNDINGS,
    Settings,
    check_same,
    is_complete,
    read_index,
    write_index,
    write_sample,
)
from ..train.data.randomness import generator_for
from ..train.networks.roles import fingerprint
from ..train.networks.text import TextEncoder, read_captions
from ..weights.prompt import save_prompt

log = logging.getLogger(__name__)
_LONGEST_NAME = 235
"""Bytes, so that those of its samples have at most 255, also while they are written."""
_CANDIDATES = 32
"""Number of random positions tried for each crop; the one that overlaps least with the other crops is used."""


@dataclass(frozen=True)
class Task:
    """The crops to make of one image."""

    source: Path
    files: tuple[Path, ...]
    """Output file of each crop."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr train prepare``."""
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="folders of images, or quoted globs")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to create or to continue")
    parser.add_argument(
        "--base",
        type=bundle_path,
        required=True,
        metavar="FOLDER|BUNDLE",
        help="SD3 folder in diffusers' layout, model bundle, or builtin",
    )
    parser.add_argument("--crop", type=int, default=512, help="side of a crop in pixels")
    parser.add_argument("--crops", type=int, default=1, help="maximum number of crops per image; small images get fewer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops and degradations")
    parser.add_argument(
        "--degrade",
        choices=PRESET_NAMES,
        metavar="PRESET",
        help=f"cache degradations of this preset: {', '.join(PRESET_NAMES)} (default: they are made during training)",
    )
    parser.add_argument("--variants", type=int, default=1, help="cached degradations per crop")
    parser.add_argument("--scale", type=int, default=4, help="scale of the cached degradations")
    parser.add_argument("--captions", action="store_true", help="cache the embeddings of NAME.txt beside each image NAME")
    parser.add_argument("--caption-default", metavar="TEXT", help="caption of images without one")
    parser.add_argument("--null", action="store_true", help=f"write {NULL_FILE}; --captions and --prompt do so, too")
    parser.add_argument("--prompt", metavar="TEXT", help=f"write the embeddings of this text to {PROMPT_FILE}")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="number type of latents and embeddings")
    parser.add_argument(
        "--device", default="auto", metavar="|".join(DEVICES), help="device to run on, also one of several such as cuda:1"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read and degrade images in parallel")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr train prepare``; returns the exit code.

    Raises:
        InputError: for invalid options, inputs without usable images, missing captions, or an output folder made with other
            settings.
    """
    _check_options(options)
    check_target(options.output / SAMPLES / INDEX)
    check_target(options.output / INDEX)
    device = choose_device(options.device)
    vae: Any = load_vae(options.base) if options.inputs else None
    settings = _settings(options, vae)
    tasks = _plan(options.inputs, options.output, settings) if options.inputs else []
    captions = read_captions([task.source for task in tasks], options.caption_default) if options.captions else {}
    pending = [task for task in tasks if not all(is_complete(file, settings, task.source) for file in task.files)]
    text = TextEncoder(options.base, device) if _wants_text(options) else None
    if text is not None:
        _write_prompts(text, options.prompt, options.output, DTYPES[options.dtype])
    if not tasks:
        return 0
    encoders = Encoders(vae.to(device), text, captions, DTYPES[options.dtype])
    _make(tasks, pending, settings, encoders, options.workers)
    return 0 if _write_index(tasks, settings, options.output) == len(tasks) else 1


@dataclass(frozen=True)
class Encoders:
    """The base model's image and text encoders, and the captions to encode."""

    vae: Any
    """``AutoencoderKL``."""
    text: TextEncoder | None
    captions: Mapping[Path, str]
    """Captions by image; empty without ``--captions``."""
    dtype: torch.dtype
    """Type of the results."""

    @torch.inference_mode()
    def latent(self, high: Tensor) -> Tensor:
        """Encode uint8 ``(3, H, W)`` to the unscaled mode of the posterior ``(C, h, w)``, in fp32; the result is on the CPU."""
        pixels = high[None].to(self.vae.device).float() / 255 * 2 - 1
        return self.vae.encode(pixels).latent_dist.mode()[0].to("cpu", self.dtype)

    def caption(self, image: Path) -> dict[str, Tensor]:
        """``tokens`` ``(T, D)`` and ``pooled`` ``(P,)`` of an image's caption; empty without captions."""
        if self.text is None or not self.captions:
            return {}
        prompt = self.text.encode(self.captions[image]).to("cpu", self.dtype)
        return {"tokens": prompt.tokens[0], "pooled": prompt.pooled[0]}


class _Crops(Dataset[dict[str, Tensor] | str]):
    """The crops of each task, made by workers: uint8 tensors ``(crops, 3, ...)``, or an error message."""

    def __init__(self, tasks: Sequence[Task], settings: Settings) -> None:
        self.tasks = tasks
        self.settings = settings

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> dict[str, Tensor] | str:
        task = self.tasks[index]
        try:
            pixels = read_pixels(task.source)
        except InputError as error:
            return str(error)
        return make_crops(pixels, task.source.name, len(task.files), self.settings)


def make_crops(pixels: Tensor, name: str, count: int, settings: Settings) -> dict[str, Tensor]:
    """Random crops of an image, and their degradations.

    They are a function of the seed and the image's name, so that adding other images does not change them.

    Args:
        pixels: uint8 ``(3, H, W)``.

    Returns:
        ``high`` uint8 ``(count, 3, crop, crop)`` and ``low_0`` ... uint8 ``(count, 3, side, side)``, side as in ``prepared``.
    """
    margin, crop = _margin(settings), settings.crop
    generator = generator_for(settings.seed, 0, f"crops {name}")
    size = pixels.shape[1] - 2 * margin, pixels.shape[2] - 2 * margin
    wide = [
        pixels[:, top : top + crop + 2 * margin, left : left + crop + 2 * margin]
        for top, left in crop_positions(*size, crop, count, generator)
    ]
    inner = slice(margin, margin + crop)
    made = {"high": torch.stack([image[:, inner, inner] for image in wide])}
    for variant in range(settings.variants):
        generator = generator_for(settings.seed, variant, f"degradations {name}")
        made[f"low_{variant}"] = torch.stack([_degraded(image, settings, generator) for image in wide])
    return made


def _degraded(image: Tensor, settings: Settings, generator: Generator) -> Tensor:
    low = degrade(image.float() / 255, settings.scale, settings.degrade, generator)
    return (low * 255).round().byte()


def crop_positions(height: int, width: int, crop: int, count: int, generator: Generator) -> list[tuple[int, int]]:
    """Random (top, left) of ``count`` crops in ``height`` x ``width`` pixels, with little overlap."""
    chosen: list[tuple[int, int]] = []
    for _ in range(count):
        tops = torch.randint(height - crop + 1, (_CANDIDATES,), generator=generator).tolist()
        lefts = torch.randint(width - crop + 1, (_CANDIDATES,), generator=generator).tolist()
        chosen.append(min(zip(tops, lefts, strict=True), key=lambda position: sum(_overlap(position, c, crop) for c in chosen)))
    return chosen


def _overlap(one: tuple[int, int], other: tuple[int, int], crop: int) -> int:
    """Pixels that two crops share."""
    return max(0, crop - abs(one[0] - other[0])) * max(0, crop - abs(one[1] - other[1]))


def _margin(settings: Settings) -> int:
    """Pixels around a crop that are degraded with it."""
    return SURROUNDINGS * settings.scale


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("crop", 1), ("crops", 1), ("variants", 1), ("scale", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least {least}")
    if options.variants > 1 and not options.degrade:
        raise InputError(f"--variants {options.variants}: cached degradations need --degrade PRESET")
    if options.caption_default is not None and not options.captions:
        raise InputError("--caption-default needs --captions")
    if not options.inputs and not options.null and options.prompt is None:
        raise InputError("nothing to prepare: give folders of images, --null or --prompt TEXT")


def _wants_text(options: argparse.Namespace) -> bool:
    return options.captions or options.null or options.prompt is not None


def _settings(options: argparse.Namespace, vae: Any) -> Settings:
    settings = Settings(
        base=str(options.base.resolve()),
        autoencoder="" if vae is None else fingerprint(vae),
        crop=options.crop,
        crops=options.crops,
        seed=options.seed,
        degrade=options.degrade or "",
        variants=options.variants if options.degrade else 0,
        scale=options.scale if options.degrade else 0,
        captions=options.captions,
        caption_default=options.caption_default,
        dtype=options.dtype,
    )
    if vae is not None:
        _check_crop(settings, vae)
    return settings


def _plan(inputs: Sequence[Path], output: Path, settings: Settings) -> list[Task]:
    """The crops to make of each image, planned from its header."""
    if (output / INDEX).is_file():
        check_same(output / INDEX, read_index(output / INDEX)["settings"], settings)
    margin = _margin(settings)
    taken: dict[str, Path] = {}
    tasks = []
    for path, header in find_colour_images(inputs, settings.crop + 2 * margin):
        if (other := taken.setdefault(path.name, path)) != path:
            raise InputError(f"{other} and {path} have the same name: prepare them in two output folders, and train on both")
        room = (header.height - 2 * margin) * (header.width - 2 * margin) // settings.crop**2
        count = min(settings.crops, max(1, room))
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise InputError(f"{path}: expected a name of at most {_LONGEST_NAME} bytes, so that samples can be named after it")
        tasks.append(Task(path, tuple(output / SAMPLES / f"{path.name}-{n}.safetensors" for n in range(count))))
    return tasks


def _check_crop(settings: Settings, vae: Any) -> None:
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    multiple = math.lcm(2 * factor, settings.scale or 1)  # the transformer's patches are 2 latent cells
    if settings.crop % multiple:
        raise InputError(f"--crop {settings.crop}: expected a multiple of {multiple} with this base model and scale")


def _write_prompts(text: TextEncoder, prompt: str | None, output: Path, dtype: torch.dtype) -> None:
    save_prompt(output / NULL_FILE, text.encode("").to("cpu", dtype))
    if prompt is not None:
        save_prompt(output / PROMPT_FILE, text.encode(prompt).to("cpu", dtype))


def _make(tasks: Sequence[Task], pending: Sequence[Task], settings: Settings, encoders: Encoders, workers: int) -> None:
    """Write the samples of the ``pending`` tasks; ``tasks`` are all of them, for the progress bar."""
    total, rest = (sum(len(task.files) for task in group) for group in (tasks, pending))
    crops = DataLoader(_Crops(pending, settings), batch_size=None, num_workers=workers)
    with logging_redirect_tqdm(), tqdm(total=total, initial=total - rest, unit="crop", disable=None) as bar:
        for task, made in zip(pending, crops, strict=True):
            if isinstance(made, str):
                log.warning("left out: %s", made)
            else:
                caption = encoders.caption(task.source)
                for number, file in enumerate(task.files):
                    crop = {name: tensor[number] for name, tensor in made.items()}
                    write_sample(file, {**crop, **caption, "latent": encoders.latent(crop["high"])}, settings, task.source)
            bar.update(len(task.files))


def _write_index(tasks: Sequence[Task], settings: Settings, output: Path) -> int:
    """Write the index of all samples, earlier ones included, and print a summary; returns how many images were read."""
    made = [task for task in tasks if all(file.exists() for file in task.files)]
    files = {file.name for task in made for file in task.files}
    if (output / INDEX).is_file():
        files |= set(read_index(output / INDEX)["files"])
    if not files:
        raise InputError(f"none of the {len(tasks)} images can be read: {output} has no samples")
    write_index(output, settings, sorted(files))
    print(f"{output}  {len(files)} crops; {len(made)} of {len(tasks)} images read")
    return len(made)
