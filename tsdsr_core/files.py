"""Writing files all or nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

Write = Callable[[Path], None]
"""Writes a file's contents to a path."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well and vanishes when it does not.

    Missing folders are made.  The suffix is kept, since writers choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:32]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(writers: Mapping[Path, Write]) -> None:
    """Write files together: each takes its name only when all are written.

    Raises:
        OSError: naming the file that cannot be written; nothing half-written stays.
    """
    with ExitStack() as stack:
        temporaries = {path: stack.enter_context(atomic_path(path)) for path in writers}
        for path, write in writers.items():
            try:
                write(temporaries[path])
            except (OSError, SafetensorError) as error:  # the latter for a full disk, for one
                raise OSError(f"{path} could not be written: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, all or nothing, from any device.

    Raises:
        OSError: where it cannot be written.
    """
    write_files({path: safetensors_writer(tensors, metadata)})


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Write:
    """What writes a safetensors file of tensors on any device."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return lambda path: save_file(ready, path, None if metadata is None else dict(metadata))


def torch_writer(values: Any) -> Write:
    """What writes a file of ``torch.save``."""

    def write(path: Path) -> None:
        try:
            torch.save(values, path)
        except RuntimeError as error:  # so does torch report a full disk
            raise OSError(str(error).partition("\n")[0]) from error

    return write


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
