"""Metadata goes from file to file where it is sound, speaks of the result, and never costs an image where it is not."""

import io
import logging
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from tsdsr_core.images.containers import Parts, join_jpeg, split_png
from tsdsr_core.images.files import Picture, read_header, read_picture, write_picture
from tsdsr_core.images.formats import FORMATS

from ..support.tiny import photo

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK_PROFILE = SRGB[:16] + b"CMYK" + SRGB[20:]
XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    b' tiff:Orientation="6" tiff:ImageWidth="20" exif:PixelXDimension="20" xmp:Rating="4">'
    b"<exif:PixelYDimension>10</exif:PixelYDimension><tiff:ImageLength>10</tiff:ImageLength>"
    b"<xmp:Thumbnails><rdf:Alt><rdf:li>JPEGDATA</rdf:li></rdf:Alt></xmp:Thumbnails>"
    b'</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def exif(orientation: int = 6, width: int = 20, height: int = 10, thumbnail: bool = True) -> bytes:
    """EXIF of a camera, as such a file has it: sizes in both directories, a place, and a thumbnail."""
    made = Image.Exif()
    made[ExifTags.Base.Make], made[ExifTags.Base.Orientation] = "Camera", orientation
    made[ExifTags.Base.ImageWidth], made[ExifTags.Base.ImageLength] = width, height
    made[ExifTags.Base.BitsPerSample], made[ExifTags.Base.Compression], made[ExifTags.Base.StripOffsets] = (8, 8, 8), 6, 77
    made[ExifTags.IFD.Exif] = {ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: height}
    made[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    data = made.tobytes()
    if not thumbnail:
        return data
    small, tiff = io.BytesIO(), bytearray(data[6:])
    Image.new("RGB", (8, 4), "red").save(small, "JPEG")
    order = {b"MM": ">", b"II": "<"}[bytes(tiff[:2])]
    count = struct.unpack_from(order + "H", tiff, 8)[0]
    struct.pack_into(order + "I", tiff, 10 + 12 * count, len(tiff))  # where the directory of the thumbnail follows
    entries = ((513, len(tiff) + 2 + 24 + 4), (514, len(small.getvalue())))
    directory = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    return data[:6] + bytes(tiff) + struct.pack(order + "H", 2) + directory + bytes(4) + small.getvalue()


def drawn() -> Image.Image:
    return Image.fromarray((photo(10, 20)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def png(*chunks: tuple[bytes, bytes], deep: bool = False) -> bytes:
    if deep:
        array = (photo(10, 20)[0].permute(1, 2, 0).numpy()[..., ::-1] * 65535).round().astype(np.uint16)
        data = cv2.imencode(".png", array)[1].tobytes()
    else:
        file = io.BytesIO()
        drawn().save(file, "PNG")
        data = file.getvalue()
    made = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return data[:33] + b"".join(made) + data[33:]


def with_parts(path: Path, deep: bool = False, **parts: bytes) -> None:
    """A file with ``icc``, ``exif`` and ``xmp`` exactly as given, sound or not; AVIF pads them with zeros."""
    kind, names = FORMATS[path.suffix], {"icc": "icc_profile", "exif": "exif", "xmp": "xmp"}
    if kind == "PNG":
        forms = {
            "icc": lambda part: (b"iCCP", b"x\0\0" + zlib.compress(part)),
            "exif": lambda part: (b"eXIf", part.removeprefix(b"Exif\0\0")),
            "xmp": lambda part: (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + part),
        }
        path.write_bytes(png(*(forms[name](part) for name, part in parts.items()), deep=deep))
        return
    file, held = io.BytesIO(), {names[name]: part for name, part in parts.items()}
    if kind == "JPEG":
        drawn().save(file, kind, quality=95)
        path.write_bytes(join_jpeg(file.getvalue(), Parts(**parts))[0])
        return
    if kind == "TIFF" and "xmp" in held:
        held["exif"] = Image.Exif()
        held["exif"][700] = held.pop("xmp")
    spoilt = held.get("exif") if kind == "AVIF" else None  # Pillow writes no damaged EXIF into AVIF
    if spoilt is not None:
        held["exif"] = GOOD_EXIF
    drawn().save(file, kind, **held, **({"lossless": True} if kind == "WEBP" else {}))
    data = file.getvalue()
    if spoilt is not None:
        whole = Image.open(file).info["exif"][6:]
        place, length = data.index(whole), len(whole)
        data = data[:place] + spoilt[6:][:length].ljust(length, b"\0") + data[place + length :]
    path.write_bytes(data)


GOOD_EXIF = exif(1)
DAMAGED = {
    "icc-text": {"icc": b"no profile" * 30},
    "icc-cut": {"icc": SRGB[:300]},
    "icc-tags": {"icc": SRGB[:140] + bytes(len(SRGB) - 140)},
    "icc-cmyk": {"icc": CMYK_PROFILE},
    "exif-text": {"exif": b"Exif\0\0garbage garbage garbage"},
    "exif-short": {"exif": b"Exif\0\0II*\0"},
    "exif-zero": {"exif": b"Exif\0\0" + bytes(50)},
    "exif-loop": {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x01" * 30},
    "exif-cut": {"exif": GOOD_EXIF[:60]},
    "xmp-cut": {"xmp": XMP.replace(b'n="6"', b'n="1"')[:-60]},
    "xmp-bytes": {"xmp": b"\xff\xfe\x01junk"},
    "xmp-entities": {"xmp": b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'},
}
UNKNOWN = {("exif-cut", ".avif"), *((case, ".tif") for case in DAMAGED if case.startswith("exif"))}
"""What cannot be written here; the EXIF data of a TIFF are its own tags."""
SUFFIXES = [".png", "deep.png", ".jpg", ".webp", ".tif", *({".avif"} & FORMATS.keys())]
NAMES = {"icc": "ICC profile", "exif": "EXIF data", "xmp": "XMP data"}


@pytest.mark.parametrize(
    ("case", "suffix"),
    [(case, suffix) for case in DAMAGED for suffix in SUFFIXES if (case, suffix) not in UNKNOWN],
)
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data", "ignore:Tag data")
def test_damaged_parts_are_left_out_with_one_warning(case, suffix, tmp_path, caplog):
    parts, path = DAMAGED[case], tmp_path / f"x{suffix}"
    with_parts(path, "deep" in suffix, **parts)
    picture = read_picture(path)
    assert (picture.rgb - photo(10, 20)).abs().mean() < 0.05
    assert (picture.icc, picture.exif, picture.xmp) == (None, None, None)
    (record,) = caplog.records
    assert path.name in record.getMessage()
    assert NAMES[next(iter(parts))] in record.getMessage()
    caplog.clear()
    write_picture(tmp_path / f"y{suffix}", picture)
    assert not caplog.records
    assert Image.open(tmp_path / f"y{suffix}").size == (20, 10)


BOMB = zlib.compress(bytes(3 * 2**20))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("chunk", "name"),
    [
        ((b"zTXt", b"Comment\0\0" + BOMB), "text 'Comment'"),
        ((b"iTXt", b"Comment\0\1\0\0\0" + BOMB), "text 'Comment'"),
        ((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB), "XMP data"),
        ((b"zTXt", b"Raw profile type exif\0\0" + BOMB), "text 'Raw profile type exif'"),
        ((b"zTXt", b"Comment\0\0no deflated data"), "text 'Comment'"),
        ((b"tEXt", b"no end of the keyword"), "text"),
        ((b"iCCP", b"x\0\0" + zlib.compress(SRGB + bytes(2 * 2**20))), "ICC profile (more than 1 MB)"),
        ((b"iCCP", b"x\0\0" + zlib.compress(SRGB)[:-30]), "ICC profile"),
        ((b"iCCP", b""), None),
        ((b"gAMA", b"\0"), "gAMA"),
        ((b"cICP", b"\1"), "cICP"),
        ((b"cHRM", bytes(31)), "cHRM"),
        ((b"tRNS", b"\0"), "tRNS"),
        ((b"pHYs", b"\0"), None),
        ((b"quAx", b"anything"), None),
    ],
    ids=lambda value: value[0].decode() if isinstance(value, tuple) else "",  # profiles hold the time, so their bytes change
)
def test_png_chunks_that_are_damaged_or_too_large(chunk, name, deep, tmp_path, caplog):
    (tmp_path / "x.png").write_bytes(png(chunk, deep=deep))
    picture = read_picture(tmp_path / "x.png")
    assert (picture.rgb - photo(10, 20)).abs().max() < 1e-4
    assert read_header(tmp_path / "x.png").width == 20
    assert picture.alpha is None
    assert len(caplog.records) <= 1
    if name:
        assert "x.png" in caplog.text
        assert name in caplog.text
    write_picture(tmp_path / "y.png", picture)
    assert Image.open(tmp_path / "y.png").size == (20, 10)


def test_a_wrong_checksum_costs_the_part_alone(tmp_path, caplog):
    data = png((b"tEXt", b"Comment\0hello"))
    (tmp_path / "x.png").write_bytes(data.replace(b"hello", b"jello"))
    assert read_picture(tmp_path / "x.png").chunks == ()
    assert "x.png: left out text 'Comment' (damaged)" in caplog.text


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200], SRGB, b"", CMYK_PROFILE])
@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_a_cmyk_image_is_restored_whatever_its_profile(profile, suffix, tmp_path, caplog):
    file = tmp_path / f"x{suffix}"
    Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(file, icc_profile=profile)
    picture = read_picture(file)
    assert picture.icc is None, "the pixels are sRGB now"
    assert (picture.rgb - torch.tensor([1.0, 0, 0])[:, None, None]).abs().max() < 0.02
    assert len(caplog.records) == (1 if profile else 0)
    assert not profile or (file.name in caplog.text and "ICC profile" in caplog.text)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exif_speaks_of_the_result(suffix, tmp_path, caplog):
    with_parts(tmp_path / "x.jpg", exif=exif(), xmp=XMP, icc=SRGB)
    assert Image.open(tmp_path / "x.jpg").getexif().get_ifd(ExifTags.IFD.IFD1), "the input has a thumbnail"
    picture = read_picture(tmp_path / "x.jpg")
    assert picture.rgb.shape[2:] == (20, 10)
    large = Picture(photo(80, 40), deep="deep" in suffix, icc=picture.icc, exif=picture.exif, xmp=picture.xmp)
    write_picture(tmp_path / f"y{suffix}", large)
    image = Image.open(tmp_path / f"y{suffix}")
    image.load()
    found = image.getexif()
    assert found[ExifTags.Base.Make] == "Camera"
    assert found.get(ExifTags.Base.Orientation, 1) == 1
    assert (found[ExifTags.Base.ImageWidth], found[ExifTags.Base.ImageLength]) == (40, 80)
    inner = found.get_ifd(ExifTags.IFD.Exif)
    assert (inner[ExifTags.Base.ExifImageWidth], inner[ExifTags.Base.ExifImageHeight]) == (40, 80)
    assert found.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    assert not found.get_ifd(ExifTags.IFD.IFD1)
    assert image.info["icc_profile"] == SRGB
    xmp = image.info["xmp"]
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    for told in (b'tiff:ImageWidth="40"', b'exif:PixelXDimension="40"', b'tiff:Orientation="1"', b'xmp:Rating="4"'):
        assert told in xmp
    assert b"<exif:PixelYDimension>80<" in xmp
    assert b"<tiff:ImageLength>80<" in xmp
    assert b"JPEGDATA" not in xmp
    back = read_picture(tmp_path / f"y{suffix}")
    assert back.rgb.shape[2:] == (80, 40)
    assert back.icc == SRGB
    assert back.xmp == xmp
    assert Image.open(tmp_path / f"y{suffix}").getexif()[ExifTags.Base.Make] == "Camera"
    assert back.exif
    assert not caplog.records
    write_picture(tmp_path / "z.jpg", back)
    again = Image.open(tmp_path / "z.jpg").getexif()
    assert again[ExifTags.Base.Make] == "Camera"
    assert again.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] == 40
    assert again.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


