"""make a training set: crops of pictures with cached latents, degradations and text embeddings

Run again, it goes on where it stopped: samples that are there stay as they are, also where a caption has changed, and
other pictures are added.  Pictures too small for --crop, and grey ones, are left out.  With --captions, --null or
--prompt, OUT also gets null.safetensors, the embeddings of the empty prompt, and with --prompt prompt.safetensors.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..bundle import bundle_path
from ..device import DEVICES, DTYPES, choose_device
from ..diffusers_models import load_vae
from ..prompt import save_prompt
from .degradations import PRESETS, degrade
from .networks import fingerprint
from .prepared import (
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
from .randomness import generator_for
from .sources import colour_pictures, read_pixels
from .text import TextEncoder, read_captions

log = logging.getLogger(__name__)
_CANDIDATES = 32
"""Places tried for a crop; the one that overlaps least with the others is taken."""


@dataclass(frozen=True)
class Task:
    """The crops to make of one picture."""

    source: Path
    files: tuple[Path, ...]
    """Where its crops go, by number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr train prepare``."""
    parser.add_argument("inputs", nargs="*", type=Path, metavar="INPUT", help="folders of pictures, or quoted globs")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make or to go on with")
    parser.add_argument(
        "--base",
        type=bundle_path,
        required=True,
        metavar="FOLDER|BUNDLE",
        help="SD3 folder in diffusers' layout, merged bundle, or builtin",
    )
    parser.add_argument("--crop", type=int, default=512, help="side of a crop in pixels")
    parser.add_argument("--crops", type=int, default=1, help="crops of a picture; fewer where it is too small for so many")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and degradations")
    parser.add_argument("--degrade", choices=PRESETS, help="cache degradations of this preset; else they are made in training")
    parser.add_argument("--variants", type=int, default=1, help="cached degradations of a crop")
    parser.add_argument("--scale", type=int, default=4, help="of the cached degradations")
    parser.add_argument("--captions", action="store_true", help="cache the embeddings of NAME.txt beside each picture NAME")
    parser.add_argument("--caption-default", metavar="TEXT", help="caption of the pictures without one")
    parser.add_argument("--null", action="store_true", help=f"write {NULL_FILE}; --captions and --prompt do so too")
    parser.add_argument("--prompt", metavar="TEXT", help=f"write the embeddings of this text to {PROMPT_FILE}")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="number type of what is stored")
    parser.add_argument("--device", default="auto", metavar="|".join(DEVICES), help="where to run; cuda:1 works too")
    parser.add_argument("--workers", type=int, default=2, help="processes that read and degrade beside the encoder")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr train prepare``; returns the exit code.

    Raises:
        ValueError: for impossible options, inputs without usable pictures, missing captions, or an output folder that
            was made with other settings.
    """
    _check_options(options)
    device = choose_device(options.device)
    vae: Any = load_vae(options.base) if options.inputs else None
    settings = _settings(options, vae)
    tasks = _plan(options.inputs, options.output, settings) if options.inputs else []
    captions = read_captions([task.source for task in tasks], options.caption_default) if options.captions else {}
    pending = [task for task in tasks if not all(is_complete(file, settings, task.source) for file in task.files)]
    text = TextEncoder(options.base, device) if _wants_text(options) else None
    if text is not None:
        _write_prompts(text, options.prompt, options.output, DTYPES[options.dtype])
    if tasks:
        encoders = Encoders(vae.to(device), text, captions, DTYPES[options.dtype])
        _make(tasks, pending, settings, encoders, options.workers)
        _finish(tasks, settings, options.output)
    return 0


@dataclass(frozen=True)
class Encoders:
    """The base model's halves, and what the second is to read."""

    vae: Any
    """``AutoencoderKL``."""
    text: TextEncoder | None
    captions: Mapping[Path, str]
    """By picture; empty where captions are not wanted."""
    dtype: torch.dtype
    """Of the results."""

    @torch.inference_mode()
    def latent(self, high: Tensor) -> Tensor:
        """The posterior's mode ``(C, h, w)``, unscaled, of uint8 ``(3, H, W)``: computed in fp32, returned on the CPU."""
        pixels = high[None].to(self.vae.device).float() / 255 * 2 - 1
        return self.vae.encode(pixels).latent_dist.mode()[0].to("cpu", self.dtype)

    def caption(self, picture: Path) -> dict[str, Tensor]:
        """``tokens`` ``(T, D)`` and ``pooled`` ``(P,)`` of a picture's caption; nothing without captions."""
        if self.text is None or not self.captions:
            return {}
        prompt = self.text.encode(self.captions[picture]).to("cpu", self.dtype)
        return {"tokens": prompt.tokens[0], "pooled": prompt.pooled[0]}


class _Pictures(Dataset[dict[str, Tensor] | str]):
    """What workers do for a task: the uint8 tensors of all its crops, ``(crops, 3, ...)``, or why there are none."""

    def __init__(self, tasks: Sequence[Task], settings: Settings) -> None:
        self.tasks = tasks
        self.settings = settings

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> dict[str, Tensor] | str:
        task = self.tasks[index]
        try:
            pixels = read_pixels(task.source)
        except ValueError as error:
            return str(error)
        return cut(pixels, task.source.name, len(task.files), self.settings)


