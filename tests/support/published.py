"""The files that ``comfy node pack`` puts into the pack that people download."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]


def published_files() -> list[PurePosixPath]:
    """Relative to the project: what git keeps, without what .comfyignore leaves out."""
    patterns = [".git", *_patterns(".gitignore"), *_patterns(".comfyignore")]
    files = (PurePosixPath(path.relative_to(ROOT).as_posix()) for path in ROOT.rglob("*") if path.is_file())
    return sorted(path for path in files if not left_out(path, patterns))


def left_out(file: PurePosixPath, patterns: list[str]) -> bool:
    """Whether a file, or a folder above it, matches one of git's patterns; those with ``!`` and ``**`` are not known here."""
    for path in (file, *file.parents[:-1]):
        for pattern in patterns:
            names = PurePosixPath(pattern.strip("/")).parts
            assert pattern[0] != "!", pattern
            assert "**" not in names, pattern
            if pattern.endswith("/") and path == file:
                continue
            found = path.parts if "/" in pattern.rstrip("/") else (path.name,)
            if len(found) == len(names) and all(map(fnmatchcase, found, names)):
                return True
    return False


def _patterns(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
