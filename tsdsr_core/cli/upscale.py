"""Restore and enlarge images and videos.

Reads and writes PNG, JPEG, WebP, TIFF, BMP and, if Pillow supports it, AVIF. Reads HEIC and JPEG XL if pillow-heif or
pillow-jxl-plugin is installed, and writes PNG files for them into a folder. Other files of a folder are left out and counted.

With PyAV (the extra "video") it also restores videos, named one by one or by a glob, and writes MP4, MOV or MKV with the
same sound and time stamps. Each frame is restored on its own.

With "accelerate launch", the files are distributed over the processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..alpha import enlarge_alpha, spread_colours
from ..colour import METHODS
from ..errors import InputError, installation
from ..image_size import target_size
from ..images.files import check_output, read_picture, write_picture
from ..images.formats import FORMATS
from ..images.jobs import Inputs, Job, collect, plan_jobs, result_name, say_left_out
from ..pipeline import RECIPES, Options, restore, tiling_of
from ..system.atomic import check_target, one_line, reason
from ..system.device import choose_device, choose_dtype
from ..system.memory import is_out_of_memory
from ..tiles.plan import OVERLAP
from ..vae.plan import check_tile, check_window
from ..video import formats as video_formats
from .arguments import add_device_arguments, add_memory_argument, add_source_arguments, limit_memory, load_model, memory_limit
from .progress import bar

if TYPE_CHECKING:
    from ..families.restorer import Restorer


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    input: str
    output: str
    status: str
    """ "done", "skipped" or "failed"."""
    size: tuple[int, int] | None = None
    """(width, height) of the result in pixels."""
    seconds: float | None = None
    error: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr upscale``."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, videos, folders of images, or quoted globs")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="output file for a single input, otherwise a folder"
    )
    add_source_arguments(parser, default_model="builtin")
    parser.add_argument("--scale", type=float, default=Options.scale, help="enlargement, 1 to 16, fractions allowed")
    parser.add_argument("--color", choices=METHODS, default=Options.colour_fix, help="colour fix")
    parser.add_argument(
        "--strength",
        type=float,
        default=Options.strength,
        help="0 to 2; 1 = full restoration, lower = closer to the input, 0 = VAE round trip only",
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, default=Options.recipe, help="official = tile grid, rounding and resizing as published"
    )
    parser.add_argument(
        "--tile",
        type=_automatic,
        default="auto",
        help="tile size in latent cells, at least 16; auto = 64 to 80, smaller if memory is limited",
    )
    parser.add_argument("--tile-overlap", type=int, default=OVERLAP, help="minimum overlap of tiles in latent cells")
    parser.add_argument(
        "--tile-batch", type=_automatic, default="auto", help="tiles computed together; auto = as many as fit into memory"
    )
    parser.add_argument(
        "--vae-tile",
        type=_automatic,
        default="auto",
        help="maximum side of the VAE's tiles in pixels; does not change the result",
    )
    parser.add_argument(
        "--vae-attention-window",
        type=int,
        metavar="CELLS",
        help="for very large images: estimate the VAE's attention from this many latent cells around each tile, at least 16",
    )
    parser.add_argument(
        "--prompt-tokens", type=_automatic, default="auto", help="use only this many of the prompt's tokens; auto = all"
    )
    parser.add_argument("--compile", action="store_true", help="compile the transformer with torch.compile; slow to start")
    parser.add_argument(
        "--posterior",
        choices=("mode", "sample"),
        default="mode",
        help="latent from the encoder: the most likely one, or a random one",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --posterior sample, the same for each image")
    parser.add_argument("--no-sound", action="store_true", help="leave the sound of videos out")
    add_device_arguments(parser)
    add_memory_argument(parser)
    parser.add_argument(
        "--existing", choices=("error", "skip", "overwrite"), default="error", help="what to do if a result exists"
    )
    parser.add_argument("--json", action="store_true", help="report as one JSON object on standard output")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr upscale``; returns the exit code."""
    chosen = Options(
        scale=options.scale, colour_fix=options.color, strength=options.strength, recipe=options.recipe,
        tile=options.tile, tile_overlap=options.tile_overlap, tile_batch=options.tile_batch,
    )  # fmt: skip
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed}: expected a whole number from 0 to 2^63 - 1")
    check_tile(options.vae_tile)
    check_window(options.vae_attention_window)
    inputs = collect(options.inputs)
    jobs = _plan(inputs, options)
    device = choose_device(options.device)
    if all(job.skip for job in jobs):
        outcomes = [Outcome(str(job.input), str(job.output), "skipped") for job in jobs]
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        outcomes = _run_shared(jobs, device, chosen, options)
    else:
        outcomes = _run_jobs(jobs, device, chosen, options)
    if os.environ.get("RANK", "0") == "0":  # one of several processes reports for all
        _report(outcomes, inputs.left_out, options.json)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _plan(inputs: Inputs, options: argparse.Namespace) -> list[Job]:
    """What is to be made of what."""
    videos = [path for path in inputs.paths if video_formats.is_video(path)]
    if videos and importlib.util.find_spec("av") is None:
        raise InputError(f"{videos[0]}: videos need the package av: {installation('video')}")
    formats = {**FORMATS, **video_formats.WRITTEN}
    if inputs.single:
        formats = video_formats.WRITTEN if videos else FORMATS
    names = {path: (video_formats.result_name if path in videos else result_name)(path) for path in inputs.paths}
    return plan_jobs(inputs, options.output, options.existing, formats, names)


