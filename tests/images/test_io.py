"""Pictures go from file to file unharmed: sizes, depths, channels, profiles, orientation; and what is refused."""

import io
import logging
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from tsdsr_core.images.files import FORMATS, Header, Picture, read_header, read_picture, write_picture

from ..support.tiny import photo

ORIENTATION = 0x0112
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixels(picture: Picture, full: int = 255) -> np.ndarray:
    """All channels as whole numbers ``(H, W, C)``."""
    rgb = picture.rgb[0, :1] if picture.grey else picture.rgb[0]
    channels = rgb if picture.alpha is None else torch.cat((rgb, picture.alpha[0]))
    return (channels * full).round().permute(1, 2, 0).numpy().astype(int)


def noise(height: int, width: int, channels: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("grey", [False, True])
def test_every_format_round_trips(suffix, grey, tmp_path):
    rgb = photo(40, 52)
    rgb = rgb[:, :1].repeat(1, 3, 1, 1) if grey else rgb
    path = tmp_path / f"x{suffix}"
    write_picture(path, Picture(rgb, grey=grey))
    back = read_picture(path)
    assert back.alpha is None
    assert not back.deep
    assert back.grey == (grey and suffix != ".webp"), "WebP knows no grey"
    lossy = suffix in (".jpg", ".jpeg", ".webp", ".avif")
    assert (back.rgb - rgb).abs().mean() <= (5 if lossy else 0.01) / 255
    assert Image.open(path).format == FORMATS[suffix]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("deep", [False, True])
def test_lossless_formats_keep_every_value(suffix, channels, deep, tmp_path):
    full = 65535 if deep else 255
    values = torch.from_numpy(noise(17, 23, channels, np.uint16 if deep else np.uint8).astype(np.float32) / full)
    values = values.permute(2, 0, 1)[None]
    grey = channels < 3
    rgb = values[:, :1].repeat(1, 3, 1, 1) if grey else values[:, :3]
    alpha = values[:, -1:] if channels in (2, 4) else None
    write_picture(tmp_path / f"x{suffix}", Picture(rgb, alpha, grey=grey, deep=deep))
    back = read_picture(tmp_path / f"x{suffix}")
    assert back.deep == deep
    assert (back.rgb - rgb).abs().max() < 1e-6
    assert back.grey == (grey and not (deep and channels == 2 and suffix == ".png")), "OpenCV has no deep grey with alpha"
    assert (back.alpha is None) == (alpha is None)
    assert alpha is None or (back.alpha - alpha).abs().max() < 1e-6


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), channels=st.integers(1, 4), deep=st.booleans(), seed=st.integers(0, 99)
)
def test_png_of_any_size_is_read_as_it_was_drawn(height, width, channels, deep, seed, tmp_path):
    if deep and channels == 2:
        channels = 4  # OpenCV, the writer here, has no deep grey with alpha
    array = noise(height, width, channels, np.uint16 if deep else np.uint8, seed)
    if deep:
        cv2.imwrite(str(tmp_path / "x.png"), array[..., [2, 1, 0, 3][:channels]] if channels > 2 else array)
    else:
        Image.fromarray(array[..., 0] if channels == 1 else array).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    assert np.array_equal(pixels(picture, 65535 if deep else 255), array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_orientation_is_applied_once(orientation, suffix, tmp_path):
    image = Image.fromarray((photo(24, 40)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010F] = "Camera"
    image.save(tmp_path / f"x{suffix}", exif=exif, quality=95)
    picture = read_picture(tmp_path / f"x{suffix}")
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"x{suffix}"))
    assert np.array_equal(pixels(picture), np.array(upright.convert("RGB")))
    write_picture(tmp_path / f"y{suffix}", picture)
    again = Image.open(tmp_path / f"y{suffix}")
    assert again.getexif().get(ORIENTATION, 1) == 1
    if suffix != ".tif":  # a TIFF's own tags describe its storage and are not carried over
        assert again.getexif()[0x010F] == "Camera"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_16_bits(orientation, tmp_path):
    array = noise(12, 20, 3, np.uint16)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    cv2.imwriteWithMetadata(
        str(tmp_path / "x.png"), array[..., ::-1], [cv2.IMAGE_METADATA_EXIF], [np.frombuffer(exif.tobytes(), np.uint8)[None]]
    )
    channels = [ImageOps.exif_transpose(_with_orientation(array[..., c], orientation)) for c in range(3)]
    expected = np.stack([np.array(channel) for channel in channels], -1)
    assert np.array_equal(pixels(read_picture(tmp_path / "x.png"), 65535), expected)


