"""Pictures of 16 bits per channel, which Pillow would silently round to 8: PNG through OpenCV, TIFF through tifffile.

Arrays are uint16 ``(H, W, C)``: grey, grey with alpha, RGB or RGBA, alpha not multiplied in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from tifffile import EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, TiffPage

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_EXIF_START = b"Exif\0\0"
"""JPEG's mark before EXIF data, which has no place in PNG."""


@dataclass(frozen=True)
class DeepTiff:
    """What a 16-bit TIFF holds."""

    array: np.ndarray
    orientation: int
    icc: bytes | None


def read_tiff(path: Path) -> DeepTiff | None:
    """The only page of a 16-bit TIFF; None for a file of another kind or depth.

    Raises:
        ValueError: for a layout that is not supported.
    """
    with path.open("rb") as file:
        if file.read(4) not in _TIFF_STARTS:
            return None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        if page.bitspersample != 16 or len(tiff.pages) > 1:
            return None
        if page.dtype != np.uint16 or page.photometric not in (
            PHOTOMETRIC.MINISBLACK,
            PHOTOMETRIC.MINISWHITE,
            PHOTOMETRIC.RGB,
        ):
            raise ValueError(f"16 bits as {page.dtype}, photometric {page.photometric!r}, are not supported: save as RGB")
        array = _pixels(path, page)
        orientation, icc = page.tags.get(274), page.tags.get(34675)
        return DeepTiff(_channels(array, page), orientation.value if orientation else 1, icc.value if icc else None)


def _pixels(path: Path, page: TiffPage) -> np.ndarray:
    """``(H, W, C)`` as stored."""
    try:
        array = page.asarray()
        apart = page.planarconfig == PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
    except (ValueError, RuntimeError):  # a compression that tifffile leaves to another package
        if page.planarconfig == PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
            raise
        read = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if read is None or read.dtype != np.uint16 or read.shape[:2] != (page.imagelength, page.imagewidth):
            raise ValueError("its pixels cannot be decoded") from None
        return _from_bgr(read)
    if array.ndim == 2:
        array = array[..., None]
    return np.moveaxis(array, 0, -1) if apart else array


def _channels(array: np.ndarray, page: TiffPage) -> np.ndarray:
    """Grey or colours, and alpha where a channel says that it is one."""
    count = 3 if page.photometric == PHOTOMETRIC.RGB else 1
    colours, alpha = array[..., :count], None
    kind = page.extrasamples[0] if page.extrasamples else EXTRASAMPLE.UNSPECIFIED
    if kind != EXTRASAMPLE.UNSPECIFIED and array.shape[2] > count:
        alpha = array[..., count : count + 1]
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        colours = 65535 - colours
    if alpha is None:
        return colours
    if kind == EXTRASAMPLE.ASSOCALPHA:
        divided = colours.astype(np.float64) * 65535 / np.maximum(alpha, 1)
        colours = divided.round().clip(0, 65535).astype(np.uint16)
    return np.concatenate((colours, alpha), -1)


def read_png(path: Path, transparent: object) -> np.ndarray:
    """A 16-bit PNG; ``transparent`` is the grey value that stands for nothing, if any.

    Raises:
        ValueError: where OpenCV cannot read it.
    """
    read = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if read is None or read.dtype != np.uint16:
        raise ValueError("its 16-bit pixels cannot be decoded")
    array = _from_bgr(read)
    if array.shape[2] == 1 and isinstance(transparent, int):
        alpha = np.where(array == transparent, 0, 65535).astype(np.uint16)
        return np.concatenate((array, alpha), -1)
    return array


def write_png(path: Path, array: np.ndarray, icc: bytes | None, exif: bytes | None) -> None:
    """Write a 16-bit PNG.

    Raises:
        OSError: where that fails.
    """
    kept = {cv2.IMAGE_METADATA_ICCP: icc, cv2.IMAGE_METADATA_EXIF: exif and exif.removeprefix(_EXIF_START)}
    kinds = [kind for kind, value in kept.items() if value]
    values = [np.frombuffer(kept[kind] or b"", np.uint8)[None] for kind in kinds]
    pixels = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.shape[2] >= 3 else array
    if not cv2.imwriteWithMetadata(str(path), pixels, kinds, values):
        raise OSError(f"{path} cannot be written")


def write_tiff(path: Path, array: np.ndarray, icc: bytes | None) -> None:
    """Write a 16-bit TIFF."""
    tifffile.imwrite(
        path,
        array[..., 0] if array.shape[2] == 1 else array,
        photometric="rgb" if array.shape[2] >= 3 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if array.shape[2] in (2, 4) else None,
        compression="zlib",
        iccprofile=icc,
    )


def _from_bgr(array: np.ndarray) -> np.ndarray:
    return array[..., None] if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]
