"""Splits files into pixels and metadata, and joins them again, so that decoders of PNG and JPEG only see the pixels.

Decoders reject a whole image for a damaged profile or an oversized text.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from .exif_writing import exif_bytes
from .formats import RefusedError

Chunk = tuple[bytes, bytes]
"""Type and data of a PNG chunk."""
ICC, EXIF, XMP, IPTC = "ICC profile", "EXIF data", "XMP data", "IPTC data"
"""Names of the parts in messages."""
EXIF_START = b"Exif\0\0"
"""Marker before EXIF data in JPEG; not used in PNG."""
MAX_COMPRESSED = 2**20
"""Maximum size of a decompressed profile or text of a PNG, in bytes: Pillow rejects files with larger ones."""
MAX_TEXT = 2**25
"""Maximum size of all texts of a PNG together, decompressed, in bytes; Pillow's limit is 64 MB, including XMP data."""
COLOUR_CHUNKS = {b"cICP": 4, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"mDCV": 24, b"cLLI": 8}
"""PNG chunks that define the colour space, and their lengths in bytes."""

_PNG_XMP = b"XML:com.adobe.xmp"
_XMP_START = b"http://ns.adobe.com/xap/1.0/\0"
_ICC_START = b"ICC_PROFILE\0"
_XMP_MORE_START = b"http://ns.adobe.com/xmp/extension/\0"
_PHOTOSHOP_START, _RESOURCE, _IPTC_RESOURCE = b"Photoshop 3.0\0", b"8BIM", 0x0404
COMMENT = b"Comment"
"""PNG's keyword for a JPEG comment."""
_TIFF_XMP, TIFF_IPTC = 700, 33723
_MAX_SEGMENT = 65533
"""Maximum data of a JPEG segment in bytes."""


@dataclass
class Parts:
    """Metadata as stored in a file, not checked yet."""

    icc: bytes | None = None
    exif: bytes | None = None
    """TIFF structure with or without ``Exif\\0\\0`` before it."""
    xmp: bytes | None = None
    iptc: bytes | None = None
    chunks: list[Chunk] = field(default_factory=list)
    """Texts and colour descriptions as PNG chunks. Of the texts, JPEG can store comments; other formats store none."""
    problems: list[str] = field(default_factory=list)
    """Parts that cannot be read, with the reason."""
    text_bytes: int = field(default=0, compare=False)
    """Total size of the texts in ``chunks``, decompressed."""


class _PartError(ValueError):
    """A part of a file cannot be used; the message is shown in brackets after the part's name."""


def split_png(data: bytes) -> tuple[bytes, Parts]:
    """Split a PNG file into a PNG file with only the pixels, and the metadata.

    Raises:
        RefusedError: for an animation.
    """
    parts, kept = Parts(), [data[:8]]
    for kind, start, end in _chunks(data):
        body = data[start + 8 : end - 4]
        if kind == b"acTL" and body[:4] > b"\0\0\0\1":
            raise RefusedError("is animated: give single images")
        if not kind[0] & 0x20 or (kind == b"tRNS" and _fits(body, data[25:26])):  # what decoding needs
            kept.append(data[start:end])
            continue
        try:
            if zlib.crc32(kind + body) != int.from_bytes(data[end - 4 : end]):
                raise _PartError("damaged")
            _take_chunk(parts, kind, body)
        except (_PartError, zlib.error, ValueError) as error:
            name = _part_name(kind, body)
            if name:
                parts.problems.append(f"{name} ({error if isinstance(error, _PartError) else 'damaged'})")
    return b"".join(kept), parts


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk; data that is not a whole chunk is returned as pixels, for the decoder to check."""
    start = 8
    while start < len(data):
        length, kind = int.from_bytes(data[start : start + 4]), data[start + 4 : start + 8]
        end = start + 12 + length
        if end > len(data) or not kind.isalpha():
            yield b"IDAT", start, len(data)
            return
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end


def _fits(transparency: bytes, colour_type: bytes) -> bool:
    """Whether a tRNS chunk has the right length for the colour type; images with alpha have no such chunk."""
    return len(transparency) in {b"\0": (2,), b"\2": (6,), b"\3": range(1, 257)}.get(colour_type, ())


def _part_name(kind: bytes, body: bytes) -> str | None:
    if kind in (b"tEXt", b"zTXt", b"iTXt"):
        keyword = body.partition(b"\0")[0]
        return XMP if keyword == _PNG_XMP else f"text {keyword[:79].decode('latin-1')!r}"
    if kind in COLOUR_CHUNKS or kind == b"tRNS":
        return kind.decode()
    return {b"iCCP": ICC, b"eXIf": EXIF}.get(kind)


def _take_chunk(parts: Parts, kind: bytes, body: bytes) -> None:
    if kind == b"tRNS":
        raise _PartError("damaged")
    if kind == b"iCCP" and parts.icc is None:
        parts.icc = _inflate(body.partition(b"\0")[2][1:])
    elif kind == b"eXIf":
        parts.exif = body
    elif kind in COLOUR_CHUNKS:
        if len(body) != COLOUR_CHUNKS[kind]:
            raise _PartError("damaged")
        if kind not in dict(parts.chunks):
            parts.chunks.append((kind, body))
    elif kind in (b"tEXt", b"zTXt", b"iTXt"):
        _take_text(parts, kind, body)


def _take_text(parts: Parts, kind: bytes, body: bytes) -> None:
    keyword, text = _text(kind, body)
    if keyword == _PNG_XMP:
        parts.xmp = text
    elif keyword in (b"Raw profile type exif", b"Raw profile type APP1"):  # by ImageMagick: name, length, hexadecimal digits
        if parts.exif is None:
            parts.exif = bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    else:
        _add_text(parts, (kind, body), len(text))


def _text(kind: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Keyword and decompressed text of a chunk: Latin-1, or UTF-8 in ``iTXt``."""
    keyword, found, rest = body.partition(b"\0")
    if not found or not 1 <= len(keyword) <= 79:
        raise _PartError("damaged")
    if kind == b"zTXt":
        return keyword, _inflate(rest[1:])
    if kind == b"tEXt":
        return keyword, rest
    compressed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)
    if len(text) != 3:
        raise _PartError("damaged")
    return keyword, _inflate(text[2]) if compressed else text[2]


