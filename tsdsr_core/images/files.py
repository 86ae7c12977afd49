"""Reads and writes image files: PNG, JPEG, WebP, TIFF, BMP and AVIF with 8 or 16 bits, alpha, colour profile and metadata.

Metadata that is damaged, or that a format cannot store, is left out with a warning; the image is read and written anyway.
"""

from __future__ import annotations

import io
import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError
from ..system.atomic import bytes_writer, reason, write_files
from .containers import ICC, Chunk, Parts
from .formats import FORMATS, RefusedError, check_suffix, identify
from .metadata import check_metadata, colour_chunks_that_matter, exif_of_size, profile_space, xmp_of_size
from .pixels import decode, encode, split, upright
from .sixteen_bit import tiff_header

log = logging.getLogger("tsdsr")

_ALPHA = {"PNG", "WEBP", "TIFF", "AVIF"}
_DEEP = {"PNG", "TIFF"}
"""Formats that are written with 16 bits."""
_GREY = {"1", "L", "LA", "La", "I", "F"}
"""Pillow's greyscale modes, in addition to those that start with "I;"."""
_LONGEST = {"JPEG": 65500, "WEBP": 16383, "AVIF": 32768}
"""Maximum side in pixels, by format."""
_SPEECHLESS = (UnidentifiedImageError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RecursionError)
"""Errors of decoders that tell nothing of the file, such as "int() argument must be a string"."""
_START = 4096
"""Bytes of a file by which its format is recognised."""


@dataclass(frozen=True)
class Picture:
    """An image file in memory: pixels as tensors, and the metadata to keep."""

    rgb: Tensor
    """``(1, 3, H, W)`` float32 in 0..1."""
    alpha: Tensor | None = None
    """``(1, 1, H, W)`` float32 in 0..1."""
    grey: bool = False
    """Whether to write a single colour channel."""
    deep: bool = False
    """Whether to write 16 bits per channel, if the format supports it."""
    icc: bytes | None = None
    """Colour profile."""
    exif: bytes | None = None
    """EXIF data; size and orientation are adjusted to ``rgb`` when it is written."""
    xmp: bytes | None = None
    """XMP data, adjusted likewise."""
    iptc: bytes | None = None
    """IPTC data."""
    chunks: tuple[Chunk, ...] = ()
    """Texts and colour descriptions as PNG chunks. Of the texts, JPEG can store comments; other formats store none."""


@dataclass(frozen=True)
class Header:
    """Size and kind of an image, from its header."""

    height: int
    width: int
    """Stored height and width in pixels, before the EXIF orientation is applied."""
    grey: bool
    """Whether it has no colours."""


def read_picture(path: Path) -> Picture:
    """Read an image and apply its EXIF orientation; CMYK and Lab are converted to sRGB.

    Metadata that is damaged or does not fit is left out, with one warning.

    Raises:
        InputError: for a missing, damaged or animated file, or an unknown format, with the file's name.
    """
    check_suffix(path)
    try:
        _check_regular(path)
        picture, left_out = _read(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # decoders can raise anything for a damaged file
        raise _named(path, error) from error
    _warn(path, left_out)
    return picture


def read_header(path: Path) -> Header:
    """Size and kind of an image without decoding it, so that damaged pixels are not noticed.

    Raises:
        InputError: for a missing file or one that is not an image, with its name.
    """
    try:
        _check_regular(path)
        with path.open("rb") as file:
            kind = identify(file.read(_START))
            try:
                return _header(file, kind)
            except Exception:
                file.seek(0)
                pixels, _ = split(file.read(), kind)
                if pixels is None:
                    raise
                return _header(io.BytesIO(pixels), kind)  # only the metadata was damaged
    except Exception as error:  # as in read_picture
        raise _named(path, error) from error


def _header(file: IO[bytes], kind: str) -> Header:
    file.seek(0)
    if kind == "TIFF" and (found := tiff_header(file)) is not None:  # as in ``decode``: Pillow does not read all of these
        return Header(*found)
    file.seek(0)
    with Image.open(file, formats=[kind]) as image:  # pyright: ignore[reportArgumentType]
        return Header(image.height, image.width, image.mode in _GREY or image.mode.startswith("I;"))


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe could block
        raise RefusedError("is not a file")


def _named(path: Path, error: Exception) -> InputError:
    if isinstance(error, RefusedError):
        return InputError(f"{path} {error}")
    if isinstance(error, Image.DecompressionBombError) and Image.MAX_IMAGE_PIXELS:
        return InputError(f"{path} has too many pixels: expected at most {2 * Image.MAX_IMAGE_PIXELS}")
    why = "it is damaged, or its format is not supported" if isinstance(error, _SPEECHLESS) else reason(error)
    return InputError(f"{path} cannot be read as an image: {why}")


def _warn(path: Path, left_out: list[str]) -> None:
    if left_out:
        log.warning("%s: left out %s", path, "; ".join(left_out))


def _read(data: bytes) -> tuple[Picture, list[str]]:
    """Read an image; also returns the parts of its metadata that were left out, with reasons."""
    found = decode(data, identify(data[:_START]))
    metadata, left_out = check_metadata(found.parts)
    array = upright(found.array, metadata.orientation if found.orientation is None else found.orientation)
    values = torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max).permute(2, 0, 1)[None]
    grey = values.shape[1] < 3
    icc, foreign = _fitting(metadata.icc, grey)
    picture = Picture(
        rgb=values[:, :1].repeat(1, 3, 1, 1) if grey else values[:, :3],
        alpha=values[:, -1:] if values.shape[1] in (2, 4) else None,
        grey=grey,
        deep=array.dtype == np.uint16,
        icc=icc,
        exif=metadata.exif,
        xmp=metadata.xmp,
        iptc=metadata.iptc,
        chunks=metadata.chunks,
    )
    return picture, left_out + foreign


