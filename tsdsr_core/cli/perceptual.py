"""Metrics with trained networks for ``tsdsr eval``: LPIPS and DISTS from a weights file, or any metric of pyiqa.

pyiqa, an optional package that downloads the weights of its networks, is imported only if one of its metrics is used.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, installation
from ..images.files import Picture, write_picture
from ..metrics.perceptual import Dists, Lpips, read_weights
from ..system.imports import import_pyiqa

FROM_FILE = ("lpips", "lpips-vgg", "dists")
"""Metrics of ``read_metrics``; "lpips" uses AlexNet, which its authors recommend for evaluation."""
SETS = ("fid", "fid_dinov2", "sfid")
"""Metrics that compare the set of all results with the set of all references."""


@dataclass(frozen=True)
class Metric:
    """A metric for images ``(1, 3, H, W)`` in 0..1."""

    score: Callable[..., float]
    kind: Literal["pair", "alone", "set"]
    """Arguments of ``score``: an image and its reference ("pair"), an image ("alone"), or the paths of two folders ("set")."""
    of_reference: bool = False
    """Whether a "pair" metric of the reference with itself is reported, too, as the value to aim at."""


def read_metrics(names: Iterable[str], path: Path, device: torch.device) -> dict[str, Metric]:
    """Load those metrics of ``FROM_FILE`` that are in ``names``, with the weights at ``path``, on ``device``.

    Raises:
        InputError: for a missing or unknown file.
    """
    weights = read_weights(path)
    makers: dict[str, Callable[[], nn.Module]] = {
        "lpips": partial(Lpips, weights, "alexnet"), "lpips-vgg": partial(Lpips, weights, "vgg16"),
        "dists": partial(Dists, weights),
    }  # fmt: skip
    return {name: _of_network(makers[name]().to(device), device) for name in names if name in makers}


def _of_network(network: nn.Module, device: torch.device) -> Metric:
    @torch.no_grad()
    def score(image: Tensor, reference: Tensor) -> float:
        return float(network(image.to(device), reference.to(device)))

    return Metric(score, "pair")


def load_metrics(names: list[str], device: torch.device) -> dict[str, Metric]:
    """Load the metrics of pyiqa called ``names`` on ``device``.

    Raises:
        InputError: if pyiqa is not installed, does not have a metric, or cannot download its weights.
    """
    try:
        pyiqa = import_pyiqa()
    except ImportError as error:
        wanted = ", ".join(names)
        advice = f"{installation('metrics')}, or choose metrics that --help lists"
        if set(names) & set(FROM_FILE):
            advice += f"; {', '.join(FROM_FILE)} need only --perceptual-weights FILE (docs/evaluation.md)"
        raise InputError(f"pyiqa is needed for {wanted}: {advice} ({error})") from error
    unknown = [name for name in names if name not in pyiqa.list_models()]
    if unknown:
        raise InputError(f"unknown metrics {', '.join(unknown)}: expected names from --help or from pyiqa.list_models()")
    return {name: _load(pyiqa, name, device) for name in names}


def compare_sets(metrics: dict[str, Metric], pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
    """Compute metrics of the kind "set" over all (name, image, reference), both of the same size.

    pyiqa reads folders, so both sets are written to temporary 8-bit PNG files, which treats enlarged and other images alike.

    Raises:
        InputError: for fewer than two images.
    """
    with TemporaryDirectory(prefix="tsdsr-eval-") as folder:
        results, references = Path(folder, "results"), Path(folder, "references")
        for name, image, reference in pairs:
            write_picture(results / f"{name}.png", Picture(image))
            write_picture(references / f"{name}.png", Picture(reference))
        if len(list(results.iterdir())) < 2:
            raise InputError(f"{', '.join(metrics)}: expected at least 2 images to compare sets")
        return {name: metric.score(str(results), str(references), num_workers=0) for name, metric in metrics.items()}


def _load(pyiqa: Any, name: str, device: torch.device) -> Metric:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pyiqa prints to standard output, which belongs to --json
            metric = pyiqa.create_metric(name, device=device)
    except OSError as error:
        advice = "connect to the internet for the first run, or copy the caches of torch and Hugging Face"
        raise InputError(f"metric {name}: its weights cannot be downloaded ({error}); {advice}") from error
    except ImportError as error:
        raise InputError(
            f"metric {name}: a package that pyiqa needs is missing: {installation('metrics')} ({error})"
        ) from error

    def score(*arguments: Any, **settings: Any) -> float:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return float(metric(*arguments, **settings))
        except Exception as error:  # metrics can raise anything for unsuitable images
            raise InputError(f"metric {name} fails: {type(error).__name__}: {error}") from error

    return Metric(score, "set" if name in SETS else "alone" if metric.metric_mode == "NR" else "pair")