def _add_text(parts: Parts, chunk: Chunk, length: int) -> None:
    if parts.text_bytes + length > MAX_TEXT:
        raise _PartError(f"the texts have more than {MAX_TEXT // 2**20} MB in total")
    parts.text_bytes += length
    parts.chunks.append(chunk)


def text_names(chunks: Iterable[Chunk], held: bytes | None = None) -> list[str]:
    """Keywords of the texts in ``chunks``, except for ``held``, which the format can store."""
    keywords = (body.partition(b"\0")[0] for kind, body in chunks if kind not in COLOUR_CHUNKS)
    return [repr(keyword.decode("latin-1")) for keyword in keywords if keyword != held]


def _inflate(data: bytes) -> bytes:
    decoder = zlib.decompressobj()
    result = decoder.decompress(data, MAX_COMPRESSED + 1)
    if len(result) > MAX_COMPRESSED:
        raise _PartError(f"more than {MAX_COMPRESSED // 2**20} MB")
    if not decoder.eof:
        raise _PartError("damaged")
    return result


def join_png(data: bytes, parts: Parts) -> tuple[bytes, list[str]]:
    """Insert ``parts`` into a PNG file without metadata; also returns the names of those that PNG cannot store."""
    left_out = []
    chunks = [chunk for chunk in parts.chunks if chunk[0] in COLOUR_CHUNKS]
    if parts.icc and len(parts.icc) > MAX_COMPRESSED:
        left_out.append(f"{ICC} (more than {MAX_COMPRESSED // 2**20} MB)")
    elif parts.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(parts.icc)))
    if parts.exif:
        chunks.append((b"eXIf", parts.exif.removeprefix(EXIF_START)))
    if parts.xmp:
        chunks.append((b"iTXt", _PNG_XMP + b"\0\0\0\0\0" + parts.xmp))
    chunks += [chunk for chunk in parts.chunks if chunk[0] not in COLOUR_CHUNKS]
    made = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"".join((data[:33], *made, data[33:])), left_out  # after the signature and IHDR


def split_jpeg(data: bytes) -> tuple[bytes, Parts]:
    """Split a JPEG file into a JPEG file with only the pixels (of the first image), and the metadata.

    Raises:
        RefusedError: for more than 8 bits per channel.
    """
    parts, kept, profile, resources = Parts(), [data[:2]], {}, b""
    start = 2
    while start < len(data):
        marker, end = data[start + 1 : start + 2], start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if data[start] == 0xFF and marker == b"\xff":  # a fill byte
            start += 1
            continue
        if data[start] != 0xFF or not start + 4 <= end <= len(data) or marker == b"\xda":  # compressed pixels, or damage
            kept.append(data[start:])
            break
        body = data[start + 4 : end]
        if b"\xc0" <= marker <= b"\xcf" and marker not in (b"\xc4", b"\xc8", b"\xcc") and body[:1] > b"\x08":
            raise RefusedError(f"is a JPEG file of {body[0]} bits per channel: expected 8")
        if marker == b"\xe1" and body.startswith(b"Exif\0"):
            parts.exif = parts.exif or body
        elif marker == b"\xe1" and body.startswith(_XMP_START):
            parts.xmp = parts.xmp or body.removeprefix(_XMP_START)
        elif marker == b"\xe2" and body.startswith(_ICC_START):
            profile.setdefault(body[12:13], body[14:])
        elif marker == b"\xed" and body.startswith(_PHOTOSHOP_START):
            resources += body.removeprefix(_PHOTOSHOP_START)
        elif marker == b"\xfe" or body.startswith(_XMP_MORE_START):
            _take_jpeg_text(parts, body)
        elif not (b"\xe1" <= marker <= b"\xef" and marker != b"\xee"):  # JFIF's and Adobe's segments concern the pixels
            kept.append(data[start:end])
        start = end
    parts.icc = b"".join(profile[number] for number in sorted(profile)) or None
    try:
        parts.iptc = _resource(resources, _IPTC_RESOURCE)
    except _PartError as error:
        parts.problems.append(f"{IPTC} ({error})")
    return b"".join(kept), parts