def _fitting(icc: bytes | None, grey: bool) -> tuple[bytes | None, list[str]]:
    """The ICC profile if it is for grey or RGB as the image is; otherwise None and the reason."""
    if not icc or profile_space(icc) == ("GRAY" if grey else "RGB"):
        return icc, []
    return None, [f"{ICC} (it is for {profile_space(icc)}, but the image is {'grey' if grey else 'RGB'})"]


def write_picture(path: Path, picture: Picture) -> None:
    """Write an image in the format given by the suffix, all or nothing. JPEG and WebP have quality 95, AVIF 90.

    Raises:
        InputError: for an unknown suffix, alpha in a format without alpha, or a size that exceeds the format's maximum.
        OSError: if it cannot be written, with the reason.
    """
    write_pictures({path: picture})


def write_pictures(pictures: Mapping[Path, Picture]) -> None:
    """Write several images as ``write_picture`` does, all or none."""
    encoded = {path: _encoded(path, picture) for path, picture in pictures.items()}
    write_files({path: bytes_writer(data) for path, (data, _) in encoded.items()})
    for path, (_, left_out) in encoded.items():
        _warn(path, left_out)


def _encoded(path: Path, picture: Picture) -> tuple[bytes, list[str]]:
    """The contents of the file, and what its format cannot store."""
    height, width = picture.rgb.shape[2:]
    kind = check_output(path, picture.alpha is not None, (height, width))
    deep = picture.deep and kind in _DEEP
    if picture.deep and not deep:
        log.warning("%s: %s stores only 8 of the input's 16 bits per channel", path, kind)
    array = _to_array(picture, 65535 if deep else 255)
    if array.shape[2] < 3 and (kind == "WEBP" or (deep and kind == "PNG" and array.shape[2] == 2)):
        array = array[..., [0, 0, 0, 1][: array.shape[2] + 2]]  # WebP has no grey, and OpenCV no 16-bit grey with alpha
    icc, left_out = _fitting(picture.icc, array.shape[2] < 3)
    lost = [] if kind == "PNG" else colour_chunks_that_matter(picture.chunks, icc is not None)
    if lost:
        left_out.append(f"the input's {' and '.join(lost)} ({kind} cannot store PNG's colour chunks)")
    try:
        exif = picture.exif and exif_of_size(picture.exif, width, height)
        xmp = picture.xmp and xmp_of_size(picture.xmp, width, height)
        data, refused = encode(array, kind, Parts(icc, exif, xmp, picture.iptc, list(picture.chunks)))
    except Exception as error:  # encoders can raise anything
        raise InputError(f"{path} cannot be encoded as {kind}: {reason(error)}") from error
    return data, left_out + refused


def check_output(path: Path, has_alpha: bool, size: tuple[int, int]) -> str:
    """Pillow's name of the format given by the suffix of ``path``; checks that it supports the image.

    Args:
        has_alpha: whether the image has an alpha channel.
        size: (height, width) of the image.

    Raises:
        InputError: as ``write_picture``.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: unknown format; expected one of {', '.join(FORMATS)}")
    if has_alpha and kind not in _ALPHA:
        raise InputError(f"{path}: {kind} cannot store the alpha channel of the input; use .png, .webp or .tif")
    longest = _LONGEST.get(kind)
    if longest and max(size) > longest:
        raise InputError(
            f"{path}: {kind} supports at most {longest} pixels a side, this is {size[1]}x{size[0]}; use .png or .tif"
        )
    return kind


def _to_array(picture: Picture, full: int) -> np.ndarray:
    """The image as an array ``(H, W, 1..4)`` of whole numbers from 0 to ``full``."""
    colours = picture.rgb[0]
    if picture.grey:
        colours = (colours * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32)[:, None, None]).sum(0, keepdim=True)
    channels = colours if picture.alpha is None else torch.cat((colours, picture.alpha[0]))
    values = (channels.clamp(0, 1) * full).round().permute(1, 2, 0).numpy()
    return values.astype(np.uint8 if full == 255 else np.uint16)
