"""The weights file of LPIPS and DISTS.

It is a safetensors file.  The metadata entry ``tsdsr_perceptual`` holds JSON: ``version`` and ``sources``, which gives for
each part its package, licence and the SHA-256 of the archive.  Tensors, in fp32:

- ``alexnet.N.weight`` ``(out, in, h, w)`` and ``alexnet.N.bias``, ``vgg16.N.weight`` and ``vgg16.N.bias``: the convolutions;
- ``lpips.alexnet.N`` and ``lpips.vgg16.N`` ``(channels,)``: the linear weights of LPIPS, by stage;
- ``dists.alpha`` and ``dists.beta`` ``(1475,)``: the weights of DISTS, by channel of the image and of each stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ...system.atomic import no_file, write_tensors
from ...weights.reading import check_weights, parse_json, read_tensors
from .backbones import CHANNELS, shapes

VERSION = 1
METADATA_KEY = "tsdsr_perceptual"
_ADVICE = "make one with tsdsr perceptual-weights (see docs/evaluation.md)"


@dataclass(frozen=True)
class Weights:
    """Checked weights, fp32."""

    tensors: Mapping[str, Tensor]
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """``package``, ``license`` and ``sha256`` by part."""


def expected_shapes() -> dict[str, torch.Size]:
    """Shapes of all tensors by name."""
    found = {**shapes("alexnet"), **shapes("vgg16")}
    found |= {f"lpips.{net}.{i}": torch.Size((n,)) for net, counts in CHANNELS.items() for i, n in enumerate(counts)}
    channels = torch.Size((3 + sum(CHANNELS["vgg16"]),))
    return {**found, "dists.alpha": channels, "dists.beta": channels}


def check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` for a missing tensor or a wrong shape."""
    for name, shape in expected_shapes().items():
        if name not in tensors:
            raise InputError(f"the tensor {name} is missing")
        if tensors[name].shape != shape:
            raise InputError(f"{name} has shape {tuple(tensors[name].shape)}: expected {tuple(shape)}")


def write_weights(path: Path, weights: Weights) -> None:
    """Write a file, all or nothing.

    Raises:
        InputError: for missing tensors or wrong shapes.
        OSError: if it cannot be written.
    """
    check_shapes(weights.tensors)
    metadata = {METADATA_KEY: json.dumps({"version": VERSION, "sources": weights.sources})}
    write_tensors(path, {name: weights.tensors[name].float() for name in expected_shapes()}, metadata)


def read_weights(path: Path) -> Weights:
    """Read a file that ``write_weights`` wrote.

    Raises:
        InputError: for a missing, damaged or unknown file, with its name.
    """
    if not path.is_file():
        raise InputError(f"{path} {no_file(path)}: expected a file of perceptual weights; {_ADVICE}")
    tensors, metadata = read_tensors(path, _ADVICE)
    try:
        sources = _sources(metadata)
        check_shapes(tensors)
    except ValueError as error:
        raise InputError(f"{path} is not a file of perceptual weights: {error}; {_ADVICE}") from error
    check_weights(path, tensors, _ADVICE)
    return Weights({name: tensor.float() for name, tensor in tensors.items()}, sources)


def _sources(metadata: Mapping[str, str]) -> dict[str, dict[str, str]]:
    if METADATA_KEY not in metadata:
        raise InputError(f"its metadata has no {METADATA_KEY}")
    header = parse_json(metadata[METADATA_KEY])
    if not isinstance(header, dict) or header.get("version") != VERSION or not isinstance(header.get("sources", {}), dict):
        raise InputError(f"its {METADATA_KEY} is {metadata[METADATA_KEY]:.80}: expected version {VERSION}")
    return header.get("sources", {})
