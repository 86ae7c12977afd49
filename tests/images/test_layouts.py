"""Unusual layouts of image files keep their pixels, transparency, orientation and text, or are refused."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from tsdsr_core.errors import InputError
from tsdsr_core.images.files import read_picture, write_picture
from tsdsr_core.images.formats import FORMATS
from tsdsr_core.images.jobs import collect, plan_jobs


def corner(bits: int = 16) -> np.ndarray:
    """A square that only one orientation leaves as it is."""
    array = np.zeros((16, 16), np.uint16)
    array[:5, :3] = 2**bits - 1
    return array


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "tiff_lzw"])
def test_deep_tiffs_are_turned_once(orientation, compression, tmp_path):
    """Also those that OpenCV decodes, which would turn them by itself."""
    Image.fromarray(corner()).save(tmp_path / "deep.tif", compression=compression, tiffinfo={274: orientation})
    Image.fromarray((corner() >> 8).astype(np.uint8)).save(tmp_path / "plain.tif", tiffinfo={274: orientation})
    deep, plain = (read_picture(tmp_path / name).rgb for name in ("deep.tif", "plain.tif"))
    assert deep.shape == plain.shape
    assert (deep - plain).abs().max() == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_pngs_of_few_bits_keep_their_transparency(bits, tmp_path):
    levels, side = 2**bits, 8
    values = np.zeros((side, side), np.uint8)
    values[:, 4:] = levels - 1
    packed = np.packbits(np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(side, -1), axis=1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0), b"tRNS": struct.pack(">H", levels - 1),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed)), b"IEND": b"",
    }  # fmt: skip
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks.items()
    )
    (tmp_path / "grey.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    alpha = read_picture(tmp_path / "grey.png").alpha
    assert alpha is not None
    assert alpha[..., :4].min() == 1
    assert alpha[..., 4:].max() == 0


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_a_tiff_without_some_of_its_pixels_is_damaged(bits, tile, tmp_path):
    """As an interrupted writer leaves it; readers fill the gap with black."""
    path = tmp_path / "gap.tif"
    array = np.full((64, 64, 3), 200, np.uint8 if bits == 8 else np.uint16)
    tifffile.imwrite(path, array, photometric="rgb", rowsperstrip=None if tile else 16, tile=tile)
    with tifffile.TiffFile(path) as tiff:
        tags = [tiff.pages.first.tags[code] for code in ((324, 325) if tile else (273, 279))]
    data = bytearray(path.read_bytes())
    for tag in tags:
        size = tag.valuebytecount // tag.count
        data[tag.valueoffset + size : tag.valueoffset + 2 * size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"gap\.tif.* 1 of its \d+ strips or tiles of pixels are missing"):
        read_picture(path)


def test_alpha_after_another_extra_channel_is_found(tmp_path):
    array = np.full((8, 8, 5), 40000, np.uint16)
    array[:, :4, 4] = 0
    tifffile.imwrite(tmp_path / "five.tif", array, photometric="rgb", extrasamples=["unspecified", "unassalpha"])
    alpha = read_picture(tmp_path / "five.tif").alpha
    assert alpha is not None
    assert alpha[..., :4].max() == 0


def test_layers_in_depth_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "volume.tif", np.zeros((4, 16, 16), np.uint16), volumetric=True, photometric="minisblack")
    with pytest.raises(InputError, match="4 layers in depth"):
        read_picture(tmp_path / "volume.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_text_of_exif_keeps_its_bytes(suffix, encoding, tmp_path):
    """Pillow would write question marks."""
    exif = Image.Exif()
    exif[0x8298], exif[0x010E] = "? M?ller", "plain"
    said = "© Müller".encode(encoding)
    data = exif.tobytes().replace(b"? M?ller", said[:8])
    Image.new("RGB", (16, 16)).save(tmp_path / "in.jpg", exif=data)
    write_picture(tmp_path / f"out{suffix}", read_picture(tmp_path / "in.jpg"))
    with Image.open(tmp_path / f"out{suffix}") as image:
        assert image.getexif()[0x8298].encode("latin-1") == said[:8]


def test_two_results_in_one_file_through_a_link_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / "in" / name)
    (tmp_path / "out" / "b.jpg").symlink_to("a.jpg")
    inputs = collect([str(tmp_path / "in")])
    with pytest.raises(InputError, match=r"a\.jpg and .*b\.jpg would both be written to"):
        plan_jobs(inputs, str(tmp_path / "out"), "overwrite", FORMATS, None)
