"""EXIF and IPTC data in the tags of a TIFF, comments and texts: carried where the result's format holds them, else named."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, IptcImagePlugin

from tsdsr_core.images.containers import Parts, join_jpeg, split_png
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.images.formats import FORMATS

from ..support.tiny import photo
from .test_metadata import drawn, png


@pytest.mark.parametrize(
    ("order", "big", "deep"),
    [
        (order, big, deep)
        for order in "<>"
        for big in (False, True)
        for deep in (False, True)
        if deep or not big or order == "<"
    ],
)  # of the other one, Pillow reads no pixels
def test_exif_and_iptc_data_of_a_tiff_are_those_of_the_result(order, big, deep, tmp_path, caplog):
    iptc = b"\x1c\x02\x78\0\7caption\0"  # 13 bytes, that some programs call four whole numbers
    whole = np.frombuffer(iptc + bytes(-len(iptc) % 4), order + "u4")
    array = np.random.default_rng(0).integers(0, 2 ** (16 if deep else 8), (9, 13, 3))
    tifffile.imwrite(
        tmp_path / "x.tif", array.astype("u2" if deep else "u1"), photometric="rgb", bigtiff=big, byteorder=order,
        resolution=(300, 300), resolutionunit="inch", datetime="2026:01:02 03:04:05",
        extratags=[(33723, 4, len(whole), whole.tobytes(), True), (33432, 2, 0, "somebody", True), (315, 2, 0, "me", True)],
    )  # fmt: skip
    picture = read_picture(tmp_path / "x.tif")
    for name in ("y.jpg", "y.tif"):
        write_picture(tmp_path / name, replace(picture, rgb=photo(18, 26)))
        found = Image.open(tmp_path / name).getexif()
        assert (found[33432], found[315], found[282], found[296]) == ("somebody", "me", 300, 2)
        assert found[ExifTags.Base.DateTime] == "2026:01:02 03:04:05"
        assert set(found) <= {256, 257, 258, 259, 262, 273, 277, 278, 279, 282, 283, 284, 296, 306, 315, 317, 339, 33432, 33723}
        assert Image.open(tmp_path / name).size == (26, 18)
        assert read_picture(tmp_path / name).iptc.rstrip(b"\0") == iptc.rstrip(b"\0")
    assert IptcImagePlugin.getiptcinfo(Image.open(tmp_path / "y.jpg"))[2, 120] == b"caption"
    assert "left out" not in caplog.text
    write_picture(tmp_path / "y.png", picture)
    assert "y.png: left out IPTC data (PNG cannot store them)" in caplog.text


@pytest.mark.parametrize("deep", [False, True])
def test_a_tiff_without_metadata_gets_none(deep, tmp_path):
    write_picture(tmp_path / "x.tif", Picture(photo(8, 8), deep=deep))
    picture = read_picture(tmp_path / "x.tif")
    assert (picture.exif, picture.iptc, picture.xmp, picture.icc, picture.chunks) == (None, None, None, None, ())


def test_texts_and_comments_are_carried_or_named(tmp_path, caplog):
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", comment="grün")
    picture = read_picture(tmp_path / "x.jpg")
    write_picture(tmp_path / "y.png", picture)
    assert Image.open(tmp_path / "y.png").text == {"Comment": "grün"}
    write_picture(tmp_path / "y.jpg", read_picture(tmp_path / "y.png"))
    assert Image.open(tmp_path / "y.jpg").info["comment"] == "grün".encode()
    latin = join_jpeg((tmp_path / "x.jpg").read_bytes(), Parts(chunks=[(b"tEXt", b"Comment\0gr\xfcn")]))[0]
    (tmp_path / "z.jpg").write_bytes(latin)
    write_picture(tmp_path / "z.png", read_picture(tmp_path / "z.jpg"))
    assert split_png((tmp_path / "z.png").read_bytes())[1].chunks[-1] == (b"iTXt", "Comment\0\0\0\0\0grün".encode())
    assert (b"tEXt", b"Comment\0gr\xfcn") in split_png((tmp_path / "z.png").read_bytes())[1].chunks
    assert not caplog.records
    chunks = ((b"tEXt", b"Comment\0hello"), (b"tEXt", b"workflow\0{}"), (b"tEXt", b"parameters\0steps: 20"))
    for suffix in FORMATS:
        caplog.clear()
        write_picture(tmp_path / f"t{suffix}", Picture(photo(8, 8), chunks=chunks))
        kind = FORMATS[suffix]
        names = "'workflow', 'parameters'" if kind == "JPEG" else "'Comment', 'workflow', 'parameters'"
        assert (f"t{suffix}: left out texts {names} ({kind} cannot store them)" in caplog.text) == (kind != "PNG")


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def test_iptc_and_extended_xmp_of_a_jpeg(tmp_path, caplog):
    iptc = b"\x1c\x02\x78\0\7caption"
    name, other = b"\x04path\0", struct.pack(">HHI", 0x03ED, 0, 3) + b"abc\0"
    resources = b"8BIM" + other + b"8BIM" + struct.pack(">H", 0x0404) + name + struct.pack(">I", len(iptc)) + iptc
    data = join_jpeg(drawn_jpeg(), Parts())[0]
    more = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40))
    (tmp_path / "x.jpg").write_bytes(data[:2] + segment(0xED, b"Photoshop 3.0\0" + resources) + more + more + data[2:])
    picture = read_picture(tmp_path / "x.jpg")
    assert picture.iptc == iptc
    (record,) = caplog.records
    assert record.getMessage().endswith("x.jpg: left out extended XMP data (not carried over)")
    write_picture(tmp_path / "y.jpg", picture)
    assert IptcImagePlugin.getiptcinfo(Image.open(tmp_path / "y.jpg")) == {(2, 120): b"caption"}
    assert read_picture(tmp_path / "y.jpg").iptc == iptc
    caplog.clear()
    (tmp_path / "z.jpg").write_bytes(data[:2] + segment(0xED, b"Photoshop 3.0\0" + resources[:-3]) + data[2:])
    assert read_picture(tmp_path / "z.jpg").iptc is None
    assert "z.jpg: left out IPTC data (damaged)" in caplog.text
    caplog.clear()
    write_picture(tmp_path / "w.jpg", replace(picture, iptc=iptc + bytes(70000)))
    assert "w.jpg: left out IPTC data (more than 64 KB)" in caplog.text


def drawn_jpeg() -> bytes:
    file = io.BytesIO()
    drawn().save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_so_many_texts_are_kept_as_are_read_again(kind, tmp_path, caplog):
    text = b"\0" if kind == b"zTXt" else b"\1\0\0\0"
    body = zlib.compress(bytes(2**20 - 8))
    (tmp_path / "x.png").write_bytes(png(*((kind, b"text %d\0" % number + text + body) for number in range(80))))
    picture = read_picture(tmp_path / "x.png")
    assert len(picture.chunks) == 32
    assert "the texts have more than 32 MB in total" in caplog.text
    write_picture(tmp_path / "y.png", picture)
    with Image.open(tmp_path / "y.png") as image:
        image.load()
        assert len(image.text) == 32