def _run_shared(jobs: list[Job], device: torch.device, chosen: Options, options: argparse.Namespace) -> list[Outcome]:
    """Do this process's part of ``jobs``; returns the outcomes of all processes."""
    from accelerate import PartialState  # here, since it takes time and one process does not need it
    from accelerate.utils import gather_object

    shared = PartialState(cpu=device.type == "cpu")
    try:
        with shared.split_between_processes(jobs) as mine:
            outcomes = _run_jobs(cast(list[Job], mine), cast(torch.device, shared.device), chosen, options)
        return gather_object(outcomes)
    finally:
        shared.destroy_process_group()  # its threads would abort the process at exit


def _run_jobs(jobs: list[Job], device: torch.device, chosen: Options, options: argparse.Namespace) -> list[Outcome]:
    limit = memory_limit(options, device)
    model = load_model(options, device, choose_dtype(options.dtype, device))
    limit_memory(model, limit)
    model.vae_tile, model.vae_attention_window = options.vae_tile, options.vae_attention_window
    if options.prompt_tokens is not None:
        model.prompt = model.prompt.pruned(options.prompt_tokens)
    if options.compile:
        model.compile()
    chosen = replace(chosen, **model.defaults)
    tiling_of(model.model(), chosen)  # settings that do not suit the model end here, not once per picture
    outcomes = []
    count = sum(not job.skip for job in jobs)
    with logging_redirect_tqdm(), bar(count, "file", hidden=count < 2) as files:
        for job in jobs:
            names = str(job.input), str(job.output)
            if job.skip:
                outcomes.append(Outcome(*names, "skipped"))
                continue
            start = time.perf_counter()
            upscale = _upscale_video if video_formats.is_video(job.input) else _upscale_picture
            try:
                size = upscale(job, model, chosen, options)
            except (InputError, OSError, FloatingPointError, MemoryError) as error:
                if options.debug:
                    traceback.print_exc()
                said = reason(error)
                outcomes.append(Outcome(*names, "failed", error=said if names[0] in said else f"{names[0]}: {said}"))
            except Exception as error:
                if is_out_of_memory(error):
                    advice = "try a smaller --scale or --tile, --dtype fp16, or another --device"
                    said = f"{job.input}: out of memory; {advice} ({error})"
                else:  # a bug costs this image alone, and shows where it is
                    traceback.print_exc()
                    said = f"{job.input}: internal error, please report it with the lines above: {error!r}"
                outcomes.append(Outcome(*names, "failed", error=said))
            else:
                outcomes.append(Outcome(*names, "done", size, round(time.perf_counter() - start, 2)))
            files.update()
    return outcomes


def _upscale_picture(job: Job, model: Restorer, chosen: Options, options: argparse.Namespace) -> tuple[int, int]:
    """Restore one image file; returns (width, height) of the result."""
    picture = read_picture(job.input)
    size = target_size((picture.rgb.shape[2], picture.rgb.shape[3]), chosen.scale)
    _check_output(job, picture.alpha is not None, size)  # refused before the work, not after
    with tqdm(leave=False, disable=None, unit="tile") as tiles:

        def progress(stage: str, done: int, total: int) -> None:
            tiles.total, tiles.n = total, done
            tiles.set_description(stage)

        with torch.inference_mode():
            rgb = spread_colours(picture.rgb, picture.alpha)
            rgb = restore(rgb, model.model(options.posterior, options.seed), chosen, progress)
    alpha = None if picture.alpha is None else enlarge_alpha(picture.alpha, size)
    write_picture(job.output, replace(picture, rgb=rgb, alpha=alpha))
    return size[1], size[0]


def _check_output(job: Job, has_alpha: bool, size: tuple[int, int]) -> None:
    """Raise an error where a result cannot be written; in a folder, whose names nobody chose, it says how."""
    try:
        check_output(job.output, has_alpha, size)
    except InputError as error:
        if job.output.name != job.input.name:
            raise
        other = job.output.with_suffix(".png")
        raise InputError(f"{error}: restore it by itself, with -o {other}") from error
    check_target(job.output)


def _upscale_video(job: Job, model: Restorer, chosen: Options, options: argparse.Namespace) -> tuple[int, int]:
    """Restore one video file frame by frame; returns (width, height) of the result."""
    from ..video.reading import read_clip  # here, since PyAV is an extra of its own
    from ..video.writing import even, write_clip

    check_target(job.output)
    clip = read_clip(job.input)
    size = target_size((clip.height, clip.width), chosen.scale)

    def restored(rgb: Tensor) -> Tensor:
        with torch.inference_mode():
            return restore(rgb, model.model(options.posterior, options.seed), chosen)

    with bar(clip.frames, "frame", leave=False) as frames:
        write_clip(clip, job.output, size, restored, frames.update, not options.no_sound)
    height, width = even(size)
    return width, height


def _report(outcomes: list[Outcome], left_out: Mapping[str, int], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"files": [asdict(outcome) for outcome in outcomes], "left_out": left_out}))
    elif left_out:
        videos = any(video_formats.is_video(Path(f"x.{kind}")) for kind in left_out)
        advice = "; name videos one by one, or by a glob, to restore them" if videos else ""
        print(one_line(say_left_out(left_out) + advice), file=sys.stderr)
    for outcome in outcomes:
        if outcome.status == "failed":
            print(one_line(f"failed: {outcome.error}"), file=sys.stderr)
        elif not as_json and outcome.size:
            print(one_line(f"{outcome.output}  {outcome.size[0]}x{outcome.size[1]}  {outcome.seconds} s"))
        elif not as_json:
            print(one_line(f"{outcome.output}  skipped, it exists"))


def _automatic(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number or auto")
    return None if text == "auto" else int(text)
