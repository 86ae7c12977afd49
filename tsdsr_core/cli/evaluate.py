"""Compare a folder of results, or of inputs, with a folder of references.

Images are matched by name without suffix. An image that is smaller than its reference, such as an input, is enlarged
bicubically first, which gives the baseline of plain resizing. Metrics that need no reference are also computed for the
references, in the row "reference"; metrics of whole sets, such as FID, are in the row "set".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import some
from ..errors import InputError
from ..images.files import FORMATS, read_picture
from ..images.jobs import is_image
from ..metrics.fidelity import SSIM_WINDOW, flat_noise, mean, naturalness, psnr_y, ssim_y
from ..metrics.niqe import niqe
from ..metrics.spectrum import PERIODS, grid_peaks, sharpness
from ..pipeline import bicubic
from ..system.atomic import one_line
from ..system.device import DEVICES, choose_device
from .perceptual import FROM_FILE, Metric, compare_sets, load_metrics, read_metrics

Row = dict[str, float]
DEFAULT = ("psnr_y", "ssim_y")
PAPER = ("psnr_y", "ssim_y", "lpips", "dists", "niqe", "musiq", "maniqa-pipal", "clipiqa", "fid")
"""The metrics of the TSD-SR paper; its authors' test script uses MANIQA trained on PIPAL."""


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    return Metric(lambda image, reference: float(function(image, reference)), "pair")


def _alone(function: Callable[[Tensor], Tensor]) -> Metric:
    return Metric(lambda image: float(function(image)), "alone")


