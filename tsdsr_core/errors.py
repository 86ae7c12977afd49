"""The error for what a user can fix, and how to install missing packages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


class InputError(ValueError):
    """A problem that the user can fix: the message names the value, what was expected and what to do."""


def installation(extra: str) -> str:
    """The command that installs the packages of ``extra``, for a copy of the repository or an installed package."""
    project = Path(__file__).parent.parent
    if (project / "pyproject.toml").is_file():
        return f"pip install -e '.[{extra}]' in {project}"
    return f"pip install {' '.join(repr(name) for name in dict.fromkeys(_requirements(extra)))}"


def _requirements(extra: str) -> list[str]:
    """The packages of an extra, including those of other extras that it refers to."""
    found: list[str] = []
    for line in importlib.metadata.requires("tsdsr") or []:
        requirement, _, marker = line.partition(";")
        if f'"{extra}"' in marker.replace("'", '"'):
            others = requirement.strip().removeprefix("tsdsr[").partition("]")[0].split(",")
            own = requirement.startswith("tsdsr[")
            found += [part for name in others for part in _requirements(name)] if own else [requirement.strip()]
    return found
