"""Metrics of pyiqa, which brings their networks and fetches their weights: an optional extra, imported only when asked for."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from ..image_io import Picture, write_picture

SETS = ("fid", "fid_dinov2", "sfid")
"""Metrics that compare the results as one set with the references as another."""


@dataclass(frozen=True)
class Metric:
    """A figure of pictures ``(1, 3, H, W)`` in 0..1."""

    score: Callable[..., float]
    kind: Literal["pair", "alone", "set"]
    """What ``score`` takes: an image and its reference, an image alone, or the paths of two folders."""


def load_metrics(names: list[str], device: torch.device) -> dict[str, Metric]:
    """The metrics that pyiqa calls ``names``, on ``device``.

    Raises:
        ValueError: where pyiqa is not installed, does not know a name, or has no weights and cannot fetch them.
    """
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError as error:
        wanted = ", ".join(names)
        advice = "pip install -e '.[metrics]', or choose metrics that --help lists by name"
        raise ValueError(f"pyiqa is needed for {wanted}: {advice} ({error})") from error
    unknown = [name for name in names if name not in pyiqa.list_models()]
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}: expected names of --help or of pyiqa.list_models()")
    return {name: _load(pyiqa, name, device) for name in names}


def compare_sets(metrics: dict[str, Metric], pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
    """Metrics of the kind "set" over all (name, image, reference), both pictures of the same size.

    pyiqa reads folders: both sets go through temporary 8-bit PNG files, so that all are read alike, enlarged or not.

    Raises:
        ValueError: for fewer than two pictures.
    """
    with TemporaryDirectory(prefix="tsdsr-eval-") as folder:
        results, references = Path(folder, "results"), Path(folder, "references")
        for name, image, reference in pairs:
            write_picture(results / f"{name}.png", Picture(image))
            write_picture(references / f"{name}.png", Picture(reference))
        if len(list(results.iterdir())) < 2:
            raise ValueError(f"{', '.join(metrics)}: sets of one picture cannot be compared; expected at least 2")
        return {name: metric.score(str(results), str(references), num_workers=0) for name, metric in metrics.items()}


def _load(pyiqa: Any, name: str, device: torch.device) -> Metric:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pyiqa talks on standard output, which --json keeps for itself
            metric = pyiqa.create_metric(name, device=device)
    except OSError as error:
        advice = "connect to the internet for the first run, or bring the caches of torch and Hugging Face along"
        raise ValueError(f"metric {name}: its weights cannot be fetched ({error}); {advice}") from error
    except ImportError as error:
        raise ValueError(f"metric {name}: a package of pyiqa's is missing: pip install -e '.[metrics]' ({error})") from error

    def score(*arguments: Any, **settings: Any) -> float:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return float(metric(*arguments, **settings))
        except Exception as error:  # of pictures that do not suit them, metrics raise whatever they stumble over
            raise ValueError(f"metric {name} fails: {type(error).__name__}: {error}") from error

    return Metric(score, "set" if name in SETS else "alone" if metric.metric_mode == "NR" else "pair")
