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
_FLOATS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""Types of weights in safetensors files that torch calculates with, and torch's names of them."""
_OTHERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64")
"""Types that torch holds, but that no weights have."""
_WANTED = "expected floating-point weights of at least 8 bits with a sign (F32, F16, BF16, F8_E4M3, ...)"
_LONGEST_HEADER = 100_000_000
"""Bytes of a header that safetensors accepts."""


class TensorFile:
    """An open safetensors file; a tensor whose type torch cannot calculate with is an ``InputError`` that names both."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def metadata(self) -> dict[str, str]:
        return self._file.metadata() or {}

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor in elements; the tensor is not read."""
        return tuple(self._file.get_slice(key).get_shape())

    def get_slice(self, key: str) -> Any:
        """A view of which parts can be read by indexing."""
        self._check(key)
        return self._file.get_slice(key)

    def get_tensor(self, key: str) -> Tensor:
        self._check(key)
        return self._file.get_tensor(key)

    def _check(self, key: str) -> None:
        kind = str(self._file.get_slice(key).get_dtype())
        if kind not in _FLOATS and kind not in _OTHERS:
            raise InputError(f"{self._path} holds {kind} numbers in {key}: {_WANTED}")


@contextmanager
def open_tensors(path: Path, again: str = _AGAIN) -> Iterator[TensorFile]:
    """Open an existing file with ``safetensors.safe_open``.

    Args:
        again: advice for the error message on how to get an intact file.

    Raises:
        InputError: if the file cannot be read, is damaged, or is of another kind, with its name; also inside the block.
    """
    _check_content(path, "a safetensors file", again)
    try:
        with _encodable(path) as name, safe_open(name, framework="pt") as file:
            yield TensorFile(path, file)
    except SafetensorError as error:
        if unknown := _unknown_type(path):
            kind, key = unknown
            raise InputError(f"{path} holds {kind} numbers in {key}: {_WANTED}") from error
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
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        return tensors, file.metadata()


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file by key, from its header.

    Raises:
        InputError: as ``open_tensors``.
    """
    with open_tensors(path) as file:
        return {key: file.shape(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping


def check_types(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``InputError``, with ``path``, if a tensor holds no floating-point numbers that torch calculates with.

    Values are not read.
    """
    odd = [key for key, tensor in tensors.items() if not is_dense(tensor)]
    if odd:
        raise InputError(f"{path} holds sparse, nested, quantised or empty tensors in {some(odd)}: expected dense ones")
    kinds = {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
    foreign = [key for key, kind in kinds.items() if kind not in _FLOATS.values()]
    if foreign:
        raise InputError(f"{path} holds {kinds[foreign[0]]} numbers in {some(foreign)}: {_WANTED}")


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


def _unknown_type(path: Path) -> tuple[str, str] | None:
    """A type that safetensors does not know, as a newer version may, and a tensor of it; None if that is not the fault."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, _LONGEST_HEADER)).decode())
        kinds = {key: entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    known = {*_FLOATS, *_OTHERS}
    return next(((kind, key) for key, kind in kinds.items() if isinstance(kind, str) and kind not in known), None)


def _begins_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do.

    Raises:
        InputError: if it cannot be read.
    """
    return _begins_safetensors(first_bytes(path))


def first_bytes(path: Path) -> bytes:
    """The first bytes of an existing file, enough to recognise its kind.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(_SNIFFED)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def _check_content(path: Path, expected: str, again: str = _AGAIN) -> None:
    """Raise ``InputError`` if the first bytes of a file show that it is not ``expected``."""
    found = _kind(first_bytes(path), again)
    if found is None or found[0] == expected:
        return
    kind, advice = found
    raise InputError(f"{path} is {kind}, not {expected}: {advice}")


def _kind(start: bytes, again: str) -> tuple[str, str] | None:
    """The kind of a file with these first bytes, and advice; None if it is not recognised."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return "empty", again
    if _begins_safetensors(start):  # before text, as the length may look like it
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
