"""A training run in one file: configuration, step, weights, averages and optimisers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import torch_writer, write_files
from .config import Config, from_dict

FILE = "last.pt"
VERSION = 2
_SOURCES = {
    "autoencoder": "--base", "transformer": "--base", "teacher": "--teacher", "prompt": "--base, --embedding-dir or run.seed",
    "null prompt": "--null",
}  # fmt: skip
"""What is frozen, and where a run has it from."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on exactly where it stopped; random numbers follow from the step."""

    config: Config
    step: int
    """Optimiser steps done."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """By group and parameter."""
    average: Mapping[str, Tensor]
    """Of the first group's parameters."""
    optimisers: Mapping[str, Any]
    prompt: Mapping[str, Tensor]
    """``tokens`` and ``pooled`` that the student was trained with."""
    samples: int
    """Seen so far, over all processes."""
    frozen: Mapping[str, str]
    """Fingerprints of what was not trained (``Networks.frozen``)."""


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, all or nothing.

    Raises:
        OSError: where it cannot be written; the file that was there before stays.
    """
    values = {
        "version": VERSION, "config": json.dumps(asdict(checkpoint.config)), "step": checkpoint.step,
        "weights": checkpoint.weights, "average": checkpoint.average, "optimisers": checkpoint.optimisers,
        "prompt": checkpoint.prompt, "samples": checkpoint.samples, "frozen": dict(checkpoint.frozen),
    }  # fmt: skip
    try:
        write_files({path: torch_writer(values)})
    except OSError as error:
        raise OSError(f"{error}; the checkpoint before it stays") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what ``write_checkpoint`` wrote; nothing in the file is executed.

    Raises:
        ValueError: for a missing, damaged or foreign file.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(values, dict) or not {"version", "config"} <= set(values):
        raise ValueError(f"{path} is no checkpoint of this trainer")
    if values["version"] != VERSION:
        raise ValueError(f"{path} is a checkpoint of version {values['version']}, this program reads {VERSION}")
    names = ("step", "weights", "average", "optimisers", "prompt", "samples", "frozen")
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged; begin a new run")
    return Checkpoint(from_dict(json.loads(values["config"])), **{name: values[name] for name in names})


def check_frozen(checkpoint: Checkpoint, found: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where a checkpoint was trained beside others than the ``found`` ones; unknown ones pass."""
    for name, value in found.items():
        if checkpoint.frozen.get(name, value) != value:
            raise ValueError(
                f"the checkpoint was trained with another {name} than that of {_SOURCES[name]}: give what the run began with"
            )
