"""Images with more than 8 bits per channel, which Pillow would reduce to 8: PNG and AVIF by OpenCV, TIFF by tifffile.

Arrays are uint16 ``(H, W, C)`` from 0 to 65535: grey, grey with alpha, RGB or RGBA, with straight alpha.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import IO

import cv2
import numpy as np
import tifffile
from PIL import Image
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, SAMPLEFORMAT, TiffPage

from ..errors import InputError
from .containers import ICC, XMP, Parts
from .formats import RefusedError

_ORIENTATION, _ICC, _XMP = 274, 34675, 700
_PACKED = (10, 12, 14)
"""Bit depths that OpenCV can unpack."""


@dataclass(frozen=True)
class DeepTiff:
    """The contents of a TIFF with more than 8 bits per channel."""

    array: np.ndarray
    orientation: object
    """Value of the orientation tag; None if there is none."""
    parts: Parts


def read_tiff(data: bytes) -> DeepTiff | None:
    """Read a single-page TIFF with more than 8 bits per channel; None for at most 8 bits, or several pages.

    Raises:
        RefusedError: for an unsupported layout.
        Exception: of any kind for a damaged file.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = _deep_page(tiff)
        _check_complete(tiff)
        if page is None:
            return None
        array, parts = _channels(_pixels(data, page), page), Parts()
        parts.icc = _bytes_of(page, _ICC, ICC, parts)
        parts.xmp = _bytes_of(page, _XMP, XMP, parts)
        return DeepTiff(array, _value(page, _ORIENTATION), parts)


def tiff_header(file: IO[bytes]) -> tuple[int, int, bool] | None:
    """Height, width and whether it is grey, of a file that ``read_tiff`` reads; None and errors as there."""
    with tifffile.TiffFile(file) as tiff:
        page = _deep_page(tiff)
        return None if page is None else (page.imagelength, page.imagewidth, page.photometric != PHOTOMETRIC.RGB)


def _deep_page(tiff: tifffile.TiffFile) -> TiffPage | None:
    page = tiff.pages.first
    assert isinstance(page, TiffPage)
    bits = page.bitspersample
    if _pages(tiff) > 1 or (isinstance(bits, int) and bits <= 8 and page.sampleformat == SAMPLEFORMAT.UINT):
        return None
    if isinstance(bits, tuple) and max(bits) <= 8:
        return None
    _check_layout(page)
    pixels = page.imagewidth * page.imagelength
    if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise RefusedError(f"has {pixels} pixels: expected at most {2 * Image.MAX_IMAGE_PIXELS}")
    return page


