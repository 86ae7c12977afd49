"""compare a folder of results, or of inputs, with references

Pictures are matched by name without suffix.  Where one is smaller than its reference, as an input is, it is enlarged
bicubically first, which gives the baseline of plain resizing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..image_io import FORMATS, read_picture
from ..jobs import is_picture
from ..metrics import SSIM_WINDOW, mean, psnr_y, ssim_y
from ..restore import bicubic

Metric = Callable[[Tensor, Tensor], float]
NATIVE: dict[str, Metric] = {
    "psnr_y": lambda image, reference: float(psnr_y(image, reference)),
    "ssim_y": lambda image, reference: float(ssim_y(image, reference)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr eval``."""
    parser.add_argument("--lq", type=Path, required=True, metavar="DIR", help="results, or low-quality inputs")
    parser.add_argument("--hq", type=Path, required=True, metavar="DIR", help="references")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=list(NATIVE),
        metavar="NAME",
        help=f"{', '.join(NATIVE)}, or a name that pyiqa knows (lpips, dists, musiq, ...), which fetches its weights",
    )
    parser.add_argument("--json", action="store_true", help="report as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr eval``; returns the exit code."""
    pairs = match_pairs(options.lq, options.hq)
    metrics = {name: NATIVE.get(name) or _perceptual(name) for name in options.metrics}
    rows: dict[str, dict[str, float]] = {}
    for name, image_path, reference_path in pairs:
        reference = read_picture(reference_path).rgb
        image = read_picture(image_path).rgb
        check_sizes(image_path, image, reference_path, reference)
        image = bicubic(image, (reference.shape[2], reference.shape[3]))
        rows[name] = {metric: function(image, reference) for metric, function in metrics.items()}
    means = {metric: mean([row[metric] for row in rows.values()]) for metric in metrics}
    if options.json:
        report = {"files": rows, "mean": means}
        print(json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None)))  # JSON has no infinity
    else:
        _print_table(rows, means)
    return 0


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


def _perceptual(name: str) -> Metric:
    try:
        import pyiqa  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"metric {name!r} needs the metrics extra: pip install 'tsdsr[metrics]' ({error})") from error
    if name not in pyiqa.list_models():
        raise ValueError(f"unknown metric {name!r}: expected {', '.join(NATIVE)} or one of pyiqa.list_models()")
    metric = pyiqa.create_metric(name)
    if metric.metric_mode == "NR":
        return lambda image, reference: float(metric(image))
    return lambda image, reference: float(metric(image, reference))


def _print_table(rows: dict[str, dict[str, float]], means: dict[str, float]) -> None:
    width = max(len("mean"), *(len(name) for name in rows))
    print(" " * width, *(f"{metric:>10}" for metric in means))
    for name, row in {**rows, "mean": means}.items():
        print(f"{name:{width}}", *(f"{value:10.4f}" for value in row.values()))
