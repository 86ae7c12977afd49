"""Which video files are read and written, by file suffix."""

from __future__ import annotations

from pathlib import Path

WRITTEN = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""What is read and written: FFmpeg's name of the container by file suffix."""
_READ_ONLY = {
    ".3gp", ".avi", ".flv", ".m2ts", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}  # fmt: skip
_ANY = ".mkv"
"""The container that holds whatever the others do."""


def is_video(path: Path) -> bool:
    """Whether a file of this suffix is taken for a video."""
    suffix = path.suffix.lower()
    return suffix in WRITTEN or suffix in _READ_ONLY


def result_name(path: Path) -> str:
    """The name of a video's result in a folder: that of the input, but MKV for containers that are not written."""
    return path.name if path.suffix.lower() in WRITTEN else path.with_suffix(_ANY).name
