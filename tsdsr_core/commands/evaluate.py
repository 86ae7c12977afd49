"""compare a folder of results, or of inputs, with references

Pictures are matched by name without suffix.  Where one is smaller than its reference, as an input is, it is enlarged
bicubically first, which gives the baseline of plain resizing.  Metrics that need no reference are also taken of the
references, in the row "reference"; those that compare all results with all references are in the row "set".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..device import DEVICES, choose_device
from ..image_io import FORMATS, read_picture
from ..jobs import is_picture
from ..metrics import SSIM_WINDOW, mean, naturalness, psnr_y, ssim_y
from ..restore import bicubic
from ..spectrum import PERIODS, grid_peaks, sharpness
from .perceptual import Metric, compare_sets, load_metrics

Row = dict[str, float]
DEFAULT = ("psnr_y", "ssim_y")
PAPER = ("psnr_y", "ssim_y", "lpips", "dists", "niqe", "musiq", "maniqa-pipal", "clipiqa", "fid")
"""The table of the TSD-SR paper; its authors' test script takes MANIQA as trained on PIPAL."""


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    return Metric(lambda image, reference: float(function(image, reference)), "pair")


def _alone(function: Callable[[Tensor], Tensor]) -> Metric:
    return Metric(lambda image: float(function(image)), "alone")


NATIVE = {
    "psnr_y": _pair(psnr_y),
    "ssim_y": _pair(ssim_y),
    "naturalness": _pair(naturalness),
    "sharpness": _alone(sharpness),
    **{f"grid_{period}": _alone(partial(grid_peaks, period=period)) for period in PERIODS},
}
"""Metrics that need nothing but this package."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr eval``."""
    parser.add_argument("--lq", type=Path, required=True, metavar="DIR", help="results, or low-quality inputs")
    parser.add_argument("--hq", type=Path, required=True, metavar="DIR", help="references")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help=f"{', '.join(NATIVE)}, or a name that pyiqa knows (lpips, dists, musiq, ...), which fetches its weights; "
        f"paper is short for {' '.join(PAPER)}",
    )
    parser.add_argument("--device", default="auto", metavar="|".join(DEVICES), help="where pyiqa's networks run")
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr eval``; returns the exit code."""
    pairs = match_pairs(options.lq, options.hq)
    metrics = choose_metrics(options.metrics, choose_device(options.device))
    report = measure(pairs, metrics)
    if options.json:
        print(json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None)))  # JSON has no infinity
    else:
        _print_table(report, list(metrics))
    return 0


def choose_metrics(names: list[str], device: torch.device) -> dict[str, Metric]:
    """The metrics called ``names``, in their order, "paper" as its parts; pyiqa's run on ``device``.

    Raises:
        ValueError: as ``load_metrics``.
    """
    wanted = dict.fromkeys(part for name in names for part in (PAPER if name == "paper" else (name,)))
    foreign = [name for name in wanted if name not in NATIVE]
    loaded = {**NATIVE, **(load_metrics(foreign, device) if foreign else {})}
    return {name: loaded[name] for name in wanted}


def measure(pairs: list[tuple[str, Path, Path]], metrics: dict[str, Metric]) -> dict[str, Any]:
    """All figures by metric: of each of the "files", their "mean", and of references and sets where ``metrics`` has such.

    Raises:
        ValueError: for a picture that cannot be read, compared with its reference or measured, naming it.
    """
    single, alone, sets = (
        {name: metric for name, metric in metrics.items() if metric.kind in kinds}
        for kinds in (("pair", "alone"), ("alone",), ("set",))
    )
    rows: dict[str, Row] = {}
    references: dict[str, Row] = {}
    for name, image_path, reference_path in tqdm(pairs, unit="picture", disable=None):
        image, reference = _read_pair(image_path, reference_path)
        rows[name] = _score(single, image_path, image, reference)
        references[name] = _score(alone, reference_path, reference, reference)
    report = {"files": rows, "mean": _means(rows, single)}
    if alone:
        report |= {"reference_files": references, "reference": _means(references, alone)}
    if sets:
        report["set"] = compare_sets(sets, ((name, *_read_pair(*paths)) for name, *paths in pairs))
    return report


def _read_pair(image_path: Path, reference_path: Path) -> tuple[Tensor, Tensor]:
    """Image, enlarged to the size of its reference, and reference."""
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
        raise ValueError(f"{path}: {error}") from error


def _means(rows: dict[str, Row], metrics: dict[str, Metric]) -> Row:
    return {name: mean([row[name] for row in rows.values()]) for name in metrics}


def check_sizes(image_path: Path, image: Tensor, reference_path: Path, reference: Tensor) -> None:
    """Raise ``ValueError`` unless ``image`` is its reference made smaller, to the pixel, and large enough to compare."""
    (height, width), (full_height, full_width) = image.shape[2:], reference.shape[2:]
    sizes = f"{image_path} ({width}x{height}) and its reference {reference_path} ({full_width}x{full_height})"
    if height > full_height or width > full_width:
        raise ValueError(f"{sizes}: the reference is smaller")
    if abs(height - width * full_height / full_width) > 1 and abs(width - height * full_width / full_height) > 1:
        raise ValueError(f"{sizes} have different proportions")
    if min(full_height, full_width) < SSIM_WINDOW:
        raise ValueError(f"{sizes}: expected at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels")


def match_pairs(images: Path, references: Path) -> list[tuple[str, Path, Path]]:
    """(name, image, reference) for all pictures of two folders.

    Raises:
        ValueError: for a missing or empty folder or a picture without its partner.
    """
    found = _by_stem(images), _by_stem(references)
    for names, folder, other in ((found[0], images, references), (found[1], references, images)):
        lonely = sorted(set(names) - set(found[0] if names is found[1] else found[1]))
        if lonely:
            raise ValueError(f"{folder} has {len(lonely)} pictures without a partner in {other}: {', '.join(lonely[:5])}")
    return [(stem, found[0][stem], found[1][stem]) for stem in sorted(found[0])]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_picture(path) and (other := paths.setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path} have the same name: pictures are matched by name without suffix")
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(FORMATS)})")
    return paths


def _print_table(report: dict[str, Any], metrics: list[str]) -> None:
    """Pictures and then means, references and sets as rows; a cell stays empty where a metric has no such figure."""
    rows = {**report["files"], **{label: report[label] for label in ("mean", "reference", "set") if label in report}}
    first = max(map(len, rows))
    widths = {metric: max(10, len(metric)) for metric in metrics}
    print(" " * first, *(f"{metric:>{width}}" for metric, width in widths.items()))
    for name, row in rows.items():
        cells = (f"{row[metric]:{width}.4f}" if metric in row else " " * width for metric, width in widths.items())
        print(f"{name:{first}}", *cells)
