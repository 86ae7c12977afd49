"""Which files a command reads and writes, settled before any work."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .image_io import FORMATS


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    input: Path
    output: Path
    skip: bool = False
    """The result is there already."""


@dataclass(frozen=True)
class Inputs:
    """The pictures that were asked for."""

    paths: tuple[Path, ...]
    single: bool
    """Whether one file was named, so that the output may be a file too."""


def collect(inputs: Sequence[str]) -> Inputs:
    """Expand files, folders (their pictures, not those of subfolders) and globs.

    Raises:
        ValueError: for an input that gives no picture.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if is_picture(p))
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True)) if Path(match).is_file()]
        if not matches:
            what = f"a folder without pictures ({', '.join(FORMATS)})" if path.is_dir() else "no such file, folder or glob"
            raise ValueError(f"{text}: {what}")
        found.update(dict.fromkeys(matches))
    return Inputs(tuple(found), len(inputs) == 1 and Path(inputs[0]).is_file())


def is_picture(path: Path) -> bool:
    """Whether ``path`` is a file with a picture's suffix; the hidden files of some systems are not."""
    return path.suffix.lower() in FORMATS and not path.name.startswith(".") and path.is_file()


def plan_jobs(inputs: Inputs, output: Path, existing: str) -> list[Job]:
    """Pair each input with its output.

    Args:
        output: a file for a single input, else a folder; results keep the names of their inputs.
        existing: "error", "skip" or "overwrite" where a result is there already.

    Raises:
        ValueError: where results would collide with each other, with an input or, by choice, with an existing file.
    """
    names_file = output.suffix.lower() in FORMATS and not output.is_dir()
    if inputs.single and names_file:
        outputs = [output]
    elif names_file:
        raise ValueError(f"-o {output}: expected a folder, since the input is not one named file")
    elif inputs.single and output.suffix and not output.is_dir():
        raise ValueError(f"-o {output}: unknown format {output.suffix!r}; expected one of {', '.join(FORMATS)}, or a folder")
    elif output.is_file():
        raise ValueError(f"-o {output} is a file of no known picture format ({', '.join(FORMATS)})")
    else:
        outputs = [output / path.name for path in inputs.paths]
    sources: dict[Path, Path] = {path.resolve(): path for path in inputs.paths}
    taken: dict[Path, Path] = {}
    for path, result in zip(inputs.paths, outputs, strict=True):
        if result.resolve() in sources:
            raise ValueError(f"{result} would be written over an input: choose another -o")
        if result in taken:
            raise ValueError(f"{taken[result]} and {path} would both be written to {result}: run them apart")
        taken[result] = path
    check_existing(outputs, existing, ("overwrite", "skip"))
    return [
        Job(path, result, skip=existing == "skip" and result.exists())
        for path, result in zip(inputs.paths, outputs, strict=True)
    ]


def check_existing(outputs: Sequence[Path], existing: str, choices: Sequence[str] = ("overwrite",)) -> None:
    """Raise ``ValueError`` where results are there already and ``existing`` is "error"; ``choices`` are what else it can be."""
    there = [path for path in outputs if path.exists()]
    if there and existing == "error":
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        advice = " or ".join(f"--existing {choice}" for choice in choices)
        raise ValueError(f"{there[0]}{more} exists already: add {advice}")
