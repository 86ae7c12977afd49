"""Writing EXIF data."""

from __future__ import annotations

from PIL import ExifTags, Image

_DIRECTORIES = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo


class _Text(str):
    """Text of EXIF data, whose bytes Pillow reads as Latin-1 but would write as ASCII, with ``?`` for what is not."""

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        return super().encode("latin-1")


def exif_bytes(exif: Image.Exif, offset: int = 8) -> bytes:
    """``exif`` as bytes, with text in any encoding as it was read.

    Args:
        offset: of the directory in the file that it is for.
    """
    inner = [exif[tag] if isinstance(exif[tag], dict) else exif.get_ifd(tag) for tag in _DIRECTORIES if tag in exif]
    for directory in (exif, *inner):
        for tag, value in list(directory.items()):
            if isinstance(value, str) and not value.isascii():
                directory[tag] = _Text(value)
    return exif.tobytes(offset)
