"""PNG, JPEG and TIFF files taken apart and put together again, and what is read again of all that was accepted once."""

import io
import random

import pytest
from PIL import Image, PngImagePlugin

from tsdsr_core.images.containers import Parts, join_jpeg, join_png, split_jpeg, split_png
from tsdsr_core.images.files import read_picture, write_picture
from tsdsr_core.images.formats import FORMATS

from .test_metadata import SRGB, XMP, drawn, exif, png, with_parts


@pytest.mark.parametrize("suffix", FORMATS)
def test_whatever_was_accepted_is_read_again(suffix, tmp_path, caplog):
    """Random damage of sound metadata, in every container: what a first reading lets through, a second one takes as it is."""
    source = random.Random(0)
    for number in range(40):
        parts = {"icc": SRGB, "exif": exif(), "xmp": XMP}
        name = source.choice(list(parts))
        damaged = bytearray(parts[name])
        for _ in range(source.choice((1, 3, 30))):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        parts[name] = bytes(damaged)
        with_parts(tmp_path / f"{number}.png", **parts)
        picture = read_picture(tmp_path / f"{number}.png")
        path = tmp_path / f"{number}y{suffix}"
        write_picture(path, picture)
        caplog.clear()
        back = read_picture(path)
        assert not caplog.records, (name, caplog.text)
        assert back.rgb.shape == picture.rgb.shape
        if suffix in (".png", ".jpg"):
            assert (back.icc, back.xmp) == (picture.icc, picture.xmp and back.xmp)
            again = tmp_path / f"{number}z{suffix}"
            write_picture(again, back)
            assert read_picture(again).exif == back.exif
        with Image.open(path) as image:
            image.load()
            image.getexif().tobytes()


def test_containers_are_taken_apart_and_put_together_again():
    jpeg = io.BytesIO()
    drawn().save(jpeg, "JPEG")
    parts = Parts(SRGB * 200, exif(), XMP)
    assert len(parts.icc) > 65533, "several segments"
    together, left_out = join_jpeg(jpeg.getvalue(), parts)
    assert not left_out
    assert split_jpeg(together) == (jpeg.getvalue(), parts)
    data = png()
    together, left_out = join_png(data, Parts(SRGB, exif()[6:], XMP))
    assert not left_out
    assert split_png(together) == (data, Parts(SRGB, exif()[6:], XMP))
    for cut in range(8, len(together), 7):
        split_png(together[:cut])
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20, "what Pillow refuses, and what the limits here follow"
