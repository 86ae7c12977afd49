"""Image formats: which are read and written, by file suffix and by content, and the names of others."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import InputError

try:
    from PIL import AvifImagePlugin

    _HAS_AVIF = AvifImagePlugin.SUPPORTED
except ImportError:  # Pillow below 11.3
    _HAS_AVIF = False

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
    **({".avif": "AVIF"} if _HAS_AVIF else {}),
}  # fmt: skip
"""Formats that are read and written: Pillow's name by file suffix; AVIF if Pillow supports it."""


class RefusedError(InputError):
    """A file is intact but not supported; the message is shown after the file's name."""


@dataclass(frozen=True)
class Plugin:
    """A package that adds a format to Pillow."""

    format: str
    """Pillow's name of the format."""
    module: str
    package: str
    """The package's name for pip."""


_HEIF, _JXL = Plugin("HEIF", "pillow_heif", "pillow-heif"), Plugin("JXL", "pillow_jxl", "pillow-jxl-plugin")
READ_ONLY = {".heic": _HEIF, ".heif": _HEIF, ".jxl": _JXL}
"""Formats that are read if their plug-in is installed, and not written."""
_PLUGINS = {plugin.format: plugin for plugin in (_HEIF, _JXL)}

_KINDS = {
    ".heic": "HEIC", ".heif": "HEIC", ".jxl": "JPEG XL", ".avif": "AVIF", ".psd": "PSD", ".psb": "PSD", ".gif": "GIF",
    ".jp2": "JPEG 2000", ".j2k": "JPEG 2000", ".jpf": "JPEG 2000", ".jfif": "JFIF", ".exr": "EXR", ".hdr": "HDR",
    ".cr2": "raw", ".cr3": "raw", ".crw": "raw", ".nef": "raw", ".nrw": "raw", ".arw": "raw", ".srf": "raw", ".sr2": "raw",
    ".dng": "raw", ".orf": "raw", ".rw2": "raw", ".raf": "raw", ".pef": "raw", ".srw": "raw", ".x3f": "raw", ".iiq": "raw",
    ".3fr": "raw", ".erf": "raw", ".kdc": "raw", ".dcr": "raw", ".mrw": "raw", ".raw": "raw",
}  # fmt: skip
"""Names of other image formats by suffix, for the count of skipped files."""
IMAGE_KINDS = frozenset(_KINDS.values())
"""Names of image formats in that count."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"), (b"BM", "BMP"), (b"GIF8", "GIF"), (b"\xff\x0a", "JXL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    (b"8BPS", "PSD"), (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"%PDF", "PDF"),
    (b"v/1\x01", "EXR"), (b"#?RADIANCE", "HDR"), (b"version https://git-lfs", "a git-lfs pointer"),
)  # fmt: skip
_READ = {*FORMATS.values(), "GIF"}
"""Formats that are read without a plug-in, by content; GIF only if the file has another suffix."""


def is_readable(path: Path) -> bool:
    """Whether files with this suffix can be read."""
    suffix = path.suffix.lower()
    return suffix in FORMATS or (suffix in READ_ONLY and _load(READ_ONLY[suffix]))


def check_suffix(path: Path) -> None:
    """Raise ``InputError`` unless files with this suffix can be read, with the plug-in that is missing."""
    if is_readable(path):
        return
    plugin = READ_ONLY.get(path.suffix.lower())
    if plugin is not None:
        raise InputError(f"{path}: {plugin.format} images need a plug-in: pip install {plugin.package}")
    raise InputError(f"{path}: unknown format {path.suffix!r}; expected one of {', '.join(FORMATS)}")


def identify(start: bytes) -> str:
    """Pillow's name of a file's format, by its first bytes; loads the format's plug-in if it needs one.

    Raises:
        RefusedError: for a format that cannot be read, with its name if it is known.

    >>> identify(b"\\x89PNG\\r\\n\\x1a\\n")
    'PNG'
    """
    kind = _kind(start)
    if kind is None:
        raise RefusedError("is empty" if not start else "cannot be read as an image: its format is unknown")
    plugin = _PLUGINS.get(kind)
    if plugin is not None and not _load(plugin):
        raise RefusedError(f"is a {kind} image, which needs a plug-in: pip install {plugin.package}")
    if plugin is None and kind not in _READ:
        raise RefusedError(f"cannot be read as an image: its content is {kind}")
    return kind


def _kind(start: bytes) -> str | None:
    for magic, name in _STARTS:
        if start.startswith(magic):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        brands = start[8 : int.from_bytes(start[:4])]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIF" if brands[:4] in _HEIF_BRANDS else None
    text = start[:256].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    return "SVG" if b"<svg" in text else None


def kind_of(path: Path) -> str:
    """Name of the kind of a file that is not read, for the count of skipped files."""
    suffix = path.suffix.lower()
    return _KINDS.get(suffix) or repr(suffix).strip("'")[1:] or "no suffix"


def advice(kinds: set[str]) -> str:
    """Advice on packages that would allow files of these ``kinds`` to be read; empty if there are none."""
    plugins = {"AVIF": "'pillow>=11.3'", **{_KINDS[suffix]: plugin.package for suffix, plugin in READ_ONLY.items()}}
    wanted = sorted(plugins[kind] for kind in kinds & plugins.keys())
    return f"; pip install {' '.join(wanted)} to read {' and '.join(sorted(kinds & plugins.keys()))}" if wanted else ""


@functools.cache
def _load(plugin: Plugin) -> bool:
    try:
        module = importlib.import_module(plugin.module)
    except ImportError:
        return False
    if plugin is _HEIF:
        module.register_heif_opener()
    return plugin.format in Image.OPEN
