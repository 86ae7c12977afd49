"""EXIF and IPTC data from the tags of a TIFF."""

from __future__ import annotations

import io
import warnings
from typing import Any

import tifffile
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .containers import EXIF, TIFF_IPTC, Parts
from .exif_writing import exif_bytes
from .metadata import STORAGE, damage_in

_OWN = {*STORAGE, ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength, ExifTags.Base.Orientation}
"""Tags that are not EXIF data: they are read with the pixels."""
_RESOLUTION = (ExifTags.Base.XResolution, ExifTags.Base.YResolution, ExifTags.Base.ResolutionUnit)


def take_tags(data: bytes, parts: Parts) -> None:
    """Read the EXIF and IPTC data of a TIFF or BigTIFF file into ``parts``."""
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            exif = _exif(data)
            iptc = _stored_bytes(data, TIFF_IPTC) if exif.pop(TIFF_IPTC, None) else None
            written = exif_bytes(exif) if len(exif) else None
    except Exception as error:  # damaged tags can raise anything
        parts.problems.append(f"{EXIF} (damaged: {error})")
        return
    damage = damage_in(heard)
    if damage:
        parts.problems.append(f"{EXIF} (damaged: {damage})")
        return
    parts.exif, parts.iptc = written, iptc


def _exif(data: bytes) -> Image.Exif:
    main = _directory(data)
    exif = Image.Exif()
    for tag in main:
        if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            inner = _directory(data, main[tag], tag)
            exif[tag] = {key: inner[key] for key in inner if key != ExifTags.IFD.Interop}  # an offset in this file
        elif tag not in _OWN:
            exif[tag] = main[tag]
    if exif.get(ExifTags.Base.ResolutionUnit) == 1:  # no unit: the resolution is only a placeholder, 1 x 1
        for tag in _RESOLUTION:
            exif.pop(tag, None)
    if str(exif.get(ExifTags.Base.ImageDescription)).startswith('{"shape": '):  # tifffile's description of the array
        for tag in (ExifTags.Base.ImageDescription, ExifTags.Base.Software):
            exif.pop(tag, None)
    return exif


def _stored_bytes(data: bytes, tag: int) -> bytes:
    """The value of a tag as bytes of the file: some programs declare the bytes of IPTC data as 32-bit numbers."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        assert isinstance(page, tifffile.TiffPage)
        found = page.tags[tag]
        return data[found.valueoffset : found.valueoffset + found.valuebytecount]


def _directory(data: bytes, place: Any = None, group: int | None = None) -> ImageFileDirectory_v2:
    """The directory at an offset of a TIFF file, or the first one."""
    big = b"+" in data[2:4]
    head = b"II+\0" + data[4:16] if big else data[:8]  # Pillow does not recognise MM\0+ as BigTIFF
    directory, file = ImageFileDirectory_v2(head, data[:2], group), io.BytesIO(data)
    file.seek(directory.next if place is None else place)
    directory.load(file)
    return directory