def _with_orientation(array: np.ndarray, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.int32)).save(buffer, "TIFF", exif=exif)
    return Image.open(buffer)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("deep", [False, True])
def test_the_colour_profile_is_kept(suffix, deep, tmp_path):
    write_picture(tmp_path / f"x{suffix}", Picture(photo(16, 16), icc=SRGB, deep=deep))
    assert Image.open(tmp_path / f"x{suffix}").info["icc_profile"] == SRGB
    assert read_picture(tmp_path / f"x{suffix}").icc == SRGB


def test_palettes_and_transparent_colours_become_what_they_look_like(tmp_path):
    drawn = Image.fromarray((photo(20, 20)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    palette = drawn.quantize(32)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "t.png", transparency=3)
    drawn.save(tmp_path / "rgb.png", transparency=drawn.getpixel((4, 7)))
    drawn.convert("L").save(tmp_path / "l.png", transparency=drawn.convert("L").getpixel((4, 7)))
    assert np.array_equal(pixels(read_picture(tmp_path / "p.png")), np.array(palette.convert("RGB")))
    for name in ("t", "rgb"):
        assert np.array_equal(
            pixels(read_picture(tmp_path / f"{name}.png")), np.array(Image.open(tmp_path / f"{name}.png").convert("RGBA"))
        )
    grey = read_picture(tmp_path / "l.png")
    assert grey.grey
    assert grey.alpha is not None
    assert grey.alpha[0, 0, 7, 4] == 0


def test_a_transparent_16_bit_grey_becomes_alpha(tmp_path):
    array = noise(8, 8, 1, np.uint16)[..., 0]
    cv2.imwrite(str(tmp_path / "x.png"), array)
    data = (tmp_path / "x.png").read_bytes()
    chunk = b"tRNS" + struct.pack(">H", array[3, 5])
    end = data.index(b"IDAT") - 4
    (tmp_path / "x.png").write_bytes(
        data[:end] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[end:]
    )
    picture = read_picture(tmp_path / "x.png")
    assert np.array_equal(pixels(picture, 65535)[..., 0], array)
    assert np.array_equal(pixels(picture, 65535)[..., 1] == 0, array == array[3, 5])


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_tiff_layout_means_the_same_picture(dtype, compression, tmp_path):
    full = np.iinfo(dtype).max
    array = noise(12, 16, 4, dtype)
    rgb, alpha = array[..., :3], array[..., 3:]
    options = {"photometric": "rgb", "compression": compression}
    for name, data, more, expected in (
        ("contiguous", rgb, {"planarconfig": "contig"}, rgb),
        ("apart", np.moveaxis(rgb, -1, 0), {"planarconfig": "separate"}, rgb),
        ("white", full - array[..., 0], {"photometric": "miniswhite"}, array[..., :1]),
        ("alpha", array, {"extrasamples": ["unassalpha"]}, array),
        ("other", array, {"extrasamples": ["unspecified"]}, rgb),
    ):
        tifffile.imwrite(tmp_path / f"{name}.tif", data, **{**options, **more})
        picture = read_picture(tmp_path / f"{name}.tif")
        assert picture.deep == (dtype == np.uint16)
        assert np.array_equal(pixels(picture, full), expected), name
    opaque = np.concatenate((rgb // 2, np.full_like(alpha, full // 2 + 1)), -1)
    tifffile.imwrite(tmp_path / "multiplied.tif", opaque, **options, extrasamples=["assocalpha"])
    divided = pixels(read_picture(tmp_path / "multiplied.tif"), full)[..., :3]
    assert np.abs(divided - rgb.astype(int)).max() <= 3


def test_a_grey_profile_does_not_go_into_a_colour_file(tmp_path):
    grey_profile = SRGB[:16] + b"GRAY" + SRGB[20:]
    write_picture(tmp_path / "x.webp", Picture(photo(8, 8), grey=True, icc=grey_profile))
    assert read_picture(tmp_path / "x.webp").icc is None
    write_picture(tmp_path / "x.png", Picture(photo(8, 8), grey=True, icc=grey_profile))
    assert read_picture(tmp_path / "x.png").icc == grey_profile


def test_exif_in_a_16_bit_png_has_no_jpeg_mark(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    write_picture(tmp_path / "x.png", Picture(photo(8, 8), deep=True, exif=exif.tobytes()))
    data = (tmp_path / "x.png").read_bytes()
    start = data.index(b"eXIf") + 4
    assert data[start : start + 2] in (b"II", b"MM")
    assert Image.open(tmp_path / "x.png").getexif()[0x010F] == "Camera"


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(noise(9, 9, 1)[..., 0] > 127).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    assert picture.grey
    assert set(pixels(picture).flatten()) == {0, 255}


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_becomes_srgb(suffix, tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image.save(tmp_path / f"plain{suffix}")
    red = pixels(read_picture(tmp_path / f"plain{suffix}"))
    assert np.abs(red - [255, 0, 0]).max() <= 4
    image.save(tmp_path / f"odd{suffix}", icc_profile=SRGB)  # not a CMYK profile: plain conversion, with a warning
    picture = read_picture(tmp_path / f"odd{suffix}")
    assert picture.icc is None, "the pixels are sRGB now"
    assert np.abs(pixels(picture) - [255, 0, 0]).max() <= 4


def test_alpha_is_refused_where_the_format_has_none(tmp_path):
    picture = Picture(photo(8, 8), alpha=torch.ones(1, 1, 8, 8))
    for suffix in (".jpg", ".bmp"):
        with pytest.raises(ValueError, match=r"cannot store the alpha channel.*\.png"):
            write_picture(tmp_path / f"x{suffix}", picture)
    assert not list(tmp_path.iterdir())


def test_16_bits_into_8_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "tsdsr"):
        write_picture(tmp_path / "x.jpg", Picture(photo(8, 8), deep=True))
    assert "stores only 8 of the input's 16 bits" in caplog.text
    assert not read_picture(tmp_path / "x.jpg").deep


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_preview_in_a_tiff_is_no_page(dtype, tmp_path):
    """As GIMP and scanners add."""
    array = noise(24, 32, 3, dtype)
    for name, kinds in (("preview", (1,)), ("pyramid", (1, 1)), ("pages", (0,)), ("both", (1, 0))):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as tiff:
            tiff.write(array, photometric="rgb", metadata=None)
            for kind in kinds:
                tiff.write(array[::4, ::4], photometric="rgb", metadata=None, subfiletype=kind)
        if 0 in kinds:
            with pytest.raises(ValueError, match=rf"{name}\.tif is animated or has several pages"):
                read_picture(tmp_path / f"{name}.tif")
        else:
            picture, full = read_picture(tmp_path / f"{name}.tif"), np.iinfo(dtype).max
            assert np.array_equal(pixels(picture, full), array)
            assert read_header(tmp_path / f"{name}.tif") == Header(24, 32, False)


@pytest.mark.parametrize(("name", "options"), [("a.webp", {}), ("a.png", {}), ("a.tif", {})])
def test_animated_and_multi_page_files_are_refused_by_name(name, options, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with pytest.raises(ValueError, match=f"{name} is animated"):
        read_picture(tmp_path / name)


def test_a_phone_jpeg_with_a_second_picture_is_read(tmp_path):
    first = Image.fromarray((photo(24, 24)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    assert read_picture(tmp_path / "phone.jpg").rgb.shape == (1, 3, 24, 24)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_named(suffix, tmp_path):
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(whole)
    data = whole.read_bytes()
    for name, content in (("half", data[: len(data) // 2]), ("empty", b""), ("text", b"hello" * 40), ("head", data[:20])):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}{suffix}"):
            read_picture(path)


@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize(("tag", "kind", "count"), [(0, 0, 0), (257, 3, 2), (257, 2, 2), (258, 5, 1), (258, 4, 0)])
def test_a_damaged_tiff_is_named_in_words(tag, kind, count, tmp_path):
    """No directory, or a tag of another type or number of values, on which decoders fail with errors of Python's own."""
    file = io.BytesIO()
    Image.fromarray(noise(24, 24, 3)).save(file, "TIFF", compression="tiff_lzw")
    data = bytearray(file.getvalue())
    (start,) = struct.unpack_from("<I", data, 4)
    if tag:
        struct.pack_into("<HII", data, data.index(struct.pack("<H", tag), start + 2) + 2, kind, count, 8)
    else:
        struct.pack_into("<I", data, 4, 0)
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tif cannot be read as an image: it is damaged, or its format is not supported"):
        read_picture(tmp_path / "x.tif")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("deep", [False, True])
def test_damage_anywhere_ends_in_a_picture_or_in_one_kind_of_error(suffix, deep, tmp_path):
    if deep and suffix not in (".png", ".tif"):
        return
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 6, "Camera"
    path = tmp_path / f"x{suffix}"
    write_picture(path, Picture(photo(24, 24), deep=deep, icc=SRGB, exif=exif.tobytes()))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        message = path.name
        try:
            read_picture(path)
        except ValueError as error:
            message = str(error)
        assert path.name in message


def test_a_truncated_16_bit_file_is_named(tmp_path):
    for suffix in (".png", ".tif"):
        write_picture(tmp_path / f"whole{suffix}", Picture(torch.rand(1, 3, 64, 64), deep=True))
        data = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"half{suffix}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"half{suffix}"):
            read_picture(tmp_path / f"half{suffix}")


def test_a_bomb_is_refused(tmp_path):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IDAT")
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_picture(tmp_path / "bomb.png")


def test_unknown_missing_and_unreadable_kinds_are_named(tmp_path):
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"x\.gif: unknown format"):
        read_picture(tmp_path / "x.gif")
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"x\.gif: unknown format"):
        write_picture(tmp_path / "x.gif", Picture(photo(8, 8)))
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match=r"float\.tif has 32 bits per channel"):
        read_picture(tmp_path / "float.tif")


def test_names_beyond_ascii(tmp_path):
    for deep in (False, True):
        path = tmp_path / "фото 写真.png"
        write_picture(path, Picture(photo(8, 8), deep=deep))
        assert (read_picture(path).rgb - photo(8, 8)).abs().max() < 1e-6


@pytest.mark.parametrize("suffix", FORMATS)
def test_headers_tell_size_and_kind_as_the_pixels_do(suffix, tmp_path):
    for deep in (False, True) if suffix in (".png", ".tif") else (False,):
        for grey in (False, True) if suffix != ".webp" else (False,):
            write_picture(tmp_path / f"a{suffix}", Picture(photo(20, 30), grey=grey, deep=deep))
            assert read_picture(tmp_path / f"a{suffix}").grey == grey
            assert read_header(tmp_path / f"a{suffix}") == Header(20, 30, grey), (grey, deep)
    for name in ("damaged", "none"):
        if name == "damaged":
            (tmp_path / f"damaged{suffix}").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=rf"{name}\{suffix} cannot be read"):
            read_header(tmp_path / f"{name}{suffix}")
