"""The metadata copied from an image to its result: ICC profile, EXIF, XMP and IPTC data, and PNG's texts and colour chunks.

``containers`` takes the parts out of JPEG, PNG and TIFF files and puts them back.  Damaged parts are left out and named; the
image is processed anyway.  Size and orientation are adjusted to the result.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from xml.parsers import expat

from PIL import ExifTags, Image, ImageCms

from ..errors import InputError
from .containers import EXIF, ICC, IPTC, XMP, Chunk, Parts
from .exif_writing import exif_bytes

MOST_BYTES = 2**24
"""Maximum size of a part in bytes."""
_ORIENTATION = ExifTags.Base.Orientation
_SIZES = (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength), (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
"""EXIF tags of width and height, in the main directory and in the Exif directory (PixelXDimension, PixelYDimension)."""
STORAGE = (
    254, 255, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284, 288, 289, 290, 291, 292, 293, 297, 317,
    320, 321, 322, 323, 324, 325, 330, 332, 333, 334, 336, 337, 338, 339, 340, 341, 342, 347, 512, 513, 514, 515, 517, 518,
    519, 520, 521, 529, 530, 531, 532, 700, 32995, 32996, 32997, 32998, 34377, 34675, 37724,
)  # fmt: skip
"""TIFF tags about the storage of pixels and layers, and tags of the profile and XMP data, which are copied separately."""
_SRGB = {b"cICP": b"\1\x0d\0\1", b"cHRM": (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)}


@dataclass(frozen=True)
class Metadata:
    """Checked metadata, ready to be written."""

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    chunks: tuple[Chunk, ...] = ()
    orientation: int = 1
    """EXIF orientation of the pixels, 1 to 8, from EXIF or otherwise XMP data; in ``exif`` itself it is set to 1."""


def check_metadata(parts: Parts) -> tuple[Metadata, list[str]]:
    """The intact parts, and the names of the others, each with the reason in brackets."""
    left_out = list(parts.problems)
    icc, exif, xmp, orientation = None, None, None, None
    if parts.icc:
        problem = _profile_problem(parts.icc)
        icc = None if problem else parts.icc
        left_out += [f"{ICC} ({problem})"] if problem else []
    if parts.exif:
        exif, orientation, problem = _checked_exif(parts.exif)
        left_out += [f"{EXIF} ({problem})"] if problem else []
    if parts.xmp:
        xmp, problem = _checked_xmp(parts.xmp)
        said = re.search(rb"\btiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])", parts.xmp if isinstance(parts.xmp, bytes) else b"")
        orientation = orientation or (int(said[1]) if said else None)
        left_out += [f"{XMP} ({problem})"] if problem else []
    iptc = parts.iptc
    if iptc and not (isinstance(iptc, bytes) and iptc[:1] == b"\x1c" and len(iptc) <= MOST_BYTES):
        iptc = None
        left_out.append(f"{IPTC} (damaged)")
    return Metadata(icc, exif, xmp, iptc, tuple(parts.chunks), orientation or 1), left_out


def _profile_problem(icc: bytes) -> str | None:
    if not isinstance(icc, bytes) or len(icc) > MOST_BYTES:
        return "too large" if isinstance(icc, bytes) else "damaged"
    try:
        if int.from_bytes(icc[:4]) > len(icc):
            return "damaged: it is incomplete"
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if profile_space(icc) == "RGB":  # opening a profile reads only its table of contents
            ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except Exception as error:  # a damaged profile can raise anything
        return f"damaged: {error}"
    return None


def profile_space(icc: bytes) -> str:
    """The colour space of an ICC profile: RGB, GRAY, CMYK, ..."""
    return icc[16:20].decode("latin-1").strip()


def _checked_exif(data: bytes) -> tuple[bytes | None, int | None, str | None]:
    """EXIF data with orientation 1 and without thumbnail, the original orientation, and a reason if they cannot be used."""
    orientation, exif = None, Image.Exif()
    try:
        with warnings.catch_warnings(record=True) as heard:  # Pillow reports damage as warnings
            warnings.simplefilter("always")
            exif.load(data)
            found = exif.get(_ORIENTATION)
            orientation = found if isinstance(found, int) and 1 <= found <= 8 else None
            if len(data) > MOST_BYTES:
                return None, orientation, "too large"
            written = _written(exif)
        damage = damage_in(heard)
    except Exception as error:  # invalid EXIF data are common and fail in many ways
        return None, orientation, f"damaged: {error}"
    return (None, orientation, f"damaged: {damage}") if damage else (written, orientation, None)


def damage_in(heard: Sequence[warnings.WarningMessage]) -> str | None:
    """The first of Pillow's warnings that means damage; None if there is none."""
    texts = (str(warning.message).strip() for warning in heard)
    return next((text for text in texts if not text.startswith("Metadata Warning")), None)  # a tag with too many values


