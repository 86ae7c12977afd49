"""Model folders and the files in them, and free names for new files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from datetime import datetime
from pathlib import Path, PureWindowsPath

import folder_paths

from ...tsdsr_core.weights.reading import PICKLED, SUFFIXES

FOLDER = "tsdsr"
"""Folder under ``models`` for bundles and prompt embeddings."""
_UNNAMED = "tsdsr"
"""Name of a file whose prefix only gives a folder."""
_LONGEST = 200
"""Bytes of a name, of 255 that file systems allow with the number and the suffix."""
_DATE = re.compile(r"%date:([^%]*)%")
_DATE_PART = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyy?y?")
_ODD = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')
"""Characters that some system does not allow in names."""


def register_folder() -> None:
    """Make ``models/tsdsr`` known to the host, beside folders of that name in ``extra_model_paths.yaml``."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*SUFFIXES, PICKLED})  # without suffixes, every file is listed


def names(folders: tuple[str, ...], suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Names of the files in ``folders`` that end in one of ``suffixes``, in any case, without repeats.

    Subfolders are set off by ``/`` on every system, so that a workflow made on one opens on another.
    """
    listed = (name for folder in folders for name in folder_paths.get_filename_list(folder))
    found = [name for name in listed if name.lower().endswith(suffixes)]
    return list(dict.fromkeys(name.replace(os.sep, "/") for name in found))


def find(folders: tuple[str, ...], name: str) -> Path:
    """The path of the file ``name``, from the first of ``folders`` that has it.

    Raises:
        ValueError: where there is none.
    """
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return Path(path)
    where = " or ".join(f"models/{folder}" for folder in folders)
    raise ValueError(f"{name!r} was not found in {where}: put it there, press R to refresh the list, and choose it again")


def state(folders: tuple[str, ...], name: str | None) -> str:
    """Changes when the file does, so that a replaced file is read again; when any file does if a link gives the name (None)."""
    if name is None:
        return " ".join(state(folders, each) for each in names(folders, (*SUFFIXES, PICKLED)))
    try:
        return stamp(find(folders, name))
    except ValueError:
        return ""


def stamp(path: Path) -> str:
    """Changes when the file at ``path`` does; "" where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_size}"


def output_prefix(prefix: str, now: datetime | None = None) -> str:
    """A prefix typed by a user, as a path below the output folder that ends in a name every system allows.

    ``%date:FORMAT%`` is filled in as the frontend does it for the stock nodes; the host fills in the rest.  The suffix
    ``.safetensors`` is taken off, and a prefix that only names a folder gets a name.

    Raises:
        ValueError: for a prefix that points outside the output folder, or a name that is too long.
    """
    base = Path(folder_paths.get_output_directory()).resolve()
    try:
        prefix.encode()
    except UnicodeEncodeError:
        raise ValueError(f"filename_prefix {prefix[:40]!r} has a character that no file name can have: remove it") from None
    text = _DATE.sub(lambda match: _date(match[1], now or datetime.now()), prefix).replace("\\", "/")
    absolute = Path(text).is_absolute()
    text = _ODD.sub("_", text) if not absolute else text.replace("\0", "_")
    wanted = os.path.normpath(base / text)
    try:
        inside = Path(wanted).is_relative_to(base) and Path(wanted).resolve().is_relative_to(base)
    except (OSError, RuntimeError) as error:  # a link to itself, or a path too long
        raise ValueError(f"filename_prefix {prefix[:40]!r} cannot be used ({error}): choose another one") from error
    if not inside or (not absolute and PureWindowsPath(prefix).is_absolute()):
        raise ValueError(f"filename_prefix {prefix!r} points outside the output folder {base}: remove '..' and the leading '/'")
    parts = [_ODD.sub("_", part).strip().rstrip(". ") or "_" for part in Path(wanted).relative_to(base).parts]
    if not parts or text.endswith(("/", "/.", "/..")):
        parts.append(_UNNAMED)
    for suffix in SUFFIXES:
        if parts[-1].lower().endswith(suffix):
            parts[-1] = parts[-1][: -len(suffix)] or _UNNAMED
    if any(len(os.fsencode(part)) > _LONGEST for part in parts):
        raise ValueError(f"filename_prefix {prefix[:40]!r}... has a name longer than {_LONGEST} bytes: choose a shorter one")
    return "/".join(parts)


def new_output(prefix: str, listed: Collection[str] = ()) -> tuple[Path, str]:
    """The next free ``PREFIX_00001_.safetensors`` in the output folder, and the name to show.

    Args:
        listed: names in the loader's list: the new file gets none of them, or the loader would take the other file.

    Raises:
        ValueError: as ``output_prefix``, and where a file stands in the place of a folder.
    """
    wanted = output_prefix(prefix)
    base = str(Path(folder_paths.get_output_directory()).resolve())
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(wanted, base)
    except (NotADirectoryError, FileExistsError) as error:
        raise ValueError(f"filename_prefix {prefix!r}: {error.filename} is a file, not a folder") from error
    except OSError as error:
        raise ValueError(f"filename_prefix {prefix[:40]!r}: {error.strerror or error}: choose another one") from error
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    taken = {Path(each).name for each in listed}
    while os.path.lexists(path) or path.name in taken:  # the host counts by the names it understands
        counter += 1
        path = path.with_name(f"{name}_{counter:05}_.safetensors")
    return path, str(Path(subfolder) / path.name)


def _date(pattern: str, now: datetime) -> str:
    """``yyyy-MM-dd hh:mm:ss`` and parts of it."""
    values = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def fill(match: re.Match[str]) -> str:
        part = match[0]
        if part[0] in values:
            return str(values[part[0]]).zfill(len(part))
        return {"yy": f"{now.year % 100:02}", "yyyy": str(now.year)}.get(part, part)

    return _DATE_PART.sub(fill, pattern)
