"""Writes files completely or not at all, and explains in words why a file cannot be written or read."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

Write = Callable[[Path], None]
"""Writes a file's contents to a path."""

_REASONS = {
    errno.ENOSPC: "no space left on the device", errno.EACCES: "permission denied", errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only", errno.ENOENT: "no such file or folder", errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of its path is not a folder", errno.EEXIST: "a part of its path is not a folder",
    errno.ELOOP: "a symbolic link in its path leads back to itself", errno.ENAMETOOLONG: "the name is too long",
    errno.EFBIG: "the file would be larger than is allowed",
    **({errno.EDQUOT: "the disk quota is used up"} if hasattr(errno, "EDQUOT") else {}),
}  # fmt: skip
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Errors for want of room, which need other means than another command; Windows has no EDQUOT."""
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
"""Errors of file systems that do not support fsync."""


class _WriteError(OSError):
    """A file cannot be written; the message has its name and the reason."""


def reason(error: BaseException) -> str:
    """The reason of an error in words, on one line, without error numbers and names of temporary files."""
    number = _number(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON (line {error.lineno}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if number is not None:
        return _REASONS.get(number) or os.strerror(number)
    said = str(error).strip().partition("\n")[0].rstrip(":")  # a colon would announce the lines that are cut off
    if not re.search(r"[^\W\d_]{2}", said):  # nothing, or only a number, as for a missing key
        said = "not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__} {said}".strip()
    return said


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there is no more room for files."""
    return _number(error) in _FULL or (error.__cause__ is not None and is_full(error.__cause__))


def _number(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors tells only in words."""
    if isinstance(error, SafetensorError) and (said := re.search(r"os error (\d+)", str(error))):
        return int(said[1])
    return error.errno if isinstance(error, OSError) else None


def no_file(path: Path) -> str:
    """What ``path`` is, if it is not a regular file: the end of a sentence, such as "does not exist"."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a symbolic link to a file that does not exist" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"


def one_line(text: str) -> str:
    """Escape everything that is not printable: line ends, control characters and undecodable bytes of file names.

    >>> one_line("photo\\n1")
    'photo\\\\n1'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def check_target(path: Path) -> None:
    """Raise the ``OSError`` of ``write_bytes`` early if it is clear that ``path`` cannot be written."""
    with _named(path):
        with suppress(FileNotFoundError):
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
        folder = _real(path).parent
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise OSError(f"{folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
            raise OSError(errno.EROFS if read_only else errno.EACCES, "")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, all or nothing. Missing folders are created; for a symbolic link, its target is written.

    Raises:
        OSError: if that fails, with ``path`` and the reason.
    """
    write_files({path: bytes_writer(data)})


def write_files(writers: Mapping[Path, Write]) -> None:
    """Write several files, all or none: they replace existing files only when all of them are complete.

    Raises:
        OSError: with the file that cannot be written and the reason; no partial file is left behind.
    """
    with ExitStack() as stack:
        temporaries = {path: stack.enter_context(_temporary(path)) for path in writers}
        for path, write in writers.items():
            with _named(path):
                write(temporaries[path])
                _sync(temporaries[path])


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary file next to ``path`` that replaces it when the block succeeds, and is removed when it fails."""
    check_target(path)
    target = _real(path)
    with _new_folders(path, target.parent):
        with _named(path):
            start = f".{path.stem[:32]}-"  # shortened, since names have at most 255 bytes
            handle, name = tempfile.mkstemp(prefix=start, dir=target.parent)
            os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with _named(path):
                temporary.chmod(0o666 & ~_umask())  # mkstemp creates private files
                temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def _new_folders(path: Path, folder: Path) -> Iterator[None]:
    """Create ``folder`` and its missing parents; if the block fails, remove those that are still empty."""
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        with _named(path):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):  # not empty: another program has used it
                each.rmdir()
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn errors of the block into ones that name ``path``."""
    try:
        yield
    except _WriteError:
        raise
    except (OSError, SafetensorError) as error:
        raise _WriteError(f"{path} could not be written: {reason(error)}") from error


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _sync(path: Path) -> None:
    """Flush a file to the disk; some file systems report a full disk only then."""
    with path.open("r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, from any device, to a safetensors file, all or nothing.

    Raises:
        OSError: if it cannot be written.
    """
    write_files({path: safetensors_writer(tensors, metadata)})


def bytes_writer(data: bytes) -> Write:
    """A function that writes ``data``; for ``write_files``."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(data)

    return write


def safetensors_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Write:
    """A function that writes tensors, from any device, to a safetensors file; for ``write_files``."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return lambda path: save_file(ready, path, None if metadata is None else dict(metadata))


def torch_writer(values: Any) -> Write:
    """A function that writes ``values`` with ``torch.save``; for ``write_files``."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            target = _ErrorKeepingFile(file)
            try:
                torch.save(values, target)  # pyright: ignore[reportArgumentType]
            except RuntimeError as error:  # torch hides the reason, such as a full disk
                raise target.error or OSError(reason(error)) from error

    return write


class _ErrorKeepingFile:
    """A file object that keeps the error raised by writing to it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