def test_exif_without_sizes_gets_none(tmp_path):
    made = Image.Exif()
    made[ExifTags.Base.Make] = "Camera"
    write_picture(tmp_path / "x.jpg", Picture(photo(8, 8), exif=made.tobytes()))
    found = Image.open(tmp_path / "x.jpg").getexif()
    assert dict(found) == {ExifTags.Base.Make: "Camera"}
    assert not found.get_ifd(ExifTags.IFD.Exif)


def test_an_orientation_counts_though_the_rest_is_damaged(tmp_path, caplog):
    with_parts(tmp_path / "x.jpg", exif=exif(6, thumbnail=False)[:-8])
    assert read_picture(tmp_path / "x.jpg").rgb.shape[2:] == (20, 10)
    assert "EXIF data" in caplog.text


def test_exif_of_imagemagick_in_a_png(tmp_path):
    data = exif(6, thumbnail=False)
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(data) + data.hex().encode())
    (tmp_path / "x.png").write_bytes(png((b"zTXt", text)))
    picture = read_picture(tmp_path / "x.png")
    assert picture.rgb.shape[2:] == (20, 10)
    write_picture(tmp_path / "y.png", picture)
    assert read_picture(tmp_path / "y.png").rgb.shape[2:] == (20, 10), "not turned twice"


