"""Finds the input files of a command and plans its output files, before any work."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from .formats import FORMATS, READ_ONLY, advice, is_readable, kind_of


@dataclass(frozen=True)
class Job:
    """One file to make."""

    input: Path
    output: Path
    skip: bool = False
    """Whether the result exists already and is kept."""


@dataclass(frozen=True)
class Inputs:
    """The input images of a command."""

    paths: tuple[Path, ...]
    single: bool
    """Whether the input is a single named file, so that the output may be a file."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of other files in the folders by kind, without hidden files and subfolders."""


def collect(inputs: Sequence[str]) -> Inputs:
    """Expand files, folders (without subfolders) and globs to image files.

    Raises:
        InputError: for an input without images.
    """
    found: dict[Path, None] = {}
    left_out: Counter[str] = Counter()
    for text in inputs:
        path = Path(text)
        others: Counter[str] = Counter()
        if path.is_dir():
            matches = [entry for entry in sorted(path.iterdir()) if is_image(entry)]
            others = Counter(_kind(entry) for entry in set(path.iterdir()) - set(matches) if _counts(entry))
            left_out += others
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True)) if Path(match).is_file()]
        if not matches:
            what = "no such file, folder or glob"
            if path.is_dir():
                what = f"no images in this folder ({', '.join(FORMATS)})" + (f"; {say_left_out(others)}" if others else "")
            raise InputError(f"{text}: {what}")
        found.update(dict.fromkeys(matches))
    return Inputs(tuple(found), len(inputs) == 1 and Path(inputs[0]).is_file(), dict(left_out))


def is_image(path: Path) -> bool:
    """Whether ``path`` is a file with the suffix of an image that can be read, and not hidden."""
    return is_readable(path) and not path.name.startswith(".") and path.is_file()


def _counts(path: Path) -> bool:
    return not path.name.startswith(".") and not path.is_dir()


def _kind(path: Path) -> str:
    if path.is_file():
        return kind_of(path)
    return "broken link" if path.is_symlink() else "special file"


def say_left_out(kinds: Mapping[str, int]) -> str:
    """A message about the files of folders that are skipped.

    >>> say_left_out({"GIF": 2, "txt": 1})
    'left out 3 other files: 2 GIF, 1 txt'
    """
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    total = sum(kinds.values())
    return f"left out {total} other file{'s' if total > 1 else ''}: {counts}{advice(set(kinds))}"


def result_name(path: Path) -> str:
    """Name of a result in a folder: the input's name, but with ``.png`` for formats that cannot be written."""
    return path.with_suffix(".png").name if path.suffix.lower() in READ_ONLY else path.name


def plan_jobs(
    inputs: Inputs,
    output: str | Path,
    existing: str,
    formats: Collection[str] = FORMATS,
    names: Mapping[Path, str] | None = None,
) -> list[Job]:
    """Assign an output file to each input.

    Args:
        output: a file for a single input, otherwise a folder, in which ``names`` gives the names. Text that ends with a
            separator is always a folder.
        existing: "error", "skip" or "overwrite": what to do if a result exists.
        formats: the suffixes of results.
        names: of the results in a folder; by default those of ``result_name``.

    Raises:
        InputError: if results would overwrite each other, an input or, with "error", an existing file.
    """
    ends_in_separator = str(output).endswith(tuple(filter(None, (os.sep, os.altsep))))  # which a Path drops
    output = Path(output)
    is_folder = ends_in_separator or output.is_dir()
    names_file = output.suffix.lower() in formats and not is_folder
    if inputs.single and names_file:
        outputs = [output]
    elif names_file:
        odd = next((path for path in inputs.paths if len(inputs.paths) == 1 and not path.is_file()), None)
        what = f"{odd} is a pipe or device, which cannot be read: give an image file" if odd else ""
        raise InputError(what or f"-o {output}: expected a folder, since the input is not a single file")
    elif inputs.single and output.suffix and not is_folder:
        raise InputError(
            f"-o {output}: unknown format {output.suffix!r}; expected one of {', '.join(formats)}, or a folder; "
            f"a new folder of this name needs a {os.sep} at the end"
        )
    elif output.is_file():
        raise InputError(f"-o {output} is an existing file: expected a folder, or a file of the formats {', '.join(formats)}")
    else:
        outputs = [output / (names[path] if names else result_name(path)) for path in inputs.paths]
    sources = {os.path.realpath(path) for path in inputs.paths}
    taken: dict[str, Path] = {}
    for path, result in zip(inputs.paths, outputs, strict=True):
        target = os.path.realpath(result)
        if target in sources:
            raise InputError(f"{result} would overwrite an input: choose another -o")
        if target in taken:
            raise InputError(f"{taken[target]} and {path} would both be written to {result}: process them separately")
        taken[target] = path
    check_existing(outputs, existing, ("overwrite", "skip"))
    return [
        Job(path, result, skip=existing == "skip" and result.exists())
        for path, result in zip(inputs.paths, outputs, strict=True)
    ]


def check_existing(outputs: Sequence[Path], existing: str, choices: Sequence[str] = ("overwrite",)) -> None:
    """Raise ``InputError`` if an output is a folder, or exists and ``existing`` is "error".

    Args:
        choices: other values of ``--existing``, for the message.
    """
    there = [path for path in outputs if path.exists()]
    for path in there:
        if path.is_dir():
            raise InputError(f"{path} is a folder, but a file is to be written there: rename it, or choose another -o")
    if there and existing == "error":
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        advice = " or ".join(f"--existing {choice}" for choice in choices)
        raise InputError(f"{there[0]}{more} exists already: add {advice}")
