"""Model folders and the files in them."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "tsdsr"
"""Folder under ``models`` for bundles and prompt embeddings."""
_SUFFIXES = {".safetensors", ".pt"}


def register_folder() -> None:
    """Make ``models/tsdsr`` known to the host, beside folders of that name in ``extra_model_paths.yaml``."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, _SUFFIXES)  # a new folder starts without: every file is listed


def names(folders: tuple[str, ...], suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files in ``folders`` that end in one of ``suffixes``, without repeats.

    Subfolders are set off by ``/`` on every system, so that a workflow made on one opens on another.
    """
    found = [name for folder in folders for name in folder_paths.get_filename_list(folder) if name.endswith(suffixes)]
    return list(dict.fromkeys(name.replace(os.sep, "/") for name in found))


def find(folders: tuple[str, ...], name: str) -> Path:
    """The file that ``name`` stands for, from the first of ``folders`` that has it.

    Raises:
        ValueError: where there is none.
    """
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return Path(path)
    where = ", ".join(f"models/{folder}" for folder in folders)
    raise ValueError(f"{name!r} is in none of {where}: refresh the page if you moved it, and choose again")


def state(folders: tuple[str, ...], name: str | None) -> str:
    """Changes when the file does, so that a replaced file is read again; "" for None, a name that comes over a link."""
    if name is None:
        return ""
    try:
        status = find(folders, name).stat()
    except (ValueError, OSError):
        return ""
    return f"{status.st_mtime_ns} {status.st_size}"


def new_output(prefix: str) -> tuple[Path, str]:
    """The next free ``PREFIX_00001_.safetensors`` in the output folder, and the name to show.

    Raises:
        ValueError: for a prefix that leads out of the output folder.
    """
    base = Path(folder_paths.get_output_directory()).resolve()
    if not (base / prefix).resolve().is_relative_to(base):
        raise ValueError(f"filename_prefix {prefix!r} leads out of the output folder {base}: remove '..' and leading '/'")
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(base))
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    return path, str(Path(subfolder) / path.name)
