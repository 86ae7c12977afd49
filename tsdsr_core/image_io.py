"""Reading and writing pictures: PNG, JPEG, WebP, TIFF and BMP, of 8 or 16 bits, with alpha and colour profile."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from . import deep_images
from .files import atomic_path

log = logging.getLogger("tsdsr")

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
}  # fmt: skip
"""What is read and written, by file suffix."""
_ALPHA = {"PNG", "WEBP", "TIFF"}
_DEEP = {"PNG", "TIFF"}
"""Formats that hold 16 bits."""
_GREY = {"1", "L", "LA", "La", "I", "F"}
"""Pillow's modes without colour, beside those that begin with I;."""
_LONGEST = {"JPEG": 65500, "WEBP": 16383}
"""Longest sides in pixels that the encoders write."""
_QUALITY = 95
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """A picture as tensors, with what must survive the way from file to file."""

    rgb: Tensor
    """``(1, 3, H, W)`` float32 in 0..1."""
    alpha: Tensor | None = None
    """``(1, 1, H, W)`` float32 in 0..1."""
    grey: bool = False
    """Written with one colour channel."""
    deep: bool = False
    """16 bits per channel where the format holds them."""
    icc: bytes | None = None
    exif: bytes | None = None


@dataclass(frozen=True)
class Header:
    """What a picture's header says of it."""

    height: int
    width: int
    """Sides in pixels as stored; the EXIF orientation may yet swap them."""
    grey: bool


class _RefusedError(ValueError):
    """A file that is read well but not wanted; the message follows the file's name."""