def _written(exif: Image.Exif, size: tuple[int, int] | None = None) -> bytes | None:
    """EXIF as bytes, without tags about the storage of the original file; Pillow writes no thumbnail.

    Args:
        size: (width, height) of the image to write into it; None to keep its values.
    """
    for tag in STORAGE:
        exif.pop(tag, None)
    if _ORIENTATION in exif:
        exif[_ORIENTATION] = 1
    inner = exif.get_ifd(ExifTags.IFD.Exif) if ExifTags.IFD.Exif in exif else {}
    for directory, tags in zip((exif, inner), _SIZES, strict=True):
        for tag, side in zip(tags, size or (), strict=False):
            if tag in directory:
                directory[tag] = side
    return exif_bytes(exif) if len(exif) else None


def exif_of_size(data: bytes, width: int, height: int) -> bytes | None:
    """EXIF data from ``check_metadata`` with the image's size, where it has tags for it, replaced."""
    exif = Image.Exif()
    exif.load(data)
    return _written(exif, (width, height))


def _checked_xmp(data: bytes) -> tuple[bytes | None, str | None]:
    """XMP data, and a reason if they cannot be used."""
    if not isinstance(data, bytes) or len(data) > MOST_BYTES:
        return None, "too large" if isinstance(data, bytes) else "damaged"
    if not data.startswith((b"\xff\xfe", b"<\0")):  # in UTF-16LE a zero belongs to the last character
        data = data.rstrip(b"\0")
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise InputError("it has a document type definition")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError) as error:
        return None, f"damaged: {error}"
    return data, None


def xmp_of_size(data: bytes, width: int, height: int) -> bytes:
    """XMP data with size and orientation, where given, replaced by those of the result, and without thumbnails."""
    numbers = {
        b"tiff:ImageWidth": width, b"exif:PixelXDimension": width, b"tiff:ImageLength": height, b"exif:PixelYDimension": height,
        b"tiff:Orientation": 1,
    }  # fmt: skip
    for name, number in numbers.items():
        attribute_or_element = rb"(\b" + name + rb"\s*(?:=\s*[\"']|>)\s*)\d+"
        data = re.sub(attribute_or_element, lambda match, number=number: match[1] + str(number).encode(), data)
    return re.sub(rb"<(xmp|xap):Thumbnails\b[^>]*>.*?</\1:Thumbnails\s*>", b"", data, flags=re.DOTALL)


def colour_chunks_that_matter(chunks: tuple[Chunk, ...], has_profile: bool) -> list[str]:
    """Names of PNG's colour chunks that affect the colours: those that differ from sRGB and are not overridden by a profile."""
    found = dict(chunks)
    if b"cICP" in found:
        return [] if found[b"cICP"] == _SRGB[b"cICP"] else ["cICP"]
    if has_profile or b"sRGB" in found:
        return []
    names = ["gAMA"] if abs(int.from_bytes(found.get(b"gAMA", b"\0\0\xb1\x8f")) - 45455) > 500 else []
    primaries = found.get(b"cHRM")
    if primaries is not None:
        sides = [int.from_bytes(primaries[at : at + 4]) for at in range(0, 32, 4)]
        names += ["cHRM"] if max(abs(a - b) for a, b in zip(sides, _SRGB[b"cHRM"], strict=True)) > 500 else []
    return names
