"""Reading and writing pictures: PNG, JPEG, WebP, TIFF and BMP, of 8 or 16 bits, with alpha and colour profile."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image, ImageCms
from torch import Tensor

from .files import atomic_path

log = logging.getLogger("tsdsr")

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
}  # fmt: skip
"""What is read and written, by file suffix."""
_ALPHA = {"PNG", "WEBP", "TIFF"}
_DEEP = {"PNG", "TIFF"}
"""Formats that hold 16 bits."""
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


def read_picture(path: Path) -> Picture:
    """Read a picture with its EXIF orientation applied; CMYK becomes sRGB through its profile.

    Raises:
        ValueError: for a missing, damaged or animated file or an unknown format, naming it.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown format; expected one of {', '.join(FORMATS)}")
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # phones add depth or gain maps to a JPEG
                raise ValueError(f"{path} is animated or has several pages: give single pictures")
            deep = any(";16" in str(tile) for tile in image.tile)  # Pillow would round colours to 8 bits, silently
            image.load()
            exif = image.getexif()
            array = _read_deep(path, image) if deep else _to_8_bit(path, image)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow says SyntaxError of broken PNGs
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    array = _upright(array, exif.pop(_EXIF_ORIENTATION, 1))
    icc = None if image.mode == "CMYK" else image.info.get("icc_profile")
    values = torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max).permute(2, 0, 1)[None]
    grey = values.shape[1] < 3
    return Picture(
        rgb=values[:, :1].repeat(1, 3, 1, 1) if grey else values[:, :3],
        alpha=values[:, -1:] if values.shape[1] in (2, 4) else None,
        grey=grey,
        deep=deep,
        icc=icc,
        exif=exif.tobytes() if "exif" in image.info and len(exif) else None,  # a TIFF's own tags are not kept
    )


def write_picture(path: Path, picture: Picture) -> None:
    """Write a picture in the format of its suffix, all or nothing; JPEG and WebP at quality 95.

    Raises:
        ValueError: for an unknown suffix, or alpha in a format without it.
    """
    kind = output_format(path, picture.alpha is not None)
    deep = picture.deep and kind in _DEEP
    if picture.deep and not deep:
        log.warning("%s: %s holds 8 of the input's 16 bits", path, kind)
    array = _to_array(picture, 65535 if deep else 255)
    if deep and array.shape[2] == 2:  # OpenCV writes no deep grey with alpha, and Pillow reads none from TIFF
        array = array[..., [0, 0, 0, 1]]
    with atomic_path(path) as temporary:
        if deep and kind == "TIFF":
            _write_deep_tiff(temporary, array, picture)
        elif deep:
            _write_deep_png(temporary, array, picture)
        else:
            _write_pillow(temporary, array, picture, kind)


def output_format(path: Path, has_alpha: bool) -> str:
    """Pillow's name of the format that ``path`` asks for.

    Raises:
        ValueError: as ``write_picture``.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown format; expected one of {', '.join(FORMATS)}")
    if has_alpha and kind not in _ALPHA:
        raise ValueError(f"{path}: {kind} cannot hold the alpha channel of the input; write .png, .webp or .tif")
    return kind


def _read_deep(path: Path, image: Image.Image) -> np.ndarray:
    """uint16 ``(H, W, 1..4)``."""
    array = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16:
        raise OSError("its 16-bit layout is not supported")
    array = array[..., None] if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]  # OpenCV has BGR(A)
    if image.mode == "LA" and array.shape[2] == 4:
        array = array[..., [0, 3]]
    return array


def _to_8_bit(path: Path, image: Image.Image) -> np.ndarray:
    """uint8 ``(H, W, 1..4)``."""
    if image.mode in ("I", "F"):
        raise ValueError(f"{path} has 32 bits per channel: expected 8 or 16")
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


def _write_pillow(path: Path, array: np.ndarray, picture: Picture, kind: str) -> None:
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    options: dict[str, object] = {
        "JPEG": {"quality": _QUALITY, "subsampling": 0},
        "WEBP": {"quality": _QUALITY, "method": 4},
        "TIFF": {"compression": "tiff_adobe_deflate"},
    }.get(kind, {})
    if kind != "BMP":
        options |= {"icc_profile": picture.icc} if picture.icc else {}
        options |= {"exif": picture.exif} if picture.exif else {}
    image.save(path, kind, **options)


def _write_deep_png(path: Path, array: np.ndarray, picture: Picture) -> None:
    if array.shape[2] >= 3:
        array = array[..., [2, 1, 0, 3][: array.shape[2]]]
    kept = {cv2.IMAGE_METADATA_ICCP: picture.icc, cv2.IMAGE_METADATA_EXIF: picture.exif}
    kinds = [kind for kind, value in kept.items() if value]
    values = [np.frombuffer(kept[kind] or b"", np.uint8)[None] for kind in kinds]
    if not cv2.imwriteWithMetadata(str(path), array, kinds, values):
        raise OSError(f"{path} cannot be written")


def _write_deep_tiff(path: Path, array: np.ndarray, picture: Picture) -> None:
    tifffile.imwrite(
        path,
        array[..., 0] if array.shape[2] == 1 else array,
        photometric="minisblack" if array.shape[2] == 1 else "rgb",
        planarconfig="contig",
        extrasamples=["unassalpha"] if picture.alpha is not None else None,
        compression="zlib",
        iccprofile=picture.icc,
    )
