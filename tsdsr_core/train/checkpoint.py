"""Checkpoints: a training run in one file, with configuration, step, weights, averaged weights and optimiser states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..system.atomic import no_file, torch_writer, write_files
from ..weights.reading import check_weights, is_finite, load_pickle, parse_json
from .config import Config
from .config_file import from_dict

FILE = "last.pt"
VERSION = 2
_AGAIN = "download it again, or start a new run"
_SOURCES = {
    "autoencoder": "--base", "transformer": "--base", "teacher": "--teacher", "prompt": "--base, --embedding-dir or run.seed",
    "null prompt": "--null",
}  # fmt: skip
"""Options that give each frozen network or prompt, for messages."""
_KINDS = {
    "step": int, "weights": dict, "average": dict, "optimisers": dict, "prompt": dict, "samples": int, "frozen": dict,
}  # fmt: skip
"""Types of the file's entries, other than version and configuration."""
_AVERAGES = "exp_avg", "exp_avg_sq"
"""AdamW's names of its running means of a parameter's gradients and squared gradients."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to continue exactly where it stopped; random numbers are a function of the step."""

    config: Config
    step: int
    """Optimiser steps done."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """Trained weights by group and parameter."""
    average: Mapping[str, Tensor]
    """Averaged weights of the first group, by parameter."""
    optimisers: Mapping[str, Any]
    prompt: Mapping[str, Tensor]
    """``tokens`` and ``pooled`` that the student was trained with."""
    samples: int
    """Training samples seen so far, over all processes."""
    frozen: Mapping[str, str]
    """Fingerprints of the networks and prompts that were not trained (``Networks.frozen``)."""


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, all or nothing.

    Raises:
        OSError: if it cannot be written; an existing file is kept.
    """
    values = {
        "version": VERSION, "config": json.dumps(asdict(checkpoint.config)), "step": checkpoint.step,
        "weights": checkpoint.weights, "average": checkpoint.average, "optimisers": checkpoint.optimisers,
        "prompt": checkpoint.prompt, "samples": checkpoint.samples, "frozen": dict(checkpoint.frozen),
    }  # fmt: skip
    try:
        write_files({path: torch_writer(values)})
    except OSError as error:
        raise OSError(f"{error}{'; the previous checkpoint is kept' if path.exists() else ''}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what ``write_checkpoint`` wrote; nothing in the file is executed.

    Raises:
        InputError: for a missing, damaged or foreign file.
    """
    if not path.is_file():
        raise InputError(f"{path} {no_file(path)}: expected a checkpoint of tsdsr train")
    values = load_pickle(path, _AGAIN)
    if not isinstance(values, dict) or not {"version", "config"} <= set(values):
        raise InputError(f"{path} is not a checkpoint of tsdsr train")
    if type(values["version"]) is not int or values["version"] != VERSION:
        raise InputError(f"{path} is a checkpoint of version {values['version']}: this program reads version {VERSION}")
    missing = [name for name in _KINDS if name not in values]
    if missing:
        raise InputError(f"{path} is damaged, {', '.join(missing)} missing: start a new run")
    for name, kind in _KINDS.items():
        if not isinstance(values[name], kind):
            raise InputError(f"{path} is damaged: {name} is a {type(values[name]).__name__}")
    for tensors in (*values["weights"].values(), values["average"], values["prompt"]):
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise InputError(f"{path} is damaged: some of its weights are not tensors")
        if not all(isinstance(name, str) and name for name in tensors):
            raise InputError(f"{path} is damaged: some of its weights have no name")
        check_weights(path, tensors, _AGAIN)
    if set(values["prompt"]) != {"tokens", "pooled"}:
        raise InputError(f"{path} is damaged: its prompt is incomplete")
    try:
        config = from_dict(parse_json(values["config"]))
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} has an invalid configuration: {error}") from error
    return Checkpoint(config, **{name: values[name] for name in _KINDS})


def check_frozen(checkpoint: Checkpoint, found: Mapping[str, str]) -> None:
    """Raise ``InputError`` if a checkpoint was trained with other frozen networks or prompts than those ``found``.

    Args:
        found: fingerprints by name, as ``Networks.frozen``; names that the checkpoint does not have are not checked.
    """
    for name, value in found.items():
        if checkpoint.frozen.get(name, value) != value:
            raise InputError(
                f"the checkpoint was trained with another {name} than {_SOURCES[name]} gives: use the one the run started with"
            )


def check_optimiser(checkpoint: Checkpoint, group: str, parameters: Sequence[Tensor]) -> None:
    """Raise ``InputError`` unless a checkpoint's optimiser state fits a group's ``parameters``.

    Parameters that no step has trained yet have no state.
    """
    optimiser = checkpoint.optimisers.get(group)
    found = optimiser.get("state") if isinstance(optimiser, dict) else None
    if not isinstance(found, dict) or not all(
        number in range(len(parameters)) and _are_averages(averages, parameters[number]) for number, averages in found.items()
    ):
        raise InputError(
            f"the optimiser of the {group} in the checkpoint is missing, damaged or of another model: start a new run, or use "
            "the models that the run started with"
        )


def _are_averages(found: Any, parameter: Tensor) -> bool:
    """Whether AdamW's state of a parameter is complete and finite."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), Tensor) for name in ("step", *_AVERAGES)):
        return False
    averages = [found[name] for name in _AVERAGES]
    return found["step"].numel() == 1 and all(each.shape == parameter.shape and is_finite(each) for each in averages)