@pytest.mark.parametrize("deep", [False, True])
def test_what_png_says_of_colours_and_its_texts_go_into_a_png(deep, tmp_path, caplog):
    chunks = (
        (b"gAMA", struct.pack(">I", 100000)), (b"cHRM", struct.pack(">8I", *range(8))), (b"cICP", b"\x09\x10\0\1"),
        (b"tEXt", b"parameters\0steps: 20"), (b"iTXt", "prompt\0\0\0de\0\0grün".encode()),
        (b"zTXt", b"a\0\0" + zlib.compress(b"b")),
    )  # fmt: skip
    (tmp_path / "x.png").write_bytes(png(*chunks, deep=deep))
    picture = read_picture(tmp_path / "x.png")
    write_picture(tmp_path / "y.png", picture)
    assert set(split_png((tmp_path / "y.png").read_bytes())[1].chunks) == set(chunks)
    image = Image.open(tmp_path / "y.png")
    assert image.info["gamma"] == 1
    assert image.info["prompt"] == "grün"
    assert not caplog.records
    write_picture(tmp_path / "y.webp", Picture(picture.rgb, chunks=picture.chunks))
    assert "y.webp: left out the input's cICP" in caplog.text


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        (((b"gAMA", struct.pack(">I", 100000)),), "gAMA"),
        (((b"gAMA", struct.pack(">I", 45455)),), None),
        (((b"gAMA", struct.pack(">I", 45455)), (b"cHRM", struct.pack(">8I", *range(8)))), "cHRM"),
        (((b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000))), None),
        (((b"cICP", b"\1\x0d\0\1"),), None),
        (((b"cICP", b"\x0c\x0d\0\1"),), "cICP"),
    ],
)
def test_another_format_says_which_colours_it_cannot_tell(chunks, said, tmp_path, caplog):
    write_picture(tmp_path / "x.jpg", Picture(photo(8, 8), chunks=chunks))
    assert (f"left out the input's {said}" in caplog.text) if said else not caplog.records