def cut(pixels: Tensor, name: str, count: int, settings: Settings) -> dict[str, Tensor]:
    """Random crops of a picture, and their degradations.

    They follow the seed and the picture's name, so that other pictures in its folder change nothing.

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
        for top, left in places(*size, crop, count, generator)
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


def places(height: int, width: int, crop: int, count: int, generator: Generator) -> list[tuple[int, int]]:
    """(top, left) of ``count`` crops in ``height`` x ``width`` pixels, random and apart where there is room."""
    chosen: list[tuple[int, int]] = []
    for _ in range(count):
        tops = torch.randint(height - crop + 1, (_CANDIDATES,), generator=generator).tolist()
        lefts = torch.randint(width - crop + 1, (_CANDIDATES,), generator=generator).tolist()
        chosen.append(min(zip(tops, lefts, strict=True), key=lambda place: sum(_overlap(place, c, crop) for c in chosen)))
    return chosen


def _overlap(one: tuple[int, int], other: tuple[int, int], crop: int) -> int:
    """Pixels that two crops share."""
    return max(0, crop - abs(one[0] - other[0])) * max(0, crop - abs(one[1] - other[1]))


def _margin(settings: Settings) -> int:
    """Pixels around a crop that its cached degradations see."""
    return SURROUNDINGS * settings.scale


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("crop", 1), ("crops", 1), ("variants", 1), ("scale", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least {least}")
    if options.variants > 1 and not options.degrade:
        raise ValueError(f"--variants {options.variants}: cached degradations need --degrade PRESET")
    if options.caption_default is not None and not options.captions:
        raise ValueError("--caption-default goes with --captions")
    if not options.inputs and not options.null and options.prompt is None:
        raise ValueError("nothing to prepare: give folders of pictures, or --null or --prompt TEXT")


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
    """What is to be made of each picture, known from its header."""
    if (output / INDEX).is_file():
        check_same(output / INDEX, read_index(output / INDEX)["settings"], settings)
    margin = _margin(settings)
    taken: dict[str, Path] = {}
    tasks = []
    for path, header in colour_pictures(inputs, settings.crop + 2 * margin):
        if (other := taken.setdefault(path.name, path)) != path:
            raise ValueError(f"{other} and {path} have the same name: prepare them into two folders, and train on both")
        room = (header.height - 2 * margin) * (header.width - 2 * margin) // settings.crop**2
        count = min(settings.crops, max(1, room))
        tasks.append(Task(path, tuple(output / SAMPLES / f"{path.name}-{n}.safetensors" for n in range(count))))
    return tasks


def _check_crop(settings: Settings, vae: Any) -> None:
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    multiple = math.lcm(2 * factor, settings.scale or 1)  # the transformer's patches are 2 latent cells
    if settings.crop % multiple:
        raise ValueError(f"--crop {settings.crop}: expected a multiple of {multiple} with this base model and scale")


def _write_prompts(text: TextEncoder, prompt: str | None, output: Path, dtype: torch.dtype) -> None:
    save_prompt(output / NULL_FILE, text.encode("").to("cpu", dtype))
    if prompt is not None:
        save_prompt(output / PROMPT_FILE, text.encode(prompt).to("cpu", dtype))


def _make(tasks: Sequence[Task], pending: Sequence[Task], settings: Settings, encoders: Encoders, workers: int) -> None:
    """Write the samples of the ``pending`` ones of ``tasks``."""
    total, rest = (sum(len(task.files) for task in group) for group in (tasks, pending))
    pictures = DataLoader(_Pictures(pending, settings), batch_size=None, num_workers=workers)
    with logging_redirect_tqdm(), tqdm(total=total, initial=total - rest, unit="crop", disable=None) as bar:
        for task, made in zip(pending, pictures, strict=True):
            if isinstance(made, str):
                log.warning("left out: %s", made)
            else:
                caption = encoders.caption(task.source)
                for number, file in enumerate(task.files):
                    crop = {name: tensor[number] for name, tensor in made.items()}
                    write_sample(file, {**crop, **caption, "latent": encoders.latent(crop["high"])}, settings, task.source)
            bar.update(len(task.files))


def _finish(tasks: Sequence[Task], settings: Settings, output: Path) -> None:
    """Write the index of what there is now and was before, and say so."""
    made = [task for task in tasks if all(file.exists() for file in task.files)]
    files = {file.name for task in made for file in task.files}
    if (output / INDEX).is_file():
        files |= set(read_index(output / INDEX)["files"])
    if not files:
        raise ValueError(f"none of the {len(tasks)} pictures can be read: {output} has no samples")
    write_index(output, settings, sorted(files))
    print(f"{output}  {len(files)} crops; {len(made)} of {len(tasks)} pictures read")
