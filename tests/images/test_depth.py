"""Every depth and colour mode is read at its true depth, or refused by name; nothing is clipped."""

import io
import struct

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage.color import lab2rgb

from tsdsr_core.images.files import Picture, read_header, read_picture, write_picture
from tsdsr_core.images.formats import FORMATS

from ..support.tiny import photo


def packed_tiff(bits: int, channels: int, order: str = "<", photometric: int = 1, height: int = 24, width: int = 31):
    """(file, whole numbers ``(H, W, C)``): a TIFF whose numbers of ``bits`` bits follow each other without gaps."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (height, width, channels))
    values[0, 0], values[0, 1] = 0, 2**bits - 1
    ones = (values.reshape(height, -1)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(ones.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    entries = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: channels, 278: height, 279: len(rows),
    }  # fmt: skip
    end = 8 + 2 + 12 * len(entries) + 4
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels) if channels > 1 else b""
    entries[273] = end + len(depths)
    file = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    for tag, value in entries.items():
        if tag == 258 and depths:
            file += struct.pack(order + "HHII", tag, 3, channels, end)
        elif tag in (273, 279):
            file += struct.pack(order + "HHII", tag, 4, 1, value)
        else:
            file += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    return file + bytes(4) + depths + rows, values


def same(picture: Picture, expected: np.ndarray, within: float) -> bool:
    """Whether ``(H, W, C)`` in 0..1 is what was read, grey as one channel."""
    found = (picture.rgb[0, :1] if picture.grey else picture.rgb[0]).permute(1, 2, 0).numpy()
    return found.shape == expected.shape and np.abs(found - expected).max() <= within


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "photometric"), [(1, 1), (1, 0), (3, 2)])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_tiffs_are_read_at_their_depth(bits, channels, photometric, order, tmp_path):
    data, values = packed_tiff(bits, channels, order, photometric)
    (tmp_path / "x.tif").write_bytes(data)
    picture = read_picture(tmp_path / "x.tif")
    expected = values / (2**bits - 1)
    assert picture.deep
    assert picture.grey == (channels == 1)
    assert same(picture, 1 - expected if photometric == 0 else expected, 1 / 65535)
    write_picture(tmp_path / "y.tif", picture)
    assert torch.equal(read_picture(tmp_path / "y.tif").rgb, picture.rgb)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("colours", [1, 3])
def test_headers_of_deep_tiffs_are_read_as_their_pixels_are(colours, alpha, order, tmp_path):
    array = np.random.default_rng(0).integers(0, 65536, (9, 13, colours + alpha)).astype(order + "u2")
    tifffile.imwrite(
        tmp_path / "x.tif", array[..., 0] if array.shape[2] == 1 else array, photometric={1: "minisblack", 3: "rgb"}[colours],
        planarconfig="contig", extrasamples=["unassalpha"] if alpha else None, byteorder=order,
    )  # fmt: skip
    picture, header = read_picture(tmp_path / "x.tif"), read_header(tmp_path / "x.tif")
    assert (header.height, header.width, header.grey) == (*picture.rgb.shape[2:], picture.grey) == (9, 13, colours == 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_of_grey_fill_the_range(bits, tmp_path):
    data, values = packed_tiff(bits, 1)
    (tmp_path / "x.tif").write_bytes(data)
    assert same(read_picture(tmp_path / "x.tif"), values / (2**bits - 1), 1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [9, 11, 13, 15, 24, 32])
def test_odd_depths_are_refused_by_name(bits, channels, tmp_path):
    (tmp_path / "x.tif").write_bytes(packed_tiff(bits, channels, photometric=1 if channels == 1 else 2)[0])
    with pytest.raises(
        ValueError, match=rf"x\.tif has {bits} bits per channel: expected unsigned integers of 8, 10, 12, 14 or 16 bits"
    ):
        read_picture(tmp_path / "x.tif")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("float16", "16 bits per channel (floating point)"), ("float32", "32 bits per channel (floating point)"),
        ("float64", "64 bits per channel (floating point)"), ("int8", "8 bits per channel (signed)"),
        ("int16", "16 bits per channel (signed)"), ("int32", "32 bits per channel (signed)"),
        ("uint32", "32 bits per channel"), ("uint64", "64 bits per channel"),
    ],
)  # fmt: skip
def test_numbers_of_other_kinds_are_refused_by_name(dtype, said, channels, tmp_path):
    array = (np.random.default_rng(0).random((12, 16, channels)) * 100).astype(dtype)
    tifffile.imwrite(
        tmp_path / "x.tif", array[..., 0] if channels == 1 else array, photometric="rgb" if channels == 3 else "minisblack"
    )
    with pytest.raises(ValueError, match=r"x\.tif has") as caught:
        read_picture(tmp_path / "x.tif")
    assert f"{said}: expected unsigned integers of 8, 10, 12, 14 or 16 bits" in str(caught.value)


@pytest.mark.parametrize(("photometric", "channels"), [("separated", 4), ("cielab", 3), ("ycbcr", 3)])
def test_deep_colours_of_other_kinds_are_refused_by_name(photometric, channels, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((12, 16, channels), np.uint16), photometric=photometric)
    with pytest.raises(ValueError, match=rf"16 bits per channel in the colour space {photometric.upper()}"):
        read_picture(tmp_path / "x.tif")


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", ".tif"), ("I;16B", ".tif"), ("I;16L", ".tif"), ("I;16", ".png")])
def test_16_bits_of_every_byte_order(mode, suffix, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (9, 13)).astype(np.uint16)
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, (13, 9), values.astype(order + "u2").tobytes())
    image.save(tmp_path / f"x{suffix}")
    picture = read_picture(tmp_path / f"x{suffix}")
    assert picture.deep
    assert picture.grey
    assert same(picture, values[..., None] / 65535, 1e-6)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, ".tif") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")),
        *((mode, ".png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    ],
)
def test_every_mode_of_8_bits_looks_as_it_did(mode, suffix, tmp_path):
    colours = Image.fromarray((photo(12, 16)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    alpha = Image.fromarray(np.tile(np.array([0, 85, 170, 255], np.uint8), (12, 4)))
    colours.putalpha(alpha)
    image = colours.convert("RGBA" if mode == "PA" else mode) if "A" in mode else colours.convert("RGB").convert(mode)
    image.convert(mode).save(tmp_path / f"x{suffix}")
    picture = read_picture(tmp_path / f"x{suffix}")
    expected = Image.open(tmp_path / f"x{suffix}").convert("RGBA")
    assert picture.grey == (mode in ("1", "L", "LA"))
    found = (picture.rgb[0].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(found - np.array(expected)[..., :3]).max() <= 1
    assert (picture.alpha is not None) == (mode in ("LA", "PA", "RGBA"))
    if picture.alpha is not None:
        assert np.array_equal((picture.alpha[0, 0].numpy() * 255).round(), np.array(alpha))


def test_lab_becomes_srgb(tmp_path):
    light, a = np.meshgrid(np.linspace(90, 200, 16), np.linspace(-25, 25, 12))
    lab = np.stack((light, a, np.full_like(a, 9)), -1).round()
    image = Image.frombytes("LAB", (16, 12), lab.astype(np.int16).astype(np.uint8).tobytes())
    image.save(tmp_path / "x.tif")
    expected = lab2rgb(np.stack((lab[..., 0] * 100 / 255, lab[..., 1], lab[..., 2]), -1))
    assert same(read_picture(tmp_path / "x.tif"), expected, 0.02)


@pytest.mark.parametrize("bits", [10, 12])
def test_avif_of_more_than_8_bits(bits, tmp_path):
    if ".avif" not in FORMATS or not cv2.haveImageWriter("x.avif"):
        pytest.skip("needs AVIF in Pillow and in OpenCV")
    values = np.random.default_rng(0).integers(0, 2**bits, (16, 24, 3)).astype(np.uint16)
    options = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
    (tmp_path / "x.avif").write_bytes(cv2.imencode(".avif", values[..., ::-1], options)[1].tobytes())
    picture = read_picture(tmp_path / "x.avif")
    assert picture.deep
    assert same(picture, values / (2**bits - 1), 1 / 65535)


def test_a_jpeg_of_12_bits_is_refused_by_name(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    data[data.index(b"\xff\xc0") + 4] = 12
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.jpg is a JPEG file of 12 bits per channel"):
        read_picture(tmp_path / "x.jpg")


def test_heic_is_read_where_its_plug_in_is(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    array = (photo(32, 48)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    heif.from_bytes("RGB", (48, 32), array.tobytes()).save(str(tmp_path / "x.heic"), quality=-1)
    found = read_picture(tmp_path / "x.heic").rgb[0].permute(1, 2, 0).numpy()
    assert np.abs(found - array / 255).mean() < 0.05, "its colours have half the size"
    assert read_header(tmp_path / "x.heic").width == 48


def test_jpeg_xl_is_read_where_its_plug_in_is(tmp_path):
    pytest.importorskip("pillow_jxl")
    image = Image.fromarray((photo(32, 48)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    image.save(tmp_path / "x.jxl", lossless=True)
    assert same(read_picture(tmp_path / "x.jxl"), np.array(image) / 255, 1e-6)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"8BPS\0\1", "PSD"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"%PDF-1.7", "PDF"),
        (b"v/1\x01", "EXR"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"<svg xmlns='x'>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "its format is unknown"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\xff\x0a", "JXL"),
    ],
)
def test_foreign_content_under_a_known_suffix_is_named(start, said, tmp_path):
    (tmp_path / "x.png").write_bytes(start + bytes(60))
    with pytest.raises(ValueError, match=r"x\.png") as caught:
        read_picture(tmp_path / "x.png")
    plugin = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}.get(said)
    if plugin is None:
        assert said in str(caught.value)
    with pytest.raises(ValueError, match=r"x\.png"):
        read_header(tmp_path / "x.png")