def count_pages(data: bytes) -> int:
    """Number of images in a TIFF, without the small copies of the first one that some programs add as its preview."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        return _pages(tiff)


def _pages(tiff: tifffile.TiffFile) -> int:
    return 1 + sum(not (isinstance(page, TiffPage) and page.is_reduced) for page in list(tiff.pages)[1:])


def _check_complete(tiff: tifffile.TiffFile) -> None:
    """Refuse a file that lacks pixels: readers fill its gaps with black."""
    page = tiff.pages.first
    assert isinstance(page, TiffPage)
    needed, counts = math.prod(page.chunked), page.databytecounts or (1,) * len(page.dataoffsets)
    stored = sum(offset > 0 and count > 0 for offset, count in zip(page.dataoffsets, counts, strict=False))
    if stored < needed and page.compression != COMPRESSION.OJPEG:  # which has its pixels elsewhere
        raise RefusedError(f"is damaged: {needed - stored} of its {needed} strips or tiles of pixels are missing")


def _check_layout(page: TiffPage) -> None:
    bits, kind = page.bitspersample, page.sampleformat
    names = {int(SAMPLEFORMAT.INT): " (signed)", int(SAMPLEFORMAT.IEEEFP): " (floating point)"}
    if kind != SAMPLEFORMAT.UINT or bits not in (16, *_PACKED):
        expected = "expected unsigned integers of 8, 10, 12, 14 or 16 bits; convert it"
        raise RefusedError(f"has {bits} bits per channel{names.get(kind, '')}: {expected}")
    if page.photometric not in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.RGB):
        colours = getattr(page.photometric, "name", page.photometric)
        raise RefusedError(f"has {bits} bits per channel in the colour space {colours}: save it as RGB or grey")
    if page.imagedepth > 1:
        raise RefusedError(f"has {page.imagedepth} layers in depth: save one of them")


def _value(page: TiffPage, code: int) -> object:
    try:
        tag = page.tags.get(code)
        return None if tag is None else tag.value
    except Exception:  # a damaged tag can raise anything
        return None


def _bytes_of(page: TiffPage, code: int, name: str, parts: Parts) -> bytes | None:
    value = _value(page, code)
    if isinstance(value, bytes):
        return value
    if page.tags.get(code) is not None:
        parts.problems.append(f"{name} (damaged)")
    return None


def _pixels(data: bytes, page: TiffPage) -> np.ndarray:
    """``(H, W, C)`` as stored, scaled to 0..65535."""
    bits = page.bitspersample
    apart = page.planarconfig == PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
    if bits == 16:
        try:
            array = page.asarray()
        except (ValueError, RuntimeError, ImportError):  # a compression for which tifffile needs another package
            if apart:
                raise
        else:
            array = array[..., None] if array.ndim == 2 else array
            return np.moveaxis(array, 0, -1) if apart else array
    read = None if apart else cv2.imdecode(np.frombuffer(_upright(data, page), np.uint8), cv2.IMREAD_UNCHANGED)
    if read is None or read.dtype != np.uint16 or read.shape[:2] != (page.imagelength, page.imagewidth):
        raise RefusedError(f"has {bits} bits per channel and is damaged, or compressed in an unknown way: save it again")
    return _from_bgr(read if bits == 16 else _full_range(np.right_shift(read, 16 - bits), bits))  # OpenCV shifts them left


def _upright(data: bytes, page: TiffPage) -> bytes:
    """The file with orientation 1: OpenCV would turn the pixels, which the caller does."""
    tag = page.tags.get(_ORIENTATION)
    if tag is None or tag.valuebytecount not in (2, 4):
        return data
    value = struct.pack(page.parent.byteorder + {2: "H", 4: "I"}[tag.valuebytecount], 1)
    return data[: tag.valueoffset] + value + data[tag.valueoffset + len(value) :]


def _full_range(array: np.ndarray, bits: int) -> np.ndarray:
    """Scale whole numbers of ``bits`` bits to uint16, rounded."""
    full = 2**bits - 1
    return ((array.astype(np.uint32) * 65535 + full // 2) // full).astype(np.uint16)


def _channels(array: np.ndarray, page: TiffPage) -> np.ndarray:
    """Grey or RGB, and alpha if a channel is marked as such."""
    count = 3 if page.photometric == PHOTOMETRIC.RGB else 1
    colours, alpha = array[..., :count], None
    extra = tuple(page.extrasamples)
    place = next((place for place, kind in enumerate(extra) if kind != EXTRASAMPLE.UNSPECIFIED), None)
    if place is not None and array.shape[2] > count + place:
        alpha = array[..., count + place : count + place + 1]
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        colours = 65535 - colours
    if alpha is None:
        return colours
    if place is not None and extra[place] == EXTRASAMPLE.ASSOCALPHA:
        divided = colours.astype(np.float64) * 65535 / np.maximum(alpha, 1)
        colours = divided.round().clip(0, 65535).astype(np.uint16)
    return np.concatenate((colours, alpha), -1)


def read_png(pixels: bytes, transparent: object) -> np.ndarray:
    """Read a 16-bit PNG.

    Args:
        transparent: the grey value that is transparent, if there is one.

    Raises:
        InputError: if OpenCV cannot read it.
    """
    read = cv2.imdecode(np.frombuffer(pixels, np.uint8), cv2.IMREAD_UNCHANGED)
    if read is None or read.dtype != np.uint16:
        raise InputError("its 16-bit pixels cannot be decoded")
    array = _from_bgr(read)
    if array.shape[2] == 1 and isinstance(transparent, int):
        alpha = np.where(array == transparent, 0, 65535).astype(np.uint16)
        return np.concatenate((array, alpha), -1)
    return array


def avif_depth(data: bytes) -> int:
    """Bits per channel of an AVIF file, from the configuration of its image (``av1C``); 8 if there is none."""
    place = data.find(b"av1C")
    flags = data[place + 6] if 0 <= place < len(data) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def read_avif(data: bytes, bits: int) -> np.ndarray | None:
    """Read an AVIF with 10 or 12 ``bits``; None if OpenCV does not support AVIF."""
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return None if read is None or read.dtype != np.uint16 else _from_bgr(_full_range(read, bits))


def encode_png(array: np.ndarray) -> bytes:
    """Encode a 16-bit PNG file without metadata; grey with alpha is not supported by OpenCV."""
    pixels = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.shape[2] >= 3 else array
    good, data = cv2.imencode(".png", pixels)
    if not good:
        raise InputError("OpenCV cannot encode it")
    return data.tobytes()


def encode_tiff(array: np.ndarray, icc: bytes | None) -> bytes:
    """Encode a 16-bit TIFF file."""
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        array[..., 0] if array.shape[2] == 1 else array,
        photometric="rgb" if array.shape[2] >= 3 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if array.shape[2] in (2, 4) else None,
        compression="zlib",
        iccprofile=icc,
        metadata=None,  # no description of the array's shape
        software=False,
    )
    return file.getvalue()


def _from_bgr(array: np.ndarray) -> np.ndarray:
    return array[..., None] if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]
