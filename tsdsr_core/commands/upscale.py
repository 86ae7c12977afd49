"""restore and enlarge pictures

Under ``accelerate launch`` the processes share the pictures out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..colour import METHODS
from ..device import choose_device, choose_dtype
from ..diffusers_models import DiffusersModel
from ..geometry import target_size
from ..image_io import Picture, check_output, read_picture, write_picture
from ..jobs import Job, collect, plan_jobs
from ..memory import is_out_of_memory
from ..restore import RECIPES, Options, bicubic, restore, tile_settings
from ..tile_plan import OVERLAP
from ..vae_plan import check_tile
from .model_options import (
    add_device_arguments,
    add_memory_argument,
    add_source_arguments,
    limit_memory,
    load_model,
    memory_limit,
)


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

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
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures, folders or quoted globs")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="file for one input, else folder")
    add_source_arguments(parser, default_model="builtin")
    parser.add_argument("--scale", type=float, default=Options.scale, help="enlargement, 1 to 16, fractions allowed")
    parser.add_argument("--color", choices=METHODS, default=Options.colour_fix, help="colour fix")
    parser.add_argument(
        "--strength", type=float, default=Options.strength, help="of the step: 0 is a round trip through the VAE"
    )
    parser.add_argument("--recipe", choices=RECIPES, default=Options.recipe, help="official: pixels as published")
    parser.add_argument("--tile", type=_automatic, default="auto", help="tile side in latent cells, or auto: 64 where it fits")
    parser.add_argument("--tile-overlap", type=int, default=OVERLAP, help="least overlap of tiles in latent cells")
    parser.add_argument("--tile-batch", type=_automatic, default="auto", help="tiles at once, a number or auto")
    parser.add_argument("--vae-tile", type=_automatic, default="auto", help="greatest VAE tile side in pixels; same result")
    parser.add_argument("--prompt-tokens", type=_automatic, default="auto", help="keep only so many of the prompt's tokens")
    parser.add_argument("--compile", action="store_true", help="run the transformer through torch.compile: slow to start")
    parser.add_argument("--posterior", choices=("mode", "sample"), default="mode", help="of the VAE encoder")
    parser.add_argument("--seed", type=int, default=0, help="of --posterior sample, the same for each picture")
    add_device_arguments(parser)
    add_memory_argument(parser)
    parser.add_argument("--existing", choices=("error", "skip", "overwrite"), default="error", help="for results there are")
    parser.add_argument("--json", action="store_true", help="report as one JSON object on standard output")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr upscale``; returns the exit code."""
    chosen = Options(
        scale=options.scale, colour_fix=options.color, strength=options.strength, recipe=options.recipe,
        tile=options.tile, tile_overlap=options.tile_overlap, tile_batch=options.tile_batch,
    )  # fmt: skip
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: expected a whole number from 0 to 2^63 - 1")
    check_tile(options.vae_tile)
    jobs = plan_jobs(collect(options.inputs), options.output, options.existing)
    device = choose_device(options.device)
    if all(job.skip for job in jobs):
        outcomes = [Outcome(str(job.input), str(job.output), "skipped") for job in jobs]
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        outcomes = _run_shared(jobs, device, chosen, options)
    else:
        outcomes = _run_jobs(jobs, device, chosen, options)
    if os.environ.get("RANK", "0") == "0":  # one of several processes reports for all
        _report(outcomes, options.json)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _run_shared(jobs: list[Job], device: torch.device, chosen: Options, options: argparse.Namespace) -> list[Outcome]:
    """Do this process's part of ``jobs``; returns the outcomes of all processes."""
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
    model.vae_tile = options.vae_tile
    if options.prompt_tokens is not None:
        model.prompt = model.prompt.pruned(options.prompt_tokens)
    if options.compile:
        model.compile()
    chosen = replace(chosen, **model.defaults)
    tile_settings(model.restorer(), chosen)  # settings that do not suit the model end here, not once per picture
    outcomes = []
    with logging_redirect_tqdm():
        for job in tqdm(jobs, unit="picture", disable=None if len(jobs) > 1 else True):
            names = str(job.input), str(job.output)
            if job.skip:
                outcomes.append(Outcome(*names, "skipped"))
                continue
            start = time.perf_counter()
            try:
                size = _upscale_file(job, model, chosen, options)
            except (ValueError, OSError, FloatingPointError, MemoryError) as error:
                named = str(error) if names[0] in str(error) else f"{names[0]}: {error}"
                outcomes.append(Outcome(*names, "failed", error=named))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                advice = "try a smaller --scale or --tile, --dtype fp16, or another --device"
                outcomes.append(Outcome(*names, "failed", error=f"{job.input}: out of memory; {advice} ({error})"))
            else:
                outcomes.append(Outcome(*names, "done", size, round(time.perf_counter() - start, 2)))
    return outcomes


def _upscale_file(job: Job, model: DiffusersModel, chosen: Options, options: argparse.Namespace) -> tuple[int, int]:
    """Restore one file; returns (width, height) of the result."""
    picture = read_picture(job.input)
    size = target_size((picture.rgb.shape[2], picture.rgb.shape[3]), chosen.scale)
    check_output(job.output, picture.alpha is not None, size)  # refused before the work, not after
    with tqdm(leave=False, disable=None, unit="tile") as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(stage)

        with torch.inference_mode():
            rgb = restore(picture.rgb.to(model.place(*size)), model.restorer(options.posterior, options.seed), chosen, progress)
    alpha = None if picture.alpha is None else bicubic(picture.alpha, size)
    result = Picture(rgb.cpu(), alpha, picture.grey, picture.deep, picture.icc, picture.exif)
    write_picture(job.output, result)
    return size[1], size[0]


def _report(outcomes: list[Outcome], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"files": [asdict(outcome) for outcome in outcomes]}))
    for outcome in outcomes:
        if outcome.status == "failed":
            print(f"failed: {outcome.error}", file=sys.stderr)
        elif not as_json and outcome.size:
            print(f"{outcome.output}  {outcome.size[0]}x{outcome.size[1]}  {outcome.seconds} s")
        elif not as_json:
            print(f"{outcome.output}  skipped, it exists")


def _automatic(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number or auto")
    return None if text == "auto" else int(text)