@pytest.mark.parametrize(
    ("suffix", "parts", "names"),
    [
        (".jpg", {"exif": 70000}, ["EXIF data"]),
        (".jpg", {"xmp": 70000}, ["XMP data"]),
        (".jpg", {"icc": 17 * 2**20}, ["ICC profile"]),
        (".png", {"icc": 2 * 2**20}, ["ICC profile"]),
        (".bmp", {"exif": 10, "icc": 0, "xmp": 10}, ["ICC profile", "EXIF data", "XMP data"]),
    ],
)
def test_what_a_format_cannot_hold_is_left_out_and_named(suffix, parts, names, tmp_path, caplog):
    made = Image.Exif()
    made[ExifTags.Base.ImageDescription] = "x" * parts.get("exif", 0)
    given = {
        "exif": made.tobytes(), "xmp": XMP + b" " * parts.get("xmp", 0), "icc": SRGB + bytes(parts.get("icc", 0)),
    }  # fmt: skip
    path = tmp_path / f"x{suffix}"
    write_picture(path, Picture(photo(8, 8), **{name: given[name] for name in parts}))
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in ("x" + suffix, *names))
    caplog.clear()
    assert read_picture(path).exif is None
    assert not caplog.records


def test_damaged_metadata_is_no_warning_of_a_library(tmp_path, recwarn, caplog):
    with caplog.at_level(logging.WARNING):
        with_parts(tmp_path / "x.jpg", exif=DAMAGED["exif-loop"]["exif"])
        read_picture(tmp_path / "x.jpg")
    assert len(caplog.records) == 1
    assert not recwarn.list
