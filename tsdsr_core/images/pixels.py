"""Decodes image files to arrays of 8 or 16 bits ``(H, W, 1..4)``, and encodes arrays as files.

Channels are grey, grey and alpha, RGB, or RGB and alpha, with straight (not premultiplied) alpha.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from ..checks import some
from . import sixteen_bit
from .containers import (
    COMMENT,
    EXIF,
    ICC,
    IPTC,
    XMP,
    Parts,
    avif_without_exif,
    join_jpeg,
    join_png,
    join_tiff,
    split_jpeg,
    split_png,
    text_names,
)
from .formats import RefusedError
from .tiff_tags import take_tags

_PHONES = {"HEIF"}
"""Formats in which phones store depth or gain maps as further images."""
_OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95, "method": 4},
    "TIFF": {"compression": "tiff_adobe_deflate"}, "AVIF": {"quality": 90},
}  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """The contents of a file."""

    array: np.ndarray
    """uint8 or uint16, as stored: the orientation is not applied yet."""
    parts: Parts
    orientation: object = None
    """The orientation, if it is stored outside of EXIF data."""


def decode(data: bytes, kind: str) -> Decoded:
    """Decode the pixels and metadata of a file of Pillow's format ``kind``; CMYK and Lab are converted to sRGB.

    Raises:
        RefusedError: for an animation, several pages, or an unsupported bit depth.
        Exception: of any kind for a damaged file.
    """
    if kind == "TIFF" and (tiff := sixteen_bit.read_tiff(data)) is not None:
        take_tags(data, tiff.parts)
        return Decoded(tiff.array, tiff.parts, tiff.orientation)
    pixels, parts = split(data, kind)
    with _opened(data if pixels is None else pixels, kind, parts) as image:
        frames = getattr(image, "n_frames", 1) if image.format not in _PHONES else 1
        if frames > 1 and not (kind == "TIFF" and sixteen_bit.count_pages(data) == 1):
            raise RefusedError("is animated or has several pages: give single images")
        _check_depth(image)
        image.load()
        orientation = None
        if pixels is None:
            parts.icc, parts.exif, parts.xmp = (image.info.get(name) for name in ("icc_profile", "exif", "xmp"))
        if kind == "TIFF":
            parts.exif, orientation = None, image.tag_v2.get(274, 1)  # pyright: ignore[reportAttributeAccessIssue]
            take_tags(data, parts)
        array = _deep(data if pixels is None else pixels, image, parts)
        if kind == "PNG" and image.mode == "L" and isinstance(image.info.get("transparency"), int):
            bits = data[24] if pixels is None else pixels[24]
            image.info["transparency"] *= 255 // (2 ** min(bits, 8) - 1)  # Pillow scales the samples, but not this one
        return Decoded(_to_8_bit(image, parts) if array is None else array, parts, orientation)


def _opened(pixels: bytes, kind: str, parts: Parts) -> Image.Image:
    try:
        return Image.open(io.BytesIO(pixels), formats=[kind])
    except Exception:
        other = avif_without_exif(pixels) if kind == "AVIF" else pixels
        if other == pixels:
            raise
        image = Image.open(io.BytesIO(other), formats=[kind])
        parts.problems.append(f"{EXIF} (damaged)")
        return image


def split(data: bytes, kind: str) -> tuple[bytes | None, Parts]:
    """Split a PNG or JPEG into a file with only the pixels, and the metadata; (None, empty) for other formats."""
    found = {"PNG": split_png, "JPEG": split_jpeg}.get(kind)
    return found(data) if found else (None, Parts())


def _check_depth(image: Image.Image) -> None:
    """Raise ``RefusedError`` for images that Pillow would silently reduce to 8 bits or clip."""
    if image.format == "PNG":
        return  # 16-bit PNG is not read by Pillow here
    bits = max(image.tag_v2.get(258, (1,))) if image.format == "TIFF" else 8  # pyright: ignore[reportAttributeAccessIssue]
    if image.mode in ("I", "F") or image.mode.startswith("I;") or bits > 8:
        bits = 32 if image.mode in ("I", "F") else max(bits, 16)
        raise RefusedError(f"has {bits} bits per channel in an unsupported form: expected 8, or 16 in PNG or TIFF")


def _deep(data: bytes, image: Image.Image, parts: Parts) -> np.ndarray | None:
    """uint16 pixels of a file with more than 8 bits per channel; None for 8 bits, or if only 8 bits can be read."""
    if image.format == "PNG":
        return sixteen_bit.read_png(data, image.info.get("transparency")) if data[24] == 16 else None
    bits = sixteen_bit.avif_depth(data) if image.format == "AVIF" else image.info.get("bit_depth", 8)
    array = sixteen_bit.read_avif(data, bits) if image.format == "AVIF" and bits > 8 else None
    if array is not None and array.shape[:2] == (image.height, image.width):
        return array
    if bits > 8:
        parts.problems.append(f"{bits - 8} of its {bits} bits per channel (only 8 bits of {image.format} can be read here)")
    return None


def _to_8_bit(image: Image.Image, parts: Parts) -> np.ndarray:
    if image.mode in ("CMYK", "LAB"):
        image = _to_srgb(image, parts)
    elif image.mode in ("1", "L"):
        image = image.convert("LA" if "transparency" in image.info else "L")
    elif image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode == "PA" or (image.mode in ("P", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA")
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGB")
    array = np.array(image)
    return array[..., None] if array.ndim == 2 else array


def _to_srgb(image: Image.Image, parts: Parts) -> Image.Image:
    """Convert CMYK (with its profile if that is valid) or Lab to sRGB."""
    profile, parts.icc = parts.icc, None  # the result is sRGB
    if image.mode == "LAB":
        return _converted(image, ImageCms.createProfile("LAB"))
    if profile:
        try:
            return _converted(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except Exception as error:  # a damaged profile can raise anything
            parts.problems.append(f"{ICC} ({error}; CMYK is converted without it)")
    return image.convert("RGB")


def _converted(image: Image.Image, source: object) -> Image.Image:
    result = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")  # pyright: ignore
    assert result is not None  # it is None only when converting in place
    return result


def upright(array: np.ndarray, orientation: object) -> np.ndarray:
    """Rotate and mirror ``(H, W, C)`` by the EXIF orientation (1 to 8); other values are ignored."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def encode(array: np.ndarray, kind: str, parts: Parts) -> tuple[bytes, list[str]]:
    """Encode a file of Pillow's format ``kind``; also returns the ``parts`` it cannot store, with the reason in brackets.

    Args:
        array: uint8, or uint16 for PNG and TIFF, ``(H, W, 1..4)``; not grey for WebP, nor grey with alpha for 16-bit PNG.
    """
    deep, texts = array.dtype == np.uint16, text_names(parts.chunks, COMMENT if kind == "JPEG" else None)
    lost = [f"texts {some(texts)} ({kind} cannot store them)"] if texts and kind != "PNG" else []
    if parts.iptc and kind not in ("JPEG", "TIFF"):
        lost.append(f"{IPTC} ({kind} cannot store them)")
    if kind == "PNG":
        data, refused = join_png(sixteen_bit.encode_png(array) if deep else _with_pillow(array, kind), parts)
    elif kind == "JPEG":
        data, refused = join_jpeg(_with_pillow(array, kind), parts)
    elif kind == "TIFF":
        profile = {"icc_profile": parts.icc} if parts.icc else {}
        data = sixteen_bit.encode_tiff(array, parts.icc) if deep else _with_pillow(array, kind, **profile)
        data, refused = join_tiff(data, parts), []
    else:
        data, refused = _with_pillows_parts(array, kind, parts)
    return data, refused + lost


def _with_pillows_parts(array: np.ndarray, kind: str, parts: Parts) -> tuple[bytes, list[str]]:
    held = {"icc_profile": (parts.icc, ICC), "exif": (parts.exif, EXIF), "xmp": (parts.xmp, XMP)}
    held = {option: found for option, found in held.items() if found[0]}
    names = " and ".join(name for _, name in held.values())
    if kind == "BMP":
        return _with_pillow(array, kind), [f"{names} (BMP cannot store them)"] if held else []
    return _with_pillow(array, kind, **{option: part for option, (part, _) in held.items()}), []


def _with_pillow(array: np.ndarray, kind: str, **held: object) -> bytes:
    file, options = io.BytesIO(), {**_OPTIONS.get(kind, {}), **held}
    if kind == "AVIF" and array.shape[2] >= 3:
        options["subsampling"] = "4:4:4"
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, kind, **options)
    return file.getvalue()