def _take_jpeg_text(parts: Parts, body: bytes) -> None:
    if body.startswith(_XMP_MORE_START):
        problem = "extended XMP data (not carried over)"
        parts.problems += [] if problem in parts.problems else [problem]
        return
    text = body.rstrip(b"\0")
    try:
        if b"\0" in text:
            raise _PartError("damaged")
        if text and not text.isascii() and _is_utf_8(text):
            _add_text(parts, (b"iTXt", COMMENT + b"\0\0\0\0\0" + text), len(text))
        elif text:
            _add_text(parts, (b"tEXt", COMMENT + b"\0" + text), len(text))
    except _PartError as error:
        parts.problems.append(f"comment ({error})")


def _is_utf_8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _resource(data: bytes, number: int) -> bytes | None:
    """The Photoshop resource with this number; None if there is none."""
    place = 0
    while data[place : place + 4] == _RESOURCE:
        name = 1 + int.from_bytes(data[place + 6 : place + 7])
        start = place + 6 + name + name % 2 + 4
        end = start + int.from_bytes(data[start - 4 : start])
        if int.from_bytes(data[place + 4 : place + 6]) == number:
            if end > len(data):
                raise _PartError("damaged")
            return data[start:end]
        place = end + end % 2
    return None


def join_jpeg(data: bytes, parts: Parts) -> tuple[bytes, list[str]]:
    """Insert ``parts`` into a JPEG file without metadata; also returns the names of those that JPEG cannot store."""
    segments, left_out = [], []
    held = [(0xE1, b"", parts.exif, EXIF), (0xE1, _XMP_START, parts.xmp, XMP), (0xED, *_photoshop(parts.iptc), IPTC)]
    held += [(0xFE, b"", _text(kind, body)[1], "comment") for kind, body in parts.chunks
             if kind not in COLOUR_CHUNKS and body.startswith(COMMENT + b"\0")]  # fmt: skip
    for marker, start, part, name in held:
        if part and len(start + part) > _MAX_SEGMENT:
            left_out.append(f"{name} (more than 64 KB)")
        elif part:
            segments.append((marker, start + part))
    limit = _MAX_SEGMENT - len(_ICC_START) - 2
    pieces = [parts.icc[at : at + limit] for at in range(0, len(parts.icc), limit)] if parts.icc else []
    if len(pieces) > 255:
        left_out.append(f"{ICC} (more than 16 MB)")
    else:
        segments += [(0xE2, _ICC_START + bytes((n, len(pieces))) + piece) for n, piece in enumerate(pieces, 1)]
    place = 4 + int.from_bytes(data[4:6]) if data[2:4] == b"\xff\xe0" else 2  # after JFIF's segment
    made = [struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments]
    return b"".join((data[:place], *made, data[place:])), left_out


def _photoshop(iptc: bytes | None) -> tuple[bytes, bytes | None]:
    """The header of IPTC data in a JPEG segment, and the data padded to an even length."""
    start = _PHOTOSHOP_START + _RESOURCE + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc or b""))
    return start, iptc and iptc + bytes(len(iptc) % 2)


def join_tiff(data: bytes, parts: Parts) -> bytes:
    """Insert EXIF, XMP and IPTC data into the directory of a TIFF file; Pillow cannot do that for compressed files."""
    exif = Image.Exif()
    if parts.exif:
        exif.load(parts.exif)
    if parts.xmp:
        exif[_TIFF_XMP] = parts.xmp
    if parts.iptc:
        exif[TIFF_IPTC] = parts.iptc
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if not len(exif) or order is None:
        return data
    data += bytes(len(data) % 2)
    exif.endian = order
    added = exif_bytes(exif, len(data) + 8).removeprefix(EXIF_START)  # a directory with offsets relative to this file
    own = _entries(data, struct.unpack_from(order + "I", data, 4)[0], order)
    entries = {**own, **_entries(added, 8, order), **{tag: own[tag] for tag in (256, 257)}}  # keep the stored size
    data += added + bytes(len(added) % 2)
    directory = b"".join(entry for _, entry in sorted(entries.items()))
    place = struct.pack(order + "I", len(data))
    return data[:4] + place + data[8:] + struct.pack(order + "H", len(entries)) + directory + bytes(4)


def _entries(tiff: bytes, place: int, order: str) -> dict[int, bytes]:
    """The entries of a TIFF directory, 12 bytes each, by tag."""
    (count,) = struct.unpack_from(order + "H", tiff, place)
    found = [tiff[at : at + 12] for at in range(place + 2, place + 2 + 12 * count, 12)]
    return {struct.unpack_from(order + "H", entry)[0]: entry for entry in found}


def avif_without_exif(data: bytes) -> bytes:
    """Hide the EXIF data of an AVIF file from libavif, which rejects the file if they are damaged."""
    return re.sub(rb"(infe[\2\3].{3}(?:.{2}|.{4})\0\0)Exif", rb"\1skip", data, count=1, flags=re.DOTALL)
