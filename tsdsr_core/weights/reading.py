"""Reads weight files without executing anything in them, with one clear error for whatever is wrong."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import some
from ..errors import InputError
from ..system.atomic import reason

SUFFIXES = (".safetensors", ".sft")
"""Suffixes of safetensors files, in lower case."""
PICKLED = ".pt"
"""Suffix of files written by ``torch.save``."""
_AGAIN = "download it again"
_OPEN_FILES = "/dev/fd"
"""The folder in which POSIX systems show a process its open files."""
_SNIFFED = 1024
"""Bytes of a file by which its kind is recognised."""


@contextmanager
def open_tensors(path: Path, again: str = _AGAIN) -> Iterator[Any]:
    """Open an existing file with ``safetensors.safe_open``.

    Args:
        again: advice for the error message on how to get an intact file.

    Raises:
        InputError: if the file cannot be read, is damaged, or is of another kind, with its name; also inside the block.
    """
    _check_content(path, "a safetensors file", again)
    try:
        with _encodable(path) as name, safe_open(name, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is damaged, truncated or not a safetensors file: {again} ({reason(error)})") from error


def load_pickle(path: Path, again: str = _AGAIN) -> Any:
    """Load an existing file written by ``torch.save`` to the CPU: tensors and plain containers only (``weights_only``).

    Args:
        again: as for ``open_tensors``.

    Raises:
        InputError: if the file cannot be read, is damaged, or holds anything else, with its name.
    """
    _check_content(path, "a PyTorch file", again)
    try:
        with _encodable(path) as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles not written by torch
            return torch.load(name, map_location="cpu", weights_only=True)
    except (MemoryError, InputError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{path} is damaged, or holds something other than tensors and plain values: {again}; nothing in it was executed"
        ) from error


def read_tensors(path: Path, again: str = _AGAIN) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, and its metadata; the values are not checked (see ``check_weights``).

    Args:
        again: as for ``open_tensors``.

    Raises:
        InputError: as ``open_tensors``.
    """
    with open_tensors(path, again) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return tensors, file.metadata() or {}


def check_types(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``InputError``, with ``path``, if a tensor does not hold floating-point numbers; values are not read."""
    odd = [key for key, tensor in tensors.items() if not is_dense(tensor)]
    if odd:
        raise InputError(f"{path} holds sparse, nested, quantised or empty tensors in {some(odd)}: expected dense ones")
    foreign = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if foreign:
        kind = str(tensors[foreign[0]].dtype).removeprefix("torch.")
        raise InputError(f"{path} holds {kind} numbers in {some(foreign)}: expected floating-point weights")


def check_weights(path: Path, tensors: Mapping[str, Tensor], again: str = _AGAIN) -> None:
    """Raise ``InputError``, with ``path``, if a tensor does not hold floating-point numbers, or holds NaN or infinity."""
    check_types(path, tensors)
    damaged = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if damaged:
        raise InputError(f"{path} has NaN or infinite values in {some(damaged)}: it is damaged, {again}")


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary array of values; files of torch may hold others.

    >>> is_dense(torch.ones(2)), is_dense(torch.ones(2).to_sparse()), is_dense(torch.ones(2, device="meta"))
    (True, False, False)
    """
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in fp32 too; needs no memory of their size, except for 8-bit floats.

    >>> is_finite(torch.ones(2)), is_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if tensor.numel() == 0:
        return True
    ends = torch.aminmax(tensor.half() if tensor.element_size() == 1 else tensor)  # NaN propagates
    return bool(torch.isfinite(ends.min.float()) and torch.isfinite(ends.max.float()))


def parse_json(text: str) -> Any:
    """Parse standard JSON, without NaN and infinite numbers.

    Raises:
        ValueError: for anything else.
    """

    def refuse(name: str) -> None:
        raise InputError(f"{name} is not a number in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise InputError("it is nested too deeply") from error
    except ValueError as error:
        if not str(error).startswith("Exceeds the limit"):  # Python's advice is for programmers
            raise
        raise InputError("it has a number of thousands of digits") from error


@contextmanager
def _encodable(path: Path) -> Iterator[Path]:
    """A name of an existing file that is UTF-8: safetensors and torch take no other, and would call the file damaged."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        if not Path(_OPEN_FILES).is_dir():  # Windows
            raise InputError(f"{path}: its name cannot be written in UTF-8: rename it") from None
        with path.open("rb") as file:
            yield Path(_OPEN_FILES, str(file.fileno()))
    else:
        yield path


def _check_content(path: Path, expected: str, again: str = _AGAIN) -> None:
    """Raise ``InputError`` if the first bytes of a file show that it is not ``expected``."""
    try:
        with path.open("rb") as file:
            start = file.read(_SNIFFED)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    found = _kind(start, again)
    if found is None or found[0] == expected:
        return
    kind, advice = found
    raise InputError(f"{path} is {kind}, not {expected}: {advice}")


def _kind(start: bytes, again: str) -> tuple[str, str] | None:
    """The kind of a file with these first bytes, and advice; None if it is not recognised."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return "empty", again
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:  # before text, as the length may look like it
        return "a safetensors file", "rename it to .safetensors"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", f"run git lfs pull, or {again}"
    if text.startswith(b"<"):
        return "a web page", f"the download failed, {again}"
    if text.startswith(b"{"):
        return "a text file", f"the download failed, {again}"
    if start.startswith(b"PK\x03\x04"):
        return "a PyTorch file", "use the .safetensors file, or convert it"
    if start.startswith(b"GGUF"):
        return "a GGUF file", "use the .safetensors file"
    return None