def read_picture(path: Path) -> Picture:
    """Read a picture with its EXIF orientation applied; CMYK becomes sRGB through its profile.

    Raises:
        ValueError: for a missing, damaged or animated file or an unknown format, naming it.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown format; expected one of {', '.join(FORMATS)}")
    try:
        return _read_deep_tiff(path) or _read_with_pillow(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except _RefusedError as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # of damaged files, decoders raise whatever they stumble over
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def read_header(path: Path) -> Header:
    """Size and kind of a picture without decoding it, so that a damaged file may pass.

    Raises:
        ValueError: for a missing file or one that is no picture, naming it.
    """
    try:
        with Image.open(path) as image:
            return Header(image.height, image.width, image.mode in _GREY or image.mode.startswith("I;"))
    except Exception as error:  # as in read_picture
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _read_deep_tiff(path: Path) -> Picture | None:
    tiff = deep_images.read_tiff(path)
    return tiff and _picture(_upright(tiff.array, tiff.orientation), tiff.icc, None)


def _read_with_pillow(path: Path) -> Picture:
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones add depth or gain maps to a JPEG
            raise _RefusedError("is animated or has several pages: give single pictures")
        deep = image.format == "PNG" and any(";16" in str(tile) for tile in image.tile)
        image.load()
        exif = image.getexif()
        array = deep_images.read_png(path, image.info.get("transparency")) if deep else _to_8_bit(image)
    array = _upright(array, exif.pop(_EXIF_ORIENTATION, 1))
    icc = None if image.mode == "CMYK" else image.info.get("icc_profile")
    return _picture(array, icc, _exif_bytes(path, exif) if "exif" in image.info else None)  # a TIFF's own tags are not kept


def _picture(array: np.ndarray, icc: bytes | None, exif: bytes | None) -> Picture:
    values = torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max).permute(2, 0, 1)[None]
    grey = values.shape[1] < 3
    return Picture(
        rgb=values[:, :1].repeat(1, 3, 1, 1) if grey else values[:, :3],
        alpha=values[:, -1:] if values.shape[1] in (2, 4) else None,
        grey=grey,
        deep=array.dtype == np.uint16,
        icc=icc,
        exif=exif,
    )


def _exif_bytes(path: Path, exif: Image.Exif) -> bytes | None:
    try:
        return exif.tobytes() if len(exif) else None
    except Exception as error:  # odd EXIF is common in good photographs, and fails in many ways
        log.warning("%s: its EXIF data is damaged and left out (%s)", path, error)
        return None


def write_picture(path: Path, picture: Picture) -> None:
    """Write a picture in the format of its suffix, all or nothing; JPEG and WebP at quality 95.

    Raises:
        ValueError: for an unknown suffix, alpha in a format without it, or a size beyond the format's.
    """
    kind = check_output(path, picture.alpha is not None, (picture.rgb.shape[2], picture.rgb.shape[3]))
    deep = picture.deep and kind in _DEEP
    if picture.deep and not deep:
        log.warning("%s: %s holds 8 of the input's 16 bits", path, kind)
    array = _to_array(picture, 65535 if deep else 255)
    if array.shape[2] < 3 and (kind == "WEBP" or (deep and kind == "PNG" and array.shape[2] == 2)):
        array = array[..., [0, 0, 0, 1][: array.shape[2] + 2]]  # WebP has no grey, and OpenCV no deep grey with alpha
    icc = None if picture.icc and _is_grey_profile(picture.icc) != (array.shape[2] < 3) else picture.icc
    with atomic_path(path) as temporary:
        if deep and kind == "TIFF":
            deep_images.write_tiff(temporary, array, icc)
        elif deep:
            deep_images.write_png(temporary, array, icc, picture.exif)
        else:
            _write_pillow(temporary, array, kind, icc, picture.exif)


def check_output(path: Path, has_alpha: bool, size: tuple[int, int]) -> str:
    """Pillow's name of the format that ``path`` asks for, which can hold alpha and (height, width) pixels.

    Raises:
        ValueError: as ``write_picture``.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown format; expected one of {', '.join(FORMATS)}")
    if has_alpha and kind not in _ALPHA:
        raise ValueError(f"{path}: {kind} cannot hold the alpha channel of the input; write .png, .webp or .tif")
    longest = _LONGEST.get(kind)
    if longest and max(size) > longest:
        raise ValueError(
            f"{path}: {kind} holds at most {longest} pixels a side, this is {size[1]}x{size[0]}; write .png or .tif"
        )
    return kind


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """uint8 ``(H, W, 1..4)``."""
    if image.mode in ("I", "F"):
        raise _RefusedError("has 32 bits per channel: expected 8 or 16")
    if image.mode == "CMYK":
        image = _cmyk_to_srgb(image)
    elif image.mode in ("1", "L"):
        image = image.convert("LA" if "transparency" in image.info else "L")
    elif image.mode in ("P", "PA", "RGB") and (image.mode == "PA" or "transparency" in image.info):
        image = image.convert("RGBA")
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGB")
    array = np.array(image)
    return array[..., None] if array.ndim == 2 else array


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile is None:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        log.warning("a CMYK profile cannot be used (%s): plain conversion", error)
        return image.convert("RGB")
    assert converted is not None  # None only when converting in place
    return converted


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn ``(H, W, C)`` as the EXIF orientation (1 to 8) says."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _to_array(picture: Picture, full: int) -> np.ndarray:
    """``(H, W, 1..4)`` whole numbers from 0 to ``full``."""
    colours = picture.rgb[0]
    if picture.grey:
        colours = (colours * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    channels = colours if picture.alpha is None else torch.cat((colours, picture.alpha[0]))
    values = (channels.clamp(0, 1) * full).round().permute(1, 2, 0).numpy()
    return values.astype(np.uint8 if full == 255 else np.uint16)


def _is_grey_profile(icc: bytes) -> bool:
    """Whether an ICC profile describes grey; the colour space stands at byte 16 of the header."""
    return icc[16:20] == b"GRAY"


def _write_pillow(path: Path, array: np.ndarray, kind: str, icc: bytes | None, exif: bytes | None) -> None:
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    options: dict[str, object] = {
        "JPEG": {"quality": _QUALITY, "subsampling": 0},
        "WEBP": {"quality": _QUALITY, "method": 4},
        "TIFF": {"compression": "tiff_adobe_deflate"},
    }.get(kind, {})
    if kind != "BMP":
        options |= {"icc_profile": icc} if icc else {}
        options |= {"exif": exif} if exif else {}
    image.save(path, kind, **options)