NATIVE = {
    "psnr_y": _pair(psnr_y),
    "ssim_y": _pair(ssim_y),
    "naturalness": _pair(naturalness),
    "niqe": _alone(niqe),
    "flat_noise": replace(_pair(flat_noise), of_reference=True),
    "sharpness": _alone(sharpness),
    **{f"grid_{period}": _alone(partial(grid_peaks, period=period)) for period in PERIODS},
}
"""Metrics that need only this package."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr eval``."""
    parser.add_argument("--lq", type=Path, required=True, metavar="DIR", help="results, or low-quality inputs")
    parser.add_argument("--hq", type=Path, required=True, metavar="DIR", help="references")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help=f"{', '.join(NATIVE)}; with --perceptual-weights also {', '.join(FROM_FILE)}; or a metric of pyiqa (lpips, dists, "
        f"musiq, ...), which downloads its weights; paper is short for {' '.join(PAPER)}",
    )
    parser.add_argument(
        "--perceptual-weights",
        type=Path,
        metavar="FILE",
        help=f"compute {', '.join(FROM_FILE)} without pyiqa, with a file made by tsdsr perceptual-weights",
    )
    parser.add_argument("--device", default="auto", metavar="|".join(DEVICES), help="device for metrics with networks")
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr eval``; returns the exit code."""
    pairs = match_pairs(options.lq, options.hq)
    metrics = choose_metrics(options.metrics, choose_device(options.device), options.perceptual_weights)
    report = score_pairs(pairs, metrics)
    if options.json:
        print(json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None)))  # JSON has no infinity
    else:
        _print_table(report, list(metrics))
    failed = report.get("failed", {})
    for error in failed.values():
        print(one_line(f"failed: {error}"), file=sys.stderr)
    return int(bool(failed))


def choose_metrics(names: list[str], device: torch.device, weights: Path | None = None) -> dict[str, Metric]:
    """Load the metrics called ``names``, in this order; "paper" stands for the metrics of the paper.

    Args:
        device: for metrics with networks.
        weights: the weights file of LPIPS and DISTS; None to use pyiqa's.

    Raises:
        InputError: as ``read_metrics`` and ``load_metrics``.
    """
    wanted = dict.fromkeys(part for name in names for part in (PAPER if name == "paper" else (name,)))
    own = NATIVE if weights is None else NATIVE | read_metrics(wanted, weights, device)
    foreign = [name for name in wanted if name not in own]
    loaded = own | (load_metrics(foreign, device) if foreign else {})
    return {name: loaded[name] for name in wanted}


def score_pairs(pairs: list[tuple[str, Path, Path]], metrics: dict[str, Metric]) -> dict[str, Any]:
    """Compute all metrics: of each of the "files", their "mean" and, where ``metrics`` has such, of references and sets.

    Pairs that cannot be read or compared are left out of all results and listed under "failed", with the reason.

    Args:
        pairs: (name, image, reference), as from ``match_pairs``.

    Raises:
        InputError: if no pair is left, with the first reason.
    """
    single = {name: metric for name, metric in metrics.items() if metric.kind != "set"}
    sets = {name: metric for name, metric in metrics.items() if metric.kind == "set"}
    own = {name: metric for name, metric in single.items() if metric.kind == "alone" or metric.of_reference}
    rows: dict[str, Row] = {}
    references: dict[str, Row] = {}
    failed: dict[str, str] = {}
    for name, image_path, reference_path in tqdm(pairs, unit="image", disable=None):
        try:
            image, reference = _read_pair(image_path, reference_path)
            row = _score(single, image_path, image, reference)
            references[name] = _score(own, reference_path, reference, reference)
        except InputError as error:
            failed[name] = str(error)
        else:
            rows[name] = row
    if not rows:
        raise InputError(f"none of the {len(pairs)} pairs can be compared: {next(iter(failed.values()))}")
    report: dict[str, Any] = {"files": rows, "mean": _means(rows, single)}
    if own:
        report |= {"reference_files": references, "reference": _means(references, own)}
    if sets:
        report["set"] = compare_sets(sets, ((name, *_read_pair(*paths)) for name, *paths in pairs if name in rows))
    return report | ({"failed": failed} if failed else {})


def _read_pair(image_path: Path, reference_path: Path) -> tuple[Tensor, Tensor]:
    """Read an image, enlarged to the size of its reference, and the reference."""
    image, reference = read_picture(image_path).rgb, read_picture(reference_path).rgb
    check_sizes(image_path, image, reference_path, reference)
    return bicubic(image, (reference.shape[2], reference.shape[3])), reference


def _score(metrics: dict[str, Metric], path: Path, image: Tensor, reference: Tensor) -> Row:
    try:
        return {
            name: metric.score(image) if metric.kind == "alone" else metric.score(image, reference)
            for name, metric in metrics.items()
        }
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _means(rows: dict[str, Row], metrics: dict[str, Metric]) -> Row:
    """Mean of each metric over the images for which it is not NaN."""
    return {name: mean([row[name] for row in rows.values() if not math.isnan(row[name])]) for name in metrics}


def check_sizes(image_path: Path, image: Tensor, reference_path: Path, reference: Tensor) -> None:
    """Raise ``InputError`` unless an image has the proportions of its reference, is not larger and not too small."""
    (height, width), (full_height, full_width) = image.shape[2:], reference.shape[2:]
    sizes = f"{image_path} ({width}x{height}) and its reference {reference_path} ({full_width}x{full_height})"
    if height > full_height or width > full_width:
        raise InputError(f"{sizes}: the reference is smaller than the image")
    if abs(height - width * full_height / full_width) > 1 and abs(width - height * full_width / full_height) > 1:
        raise InputError(f"{sizes} have different proportions")
    if min(full_height, full_width) < SSIM_WINDOW:
        raise InputError(f"{sizes}: expected at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels")


def match_pairs(images: Path, references: Path) -> list[tuple[str, Path, Path]]:
    """Match the images of two folders: a list of (name, image, reference).

    Raises:
        InputError: for a missing or empty folder, or an image without counterpart.
    """
    found = _by_stem(images), _by_stem(references)
    for names, folder, other in ((found[0], images, references), (found[1], references, images)):
        unmatched = sorted(set(names) - set(found[0] if names is found[1] else found[1]))
        if unmatched:
            raise InputError(f"{folder} has images without a counterpart in {other}: {some(unmatched)}")
    return [(stem, found[0][stem], found[1][stem]) for stem in sorted(found[0])]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_image(path) and (other := paths.setdefault(path.stem, path)) != path:
            raise InputError(f"{other} and {path} have the same name: images are matched by name without suffix")
    if not paths:
        raise InputError(f"{folder} has no images ({', '.join(FORMATS)})")
    return paths


def _print_table(report: dict[str, Any], metrics: list[str]) -> None:
    """Print a row for each image, then means, references and sets; cells without a value are empty."""
    rows = [*report["files"].items(), *((label, report[label]) for label in ("mean", "reference", "set") if label in report)]
    first = max(len(name) for name, _ in rows)
    widths = {metric: max(10, len(metric)) for metric in metrics}
    print(" " * first, *(f"{metric:>{width}}" for metric, width in widths.items()))
    for name, row in rows:
        cells = (f"{row[metric]:{width}.4f}" if metric in row else " " * width for metric, width in widths.items())
        print(f"{one_line(name):{first}}", *cells)
