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

from ..files import atomic_path
from .config import Config, from_dict

FILE = "last.pt"
VERSION = 1


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
    autoencoder: str
    """Fingerprint of the one that was not trained (``Networks.autoencoder``)."""


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, all or nothing.

    Raises:
        OSError: where it cannot be written; the file that was there before stays.
    """
    values = {
        "version": VERSION, "config": json.dumps(asdict(checkpoint.config)), "step": checkpoint.step,
        "weights": checkpoint.weights, "average": checkpoint.average, "optimisers": checkpoint.optimisers,
        "prompt": checkpoint.prompt, "samples": checkpoint.samples, "autoencoder": checkpoint.autoencoder,
    }  # fmt: skip
    try:
        with atomic_path(path) as temporary:
            torch.save(values, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f"the checkpoint {path} could not be written, the one before it stays: {error}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what ``write_checkpoint`` wrote; nothing in the file is executed.

    Raises:
        ValueError: for a missing, damaged or foreign file.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that can be read: {error}") from error
    if not isinstance(values, dict) or not {"version", "config", "step", "weights"} <= set(values):
        raise ValueError(f"{path} is no checkpoint of this trainer")
    if values["version"] != VERSION:
        raise ValueError(f"{path} is a checkpoint of version {values['version']}, this program reads {VERSION}")
    config = from_dict(json.loads(values["config"]))
    names = ("step", "weights", "average", "optimisers", "prompt", "samples", "autoencoder")
    return Checkpoint(config, **{name: values[name] for name in names})


def check_autoencoder(checkpoint: Checkpoint, found: str) -> None:
    """Raise ``ValueError`` where a checkpoint was trained on another autoencoder than the ``found`` one."""
    if checkpoint.autoencoder != found:
        raise ValueError("the checkpoint was trained on another autoencoder than that of --base: give what the run began with")
